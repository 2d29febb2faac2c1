"""Slots of several sizes in one block of device memory: what torch's allocator reserves in the schedule's order.

The allocator is a model (tests/doubles/best_fit.py); tests/gpu/test_sessions.py asks the real one.
"""

from collections.abc import Iterator

import pytest

from offload.weights.schedule import Fetch, Schedule
from tests.doubles.best_fit import MIB, BestFit

# Embedding and head, block (MiB), number of blocks: Llamas of 3, 3 (large vocabulary), 7 and 8 billion, and odd ones.
SHAPES = {
    "3b": (205, 227, 26), "3b, 128k words": (752, 192, 28), "7b": (250, 386, 32), "8b, 128k words": (1002, 416, 32),
    "all equal": (200, 200, 16), "small blocks": (600, 50, 24), "nearly equal": (300, 250, 20), "twice": (520, 250, 20),
}  # fmt: skip
NUM_STEPS = 8


def calls(num: int) -> Iterator[tuple[str, int]]:
    """Forward and backward."""
    for pid in [*range(num), *reversed(range(num))]:
        yield "acquire", pid
        yield "release", pid


def reserved(sizes: list[int], ring_bytes: int, first_bytes: int) -> list[int]:
    """After every step; `first_bytes` were reserved at the start."""
    schedule, memory = Schedule(dict(enumerate(sizes)), ring_bytes, ()), BestFit()
    memory.allocate(-1, first_bytes)
    memory.free(-1)
    after = []
    for _ in range(NUM_STEPS):
        for what, pid in calls(len(sizes)):
            for action in getattr(schedule, what)(pid):
                if isinstance(action, Fetch):
                    memory.allocate(action.pid, sizes[action.pid])
                else:
                    memory.free(action.pid)
        for action in schedule.step(set(range(len(sizes)))):
            if isinstance(action, Fetch):
                memory.allocate(action.pid, sizes[action.pid])
            else:
                memory.free(action.pid)
        after.append(memory.reserved_bytes)
    return after


@pytest.mark.parametrize("slots", [1, 2, 3, 3.5, 4, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_ring_and_one_more_slot_in_one_block_is_all_that_is_ever_reserved(shape: str, slots: float) -> None:
    outside, block, num_blocks = SHAPES[shape]
    sizes = [outside * MIB, *[block * MIB] * num_blocks, 8192, outside * MIB]
    ring_bytes = int(slots * max(sizes)) // (2 * MIB) * 2 * MIB
    if ring_bytes < max(sizes):
        ring_bytes = max(sizes) + max(sizes) % (2 * MIB)
    first_bytes = ring_bytes + max(sizes) + max(sizes) % (2 * MIB)
    assert set(reserved(sizes, ring_bytes, first_bytes)) == {first_bytes}


def test_the_ring_alone_is_not_enough_but_does_not_grow_for_ever() -> None:
    """Scenario: the bytes of two embeddings; blocks lie so that the free bytes between them do not join."""
    outside, block, num_blocks = SHAPES["3b, 128k words"]
    sizes = [outside * MIB, *[block * MIB] * num_blocks, 8192, outside * MIB]
    after = reserved(sizes, 2 * outside * MIB, 2 * outside * MIB)
    assert after[-1] > 2 * outside * MIB
    assert len(set(after[3:])) == 1
