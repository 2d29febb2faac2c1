"""Sessions one after another, each with everything on disk and ended by an exception: nothing grows.

The short form runs always. The full form (20 sessions of 300 steps, some minutes) has the marker `stress` and runs when
asked for:

    OFFLOAD_STRESS=1 python -m pytest tests/session/test_many_sessions.py -s
"""

import ctypes
import faulthandler
import gc
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil
import pytest
import torch

from offload.units import MIB
from tests.training.models import mlp
from tests.training.oracle import adamw, enable

STRESS: Final = os.environ.get("OFFLOAD_STRESS", "") not in {"", "0"}

GROWTH_BYTES: Final = 4 * MIB
"""Of all sessions together, for what allocators and the interpreter keep; what a session holds is watched by itself."""


class Footprint(NamedTuple):
    """What this process holds."""

    resident_bytes: int
    num_mappings: int
    num_threads: int
    num_descriptors: int


def footprint() -> Footprint:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator still holds is no growth
    process = psutil.Process()
    anonymous = sum("rw-p 00000000 00:00 0" in line for line in Path("/proc/self/maps").read_text().splitlines())
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    return Footprint(process.memory_info().rss, anonymous, process.num_threads(), descriptors)


def session_that_ends_by_an_exception(folder: Path, num_steps: int) -> list[weakref.ref[Any]]:
    """What it held: its memory, its model and itself."""
    model = mlp()
    optimizer = adamw(model)
    inputs = torch.ones(2, 64)
    held: list[weakref.ref[Any]] = [weakref.ref(model), weakref.ref(optimizer)]

    def loop() -> None:
        with enable(model, optimizer, "disk", folder) as session:
            held.extend(weakref.ref(region._mapping) for region in session._components.storage._memory._regions)
            held.extend(weakref.ref(slot.flat) for slot in session._components.slots)
            held.append(weakref.ref(session))
            homes = session.metrics()["homes"]
            assert all(by_tier["disk"] and not by_tier["host"] + by_tier["device"] for by_tier in homes.values()), homes
            for _ in range(num_steps):
                model(inputs).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            raise KeyError

    with pytest.raises(KeyError):
        loop()
    assert all(state["step"] == num_steps for state in optimizer.state.values())
    assert list(folder.iterdir()) == []
    return held


def assert_nothing_grows(folder: Path, num_sessions: int, num_steps: int, growth_bytes: int) -> None:
    session_that_ends_by_an_exception(folder, num_steps)  # the first compiles kernels and fills caches
    before, start_s = footprint(), time.monotonic()
    held = [ref for _ in range(num_sessions) for ref in session_that_ends_by_an_exception(folder, num_steps)]
    after = footprint()
    print(f"{num_sessions} sessions of {num_steps} steps, {time.monotonic() - start_s:.1f} s: {before} -> {after}")  # noqa: T201
    assert [type(ref()).__name__ for ref in held if ref() is not None] == []
    assert after.num_threads == before.num_threads
    assert after.num_descriptors == before.num_descriptors
    assert after.num_mappings <= before.num_mappings + num_sessions // 2
    assert after.resident_bytes <= before.resident_bytes + growth_bytes
    assert [t.name for t in threading.enumerate() if t.name.startswith("offload")] == []


def test_six_sessions_leave_no_memory_thread_or_descriptor(tmp_path: Path) -> None:
    assert_nothing_grows(tmp_path, num_sessions=6, num_steps=10, growth_bytes=GROWTH_BYTES)


if STRESS:  # not a skip: those fail on CI, which runs the short form

    @pytest.mark.stress
    @pytest.mark.timeout(3600)
    def test_twenty_sessions_of_300_steps_leave_no_memory_thread_or_descriptor(tmp_path: Path) -> None:
        faulthandler.cancel_dump_traceback_later()  # pytest's: it would take this for a deadlock, and is a thread
        assert_nothing_grows(tmp_path, num_sessions=20, num_steps=300, growth_bytes=GROWTH_BYTES)
