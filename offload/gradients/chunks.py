"""Chunks of gradients: their homes, their segments in the norm, and what one gradient offload changes in them.

Owns: the sums of squares of what each home holds, and which unit of work last used it.
Does not: move gradients (offload.py, on_device.py).
Threads: made once; `consumed` and `stored` belong to the training thread, `sums` to the lane that stores.
"""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from offload.concurrency.futures import Future
from offload.device.protocol import Mark
from offload.model.partitions import Partition, block_segments
from offload.storage.homes import Chunk, Home

Segments = np.ndarray[Any, Any]
"""(n,) int64: numbers of segments, or first or last elements of all."""

Runs = list[tuple[int, int]]
"""Elements from and to, relative to the chunk."""

NO_SEGMENTS: Final = np.empty(0, np.int64)


class Whole(NamedTuple):
    """What a gradient offload of all entries at once works on: the usual case, so it is found out only once."""

    segments: Segments
    runs: Runs


@dataclass(slots=True, eq=False)
class GradientChunk:
    """One chunk of a gradient: its home, and its share of the norm."""

    home: Home
    entries: Segments
    """(segments,) int64: which entry of the flat parameter each segment belongs to."""
    starts: Segments
    """(segments,) int64: first element, relative to the chunk. Cut at blocks: partitions.block_segments."""
    stops: Segments
    sums: np.ndarray[Any, Any]
    """(segments,) float64: sum of squares of what the home holds."""
    owners: frozenset[int]
    """The entries that reach into the chunk."""
    whole: Whole
    consumed: "Future[Any] | None" = None
    """The newest step unit that reads the home: no gradient offload submitted after it may begin before it is done."""
    stored: "Future[Any] | None" = None
    """The newest gradient offload."""
    read_by: Mark | None = None
    """After the newest step that reads the home on an accelerator. Set by that unit, before it is done."""
    name: str = field(init=False)
    """Of its gradient offloads."""

    def __post_init__(self) -> None:
        self.name = f"store gradient: {self.home.chunk.partition} chunk {self.home.chunk.index}"

    @property
    def chunk(self) -> Chunk:
        """The elements."""
        return self.home.chunk

    def sums_place(self) -> tuple[str, int, int, int]:
        """The sums of squares, for `Lanes.declare`."""
        chunk = self.home.chunk
        return ("sums", chunk.partition_id, chunk.start, chunk.numel)


class Update(NamedTuple):
    """What one gradient offload changes in the home of one chunk."""

    target: GradientChunk
    first: Segments
    """Segments that overwrite the home."""
    again: Segments
    """Segments that add to it."""
    keeps_old: bool
    """The home holds more of this step, which stays."""

    @property
    def runs(self) -> Runs:
        """Stretches that arrive, joined over padding but not over entries that stay."""
        if self.first is self.target.whole.segments:
            return self.target.whole.runs
        return joined(self.target.starts, self.target.stops, np.sort(np.concatenate([self.first, self.again])))


def gradient_chunk(partition: Partition, home: Home) -> GradientChunk:
    """The segments of one chunk: parameter by parameter, block by block, without padding."""
    chunk = home.chunk
    rows = [
        (index, a - chunk.start, b - chunk.start)
        for index, entry in enumerate(partition.trainable.entries)
        for a, b in block_segments(max(entry.start, chunk.start), min(entry.stop, chunk.stop))
        if a < b
    ]
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    entries, starts, stops = (np.ascontiguousarray(table[:, i]) for i in range(3))
    segments = np.arange(len(rows))
    return GradientChunk(
        home, entries, starts, stops, sums=np.zeros(len(rows)), owners=frozenset(entries.tolist()),
        whole=Whole(segments, joined(starts, stops, segments)),
    )  # fmt: skip


def update_of(target: GradientChunk, arrived: AbstractSet[int], stored: AbstractSet[int]) -> Update | None:
    """What the entries `arrived` change in a chunk whose home holds `stored` of this step; None: nothing."""
    coming, here = target.owners & arrived, target.owners & stored
    if not coming:
        return None
    if not here and len(coming) == len(target.owners):
        return Update(target, target.whole.segments, NO_SEGMENTS, keeps_old=False)
    chosen = np.isin(target.entries, np.fromiter(coming, np.int64))
    added = np.isin(target.entries, np.fromiter(coming & here, np.int64, len(coming & here)))
    return Update(target, np.flatnonzero(chosen & ~added), np.flatnonzero(added), keeps_old=bool(here))


def joined(starts: Segments, stops: Segments, segments: Segments) -> Runs:
    """Stretches of these segments, joined over padding but not over segments that are not among them."""
    runs: Runs = []
    previous = -1
    for segment in segments.tolist():
        low, high = int(starts[segment]), int(stops[segment])
        if runs and segment - 1 == previous:
            runs[-1] = (runs[-1][0], high)
        else:
            runs.append((low, high))
        previous = segment
    return runs
