"""Where each chunk of one kind of data is stored, and the order of the reads and writes of one place.

Owns: the place of every chunk (memory or an extent), the last write of every extent and what waits for it, the bytes of
a record that were never written, weights that a step gives to the fetch that waits for them.
Does not: decide the tier (planning/plan.py), allocate (allocation.py) or lend staging buffers (memory/ring.py).
Threads: places are fixed when made. A home is read and written by lanes that other waits have put in order: what is
remembered of a write is seen by every lane that comes after it.

Note [Order of an extent]: a transfer begins after the last write of its extent has ended. A read that is still under
way needs no such rule: whoever writes new bytes has used the old ones (the step, the gradient offload), or waits for
the fetch that copies them (WEIGHTS_READ). The wait is over a transfer that the disk queue already has, which waits for
nothing: so a lane may hold a staging buffer meanwhile, and no cycle of waits can form (Note [Waiting] in lanes.py).
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from torch import Tensor

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Lanes, Reason
from offload.disk.io_queue import TransferQueue
from offload.disk.layout import Extent
from offload.errors import InternalError
from offload.memory.region import bits
from offload.units import Tier


@dataclass(slots=True, eq=False)
class Chunk:
    """A run of a shard's elements: the unit of homes, of state streaming and of kernels."""

    partition_id: int
    partition: str
    """Name of the partition, for spans and errors."""
    trainable: bool
    index: int
    start: int
    """First element, in the flat parameter."""
    stop: int

    @property
    def numel(self) -> int:
        """Elements in the chunk."""
        return self.stop - self.start


class MemoryHome:
    """A chunk of one kind of data in memory of the host or of the device, where kernels and copies find it."""

    __slots__ = ("bytes", "chunk", "tier")

    def __init__(self, chunk: Chunk, tier: Tier, memory: Tensor) -> None:
        self.chunk = chunk
        self.tier = tier
        self.bytes = memory
        """uint8."""


@dataclass(slots=True, eq=False)
class _Awaited:
    """A fetch waits for the next weights of a chunk: the step copies them to its buffer, and nobody reads them back."""

    buffer: Tensor
    is_free: "Future[Any]"
    """Resolved when this was made."""
    is_filled: bool = False
    """Set by the step, before the future of its publication resolves."""


class DiskHome:
    """A chunk of one kind of data on disk: read and written through staging buffers."""

    __slots__ = ("_awaited", "_lanes", "_last_write", "_queue", "_zeros_from", "chunk", "extent")

    tier: Final = Tier.DISK

    def __init__(self, chunk: Chunk, extent: Extent, *, queue: TransferQueue, lanes: Lanes) -> None:
        self.chunk = chunk
        self.extent = extent
        self._queue = queue
        self._lanes = lanes
        self._last_write: Future[Any] | None = None
        self._zeros_from: int | None = None
        self._awaited: _Awaited | None = None
        """Set and cleared by the lane `fetch read`, looked at by `step`."""

    @property
    def bytes(self) -> Tensor:
        """Raises InternalError: there is no memory to work in."""
        raise InternalError(f"{self.chunk} is stored on disk and was used as if in memory: read it into a buffer.")

    @property
    def num_bytes(self) -> int:
        """Of the extent."""
        return self.extent.num_bytes

    @property
    def stored(self) -> Extent:
        """What of the extent has been written; all bytes behind it are zeros: moments before their first step."""
        if self._zeros_from is None:
            return self.extent
        return Extent(self.extent.file_index, self.extent.offset, self._zeros_from)

    @property
    def zeros_from(self) -> int | None:
        """Bytes from here on were never written and are zeros; None where all were."""
        return self._zeros_from

    @property
    def last_write(self) -> "Future[Any] | None":
        """The newest; None before the first."""
        return self._last_write

    def read(self, into: Tensor, name: str) -> "Future[Any]":
        """Fill `into` (uint8, page-aligned), which is as long as the extent or longer.

        Waits until the last write has ended. The buffer is kept alive until the future is done.
        """
        if self._last_write is not None:
            # Without this the read overtakes the write, and gets what was there before. Note [Order of an extent].
            self._lanes.wait(self._last_write, Reason.EXTENT_WRITTEN)
        stored, tail = into[: self.stored.num_bytes], into[self.stored.num_bytes : self.num_bytes]
        if tail.numel():
            self._lanes.declare(writes=[tail])
            tail.zero_()
        return self._queue.read(self.stored, stored, name)

    def read_published(self, into: Tensor, name: str, published: "Future[Any]") -> "Future[Any]":
        """As `read`, of the weights that `published` stands for.

        Waits for the publication. Where it is not there yet, the step itself copies the weights to `into`, which must
        be free when this is called, and nothing is read.
        """
        awaited = None
        if not published.done():
            awaited = self._awaited = _Awaited(into[: self.num_bytes], self._lanes.resolved("weights wanted"))
        try:
            # Without this last step's weights are read, or half of the new ones.
            self._lanes.wait(published, Reason.PUBLISHED)
        finally:
            self._awaited = None
        if awaited is not None and awaited.is_filled:
            return self._lanes.resolved("weights handed over")
        return self.read(into, name)

    def write(self, source: Tensor, name: str, *, zeros_from: int | None = None) -> "Future[Any]":
        """Write `source` (uint8, page-aligned, as long as the extent or longer), which is kept alive until it is done.

        `zeros_from`: bytes from here on are zeros, which are not written. A fetch that waits for these weights gets
        them at once. Waits until the last write has ended.
        """
        if self._awaited is not None:
            self._hand_over(self._awaited, source)
        if self._last_write is not None:
            # Without this two writes of one extent overtake each other. Note [Order of an extent].
            self._lanes.wait(self._last_write, Reason.EXTENT_WRITTEN)
        self._zeros_from = zeros_from
        self._last_write = self._queue.write(self.stored, source[: self.stored.num_bytes], name)
        return self._last_write

    def _hand_over(self, awaited: _Awaited, weights: Tensor) -> None:
        # Resolved long ago. Without this the buffer may still be copied from, by the fetch that had it before.
        self._lanes.wait(awaited.is_free, Reason.PLACE_FREE)
        with self._lanes.timeline.work("step", "hand over"):
            self._lanes.declare(reads=[weights], writes=[awaited.buffer])
            np.copyto(bits(awaited.buffer), bits(weights[: awaited.buffer.numel()]))
        awaited.is_filled = True


Home = MemoryHome | DiskHome
