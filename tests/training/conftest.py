"""The home `host` is left out of a run that is not long."""

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The home `host` lies between `device` and `disk`, which every run tries; it takes part under OFFLOAD_STRESS=1.

    So does the way of an optimizer's state through the device's home, which is that through the disk's without a disk.
    """
    if os.environ.get("OFFLOAD_STRESS"):
        return
    here = Path(__file__).parent
    left_out = set()
    for item in items:
        if here in item.path.parents and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            home = item.callspec.params.get("home")
            of_state = item.originalname == "test_state_is_taken_over_and_given_back"
            if home == "host" or (of_state and home == "device"):
                left_out.add(item)
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))
