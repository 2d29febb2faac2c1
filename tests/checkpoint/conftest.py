"""What every test of checkpoints gets: syncs that cost nothing.

They matter to a power cut alone, which no test can make: that they are called, and when, is what the tests of crashes
look at. On a busy disk each of them takes longer than all else in a test. `save_forever.py` syncs in earnest.
"""

import os

import pytest


@pytest.fixture(autouse=True)
def syncs_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)
