"""Where the chunks of one kind of data are at home, and what may touch them when.

Owns: the place of every chunk (memory or extent) and the future of its last write.
Does not: decide the tier (placement/plan.py), allocate, or move bytes.
Threads: places are fixed when made; `written` is set by the lane that writes and read by lanes ordered after it.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from offload.concurrency.futures import Future
from offload.disk.layout import Extent
from offload.units import Tier


@dataclass(slots=True, eq=False)
class Wanted:
    """A fetch waits for the next weights of a chunk on disk: the step hands them over, and nobody reads them back."""

    place: Tensor
    """uint8 memory that holds the chunk."""
    asked: "Future[Any]"
    """Kept: the place is free since."""
    filled: bool = False
    """Set by the step, before its future is kept."""


@dataclass(slots=True, eq=False)
class Home:
    """The place of one chunk of one kind of data."""

    tier: Tier
    bytes: Tensor | None
    """uint8 memory on the host or the device; None on disk."""
    extent: Extent | None
    """Where it is on disk; None in memory."""
    written: "Future[Any] | None" = None
    """The last write to `extent`: read it only after that."""
    wanted: Wanted | None = None
    """Of weights on disk: set and cleared by the lane `fetch read`, looked at by `step`."""
    zeros_from: int | None = None
    """Bytes of the record from here on are zeros that were never written: moments before their first step."""

    @property
    def stored(self) -> Extent:
        """What of the extent has been written."""
        assert self.extent is not None
        if self.zeros_from is None:
            return self.extent
        return Extent(self.extent.file_index, self.extent.offset, self.zeros_from)


@dataclass(slots=True, eq=False)
class Chunk:
    """A run of a shard's elements: the unit of homes, of state streaming and of kernels."""

    partition_id: int
    trainable: bool
    index: int
    start: int
    """First element, in the flat."""
    stop: int

    @property
    def numel(self) -> int:
        """Elements in the chunk."""
        return self.stop - self.start
