"""What one gradient offload changes in a chunk: which segments overwrite its home, which add to it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from offload.gradients.chunks import GradientChunk, Whole, joined, update_of
from offload.storage.allocation import NO_MEMORY
from offload.storage.homes import Chunk, MemoryHome
from offload.units import Tier

ENTRIES = [0, 0, 2, 3, 3, 3]
"""Of six segments of ten elements each: entry 1 lies in another chunk."""


def chunk() -> GradientChunk:
    starts = np.arange(0, 60, 10)
    stops = starts + 10
    segments = np.arange(6)
    home = MemoryHome(Chunk(0, "block", True, 0, 0, 60), Tier.HOST, NO_MEMORY)
    whole = Whole(segments, joined(starts, stops, segments))
    return GradientChunk(home, np.array(ENTRIES), starts, stops, np.zeros(6), frozenset(ENTRIES), whole)


@given(st.sets(st.integers(0, 3)), st.sets(st.integers(0, 3)))
def test_what_arrives_overwrites_or_adds_and_nothing_else_moves(arrived: set[int], stored: set[int]) -> None:
    target = chunk()
    update = update_of(target, arrived, stored)
    coming = [number for number, entry in enumerate(ENTRIES) if entry in arrived]
    if update is None:
        assert not coming
        return
    assert update.first.tolist() == [number for number in coming if ENTRIES[number] not in stored]
    assert update.again.tolist() == [number for number in coming if ENTRIES[number] in stored]
    assert update.keeps_old == bool(stored & set(ENTRIES))
    elements = [element for low, high in update.runs for element in range(low, high)]
    assert elements == [element for number in coming for element in range(10 * number, 10 * number + 10)]


def test_the_usual_case_is_not_found_out_again() -> None:
    target = chunk()
    update = update_of(target, {0, 1, 2, 3}, {1})
    assert update is not None
    assert update.first is target.whole.segments
    assert update.runs is target.whole.runs
    assert target.whole.runs == [(0, 60)]
