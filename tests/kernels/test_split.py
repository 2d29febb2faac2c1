"""Split masters."""

import numpy as np

from offload.kernels import split
from offload.kernels.workers import Workers
from tests.kernels import reference
from tests.kernels.patterns import count_wrong_kernel
from tests.kernels.values import SIZES, assert_same_bits, values_of


def test_every_one_of_the_four_billion_patterns_is_restored() -> None:
    kernel, size = count_wrong_kernel(), 2**26
    counts = np.zeros((64, 3), np.int64)

    def count(start: int, stop: int) -> None:
        for k in range(start, stop):
            kernel(k * size, (k + 1) * size, counts[k])

    with Workers(2) as workers:
        workers.run(count, 0, 64)
    assert not counts.any()


def test_numpy_agrees_on_every_upper_half_and_on_lower_halves_around_the_border() -> None:
    upper = np.arange(65_536, dtype=np.uint32) << np.uint32(16)
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    master = (upper[:, None] | lower).ravel().view(np.float32)
    ours = [np.zeros(master.size, np.uint16) for _ in range(2)]
    theirs = [np.zeros(master.size, np.uint16) for _ in range(2)]
    split.split_kernel()(master, *ours)
    reference.split(master, *theirs)
    for mine, their in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, their)
    joined, expected = np.zeros_like(master), np.zeros_like(master)
    split.join_kernel()(*ours, joined)
    reference.join(*theirs, expected)
    np.testing.assert_array_equal(joined.view(np.uint32), expected.view(np.uint32))
    canonical = np.where(np.isnan(master), np.uint32(0x7FC00000), master.view(np.uint32))
    np.testing.assert_array_equal(joined.view(np.uint32), canonical)


def test_state_tensors_of_every_size_are_split_and_joined_and_nothing_else_is_written(rng: np.random.Generator) -> None:
    for numel in SIZES:
        master = values_of(numel, "fp32", rng)
        weights, remainder = (np.full(numel + 2, 0xA5A5, np.uint16) for _ in range(2))
        split.split_kernel()(master, weights[1:-1], remainder[1:-1])
        assert {*weights[[0, -1]].tolist(), *remainder[[0, -1]].tolist()} == {0xA5A5}
        back = np.full(numel + 2, 7.0, np.float32)
        split.join_kernel()(weights[1:-1], remainder[1:-1], back[1:-1])
        assert_same_bits(back[1:-1], master)
        assert (back[[0, -1]] == 7.0).all()
