"""Rings of staging buffers: a limited supply of equal buffers, leased in order.

Owns: which staging buffer the next lease gets, and what is waited for before it is granted.
Does not: allocate (memory/region.py) or size (planning/plan.py).
Threads: one ring is leased from by one lane; a lease may be released from any thread.

Note [Ring order]: lease k gets staging buffer k modulo n, so it waits for lease k - n and for nothing else. Which
buffer serves what is a function of program order, never of timing. A lease names at once the unit that will release it
(`released_by`, submitted already or together with it), so waiting for it is waiting for an earlier number.
"""

from collections import deque
from typing import Any

from torch import Tensor

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Lanes, Reason
from offload.device.protocol import ComputeQueue, Mark
from offload.errors import InternalError


class Lease:
    """The right to one staging buffer; released exactly once."""

    __slots__ = ("after", "bytes", "mark", "released", "released_by")

    def __init__(self, buffer: Tensor, released_by: "Future[Any]") -> None:
        self.bytes = buffer
        self.released_by = released_by
        self.released = False
        self.after: Future[Any] | None = None
        """What the thread waits for that acquires the buffer next."""
        self.mark: Mark | None = None
        """What the queue waits for that writes to the buffer next, where it is on the device."""

    def release(self, after: "Future[Any] | None" = None, *, mark: Mark | None = None) -> None:
        """End the lease: the next one may write to the buffer once `after` is done and `mark` is reached."""
        if self.released:
            raise InternalError(f"a staging buffer was released twice (lease until {self.released_by.name!r}).")
        self.released, self.after, self.mark = True, after, mark


class Ring:
    """Equal staging buffers in one block of memory, leased round and round."""

    def __init__(self, name: str, memory: Tensor, *, buffer_bytes: int, num_buffers: int, lanes: Lanes) -> None:
        if memory.numel() != buffer_bytes * num_buffers:
            raise InternalError(
                f"ring {name!r}: {num_buffers} staging buffers of {buffer_bytes} bytes in {memory.numel()} bytes."
            )
        self.name = name
        self.buffer_bytes = buffer_bytes
        self._buffers = [memory[i * buffer_bytes : (i + 1) * buffer_bytes] for i in range(num_buffers)]
        self._lent: deque[Lease] = deque()
        self._num_leases = 0
        self._lanes = lanes

    @property
    def num_buffers(self) -> int:
        """How many can be leased at once."""
        return len(self._buffers)

    def acquire(self, released_by: "Future[Any]", *, written_on: ComputeQueue | None = None) -> Lease:
        """A lease of the next staging buffer; waits until the last one is over.

        `released_by`: the unit that will release it.
        `written_on`: the queue that writes to the buffer, for leases that are released with a mark. Where that is a
        stream, the stream waits for the mark: this thread waits for nothing that the device does.
        """
        if not self._buffers:
            raise InternalError(f"ring {self.name!r} has no staging buffers, yet {released_by.name!r} needs one.")
        self._lanes.declare(writes=[("ring", self.name, 0, 1)])
        if len(self._lent) == len(self._buffers):
            oldest = self._lent.popleft()
            # Without this the staging buffer may still hold what a unit submitted earlier has not even begun to use.
            self._lanes.wait(oldest.released_by, Reason.BUFFER_RELEASED)
            if oldest.after is not None:
                # Without this a copy or write still reads the buffer: half of two chunks would reach its destination.
                self._lanes.wait(oldest.after, Reason.BUFFER_FREE)
            if oldest.mark is not None and written_on is not None:
                # Without this the buffer is overwritten while it is still copied: parts of two gradients arrive as one.
                written_on.after(oldest.mark, Reason.BUFFER_FREE)
            else:
                self._lanes.declare(reclaims=[oldest.bytes])  # where a stream waits, nobody here knows when
        lease = Lease(self._buffers[self._num_leases % len(self._buffers)], released_by)
        self._num_leases += 1
        self._lent.append(lease)
        return lease

    def close(self) -> None:
        """Drop all views of the memory, so that its owner can free it."""
        self._buffers.clear()
        self._lent.clear()
