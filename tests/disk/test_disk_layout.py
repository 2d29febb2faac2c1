"""Extents never overlap, are aligned, and spread over the files by their shares."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.disk.layout import Extent, Layout
from offload.errors import InternalError


@given(
    sizes=st.lists(st.integers(0, 100_000), max_size=60),
    shares=st.lists(st.floats(0.1, 10), min_size=1, max_size=4),
)
def test_extents_tile_each_file_without_gap_or_overlap(sizes: list[int], shares: list[float]) -> None:
    layout = Layout(len(shares), shares)
    extents = [layout.allocate(size) for size in sizes]
    ends = [0] * len(shares)
    for size, extent in zip(sizes, extents, strict=True):
        assert extent.offset == ends[extent.file_index]
        assert size <= extent.num_bytes < size + 4096
        assert extent.offset % 4096 == extent.num_bytes % 4096 == 0
        ends[extent.file_index] += extent.num_bytes
    assert layout.bytes_by_file == tuple(ends)


def test_consecutive_extents_of_one_size_take_the_files_in_turn() -> None:
    layout = Layout(3)
    assert [layout.allocate(8192).file_index for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_files_fill_in_proportion_to_their_shares() -> None:
    layout = Layout(2, [3, 1])
    indices = [layout.allocate(4096).file_index for _ in range(400)]
    assert layout.bytes_by_file == (300 * 4096, 100 * 4096)
    # spread, not one file after the other: every stretch of four holds one extent of the smaller share
    assert all(sum(indices[i : i + 4]) == 1 for i in range(0, 400, 4))


def test_same_calls_give_the_same_layout() -> None:
    def make() -> list[Extent]:
        layout = Layout(3, [1, 2.5, 0.7])
        return [layout.allocate(size) for size in range(1, 200_000, 7777)]

    assert make() == make()


@pytest.mark.parametrize("wrong", [(0, 5, 4096), (0, 4096, 100), (-1, 0, 0), (0, -4096, 0), (0, 0, -4096)])
def test_an_extent_that_direct_io_would_refuse_cannot_be_made(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(InternalError):
        Extent(*wrong)


@pytest.mark.parametrize("wrong", [(0, None), (2, [1.0]), (2, [1.0, 0.0])])
def test_a_layout_needs_a_share_for_each_file(wrong: tuple[int, list[float] | None]) -> None:
    with pytest.raises(InternalError):
        Layout(*wrong)
