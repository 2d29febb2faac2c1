"""Page-locking: exactly the bytes that were asked for, every code looked at, nothing left locked."""

import itertools
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.device.page_lock import Borders, HostRegistration
from offload.errors import ConfigError
from tests.doubles.event_streams import FakeRuntime

ADDRESS, PART = 4096, 1000


def registration(runtime: FakeRuntime, borders: Borders | None = None) -> HostRegistration:
    return HostRegistration(runtime, borders or Borders(), part_bytes=PART)


def nothing_to_forget() -> None:
    raise AssertionError("no call was refused")


@given(num_bytes=st.integers(0, 5 * PART))
def test_the_parts_are_the_bytes_asked_for_and_all_are_unlocked(num_bytes: int) -> None:
    runtime = FakeRuntime()
    undo = registration(runtime).lock(ADDRESS, num_bytes, nothing_to_forget)
    assert sum(runtime.locked.values()) == num_bytes
    ends = [ADDRESS + sum(list(runtime.locked.values())[:i]) for i in range(len(runtime.locked))]
    assert list(runtime.locked) == ends
    assert all(0 < size <= PART for size in runtime.locked.values())
    undo()
    assert runtime.locked == {}


def test_a_refusal_names_the_code_unlocks_what_was_locked_and_clears_the_error() -> None:
    runtime, forgotten = FakeRuntime(refuses=2), []
    with pytest.raises(ConfigError, match=r"CUDA error 2 \(out of memory\).*lower host_memory"):
        registration(runtime).lock(ADDRESS, 4 * PART, lambda: forgotten.append(True))
    assert runtime.locked == {}
    assert forgotten == [True]


def test_memory_that_cannot_be_unlocked_is_told_and_the_rest_is_unlocked(caplog: pytest.LogCaptureFixture) -> None:
    runtime = FakeRuntime(unregister_code=700)
    undo = registration(runtime).lock(ADDRESS, 3 * PART, nothing_to_forget)
    with caplog.at_level(logging.WARNING, logger="offload"):
        undo()
    assert runtime.locked == {}
    assert len(caplog.records) == 3
    assert "700" in caplog.text


@given(start=st.integers(0, 3 * PART), num_bytes=st.integers(1, 3 * PART))
def test_no_copy_crosses_from_one_part_to_the_next(start: int, num_bytes: int) -> None:
    borders = Borders()
    undo = registration(FakeRuntime(), borders).lock(ADDRESS, 6 * PART, nothing_to_forget)
    cuts = borders.cut(ADDRESS + start, num_bytes)
    assert cuts[0][0] == 0
    assert cuts[-1][1] == num_bytes
    assert all(low < high for low, high in cuts)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(cuts))
    assert all((start + low) // PART == (start + high - 1) // PART for low, high in cuts)
    undo()
    assert borders.cut(ADDRESS + start, num_bytes) == [(0, num_bytes)]
