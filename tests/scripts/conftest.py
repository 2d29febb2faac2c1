"""Each script runs on one home in turn; under OFFLOAD_STRESS=1 on all."""

import os
from pathlib import Path

import pytest

HOMES = ("device", "disk", "host")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the scripts in tables: the home changes from one to the next, so that every home sees every kind."""
    if os.environ.get("OFFLOAD_STRESS"):
        return
    here = Path(__file__).parent
    numbers: dict[str, int] = {}
    left_out = set()
    for item in items:
        if here in item.path.parents and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            parameters = item.callspec.params
            if "home" in parameters and "name" in parameters:
                number = numbers.setdefault(parameters["name"], len(numbers))
                if parameters["home"] != HOMES[number % len(HOMES)]:
                    left_out.add(item)
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))
