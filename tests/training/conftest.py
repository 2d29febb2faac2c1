"""One torch thread: lanes and torch's pool would contend for the cores, and tiny tensors gain nothing from a pool."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The home `host` lies between `device` and `disk`, which every run tries; it takes part under OFFLOAD_STRESS=1."""
    if os.environ.get("OFFLOAD_STRESS"):
        return
    here = Path(__file__).parent
    between = [
        item
        for item in items
        if here in item.path.parents and getattr(item, "callspec", None) and item.callspec.params.get("home") == "host"
    ]
    items[:] = [item for item in items if item not in set(between)]
    config.hook.pytest_deselected(items=between)
