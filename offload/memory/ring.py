"""Rings of staging buffers: a limited supply of equal buffers, lent in order.

Owns: which staging buffer the next lease gets and what its taker must wait for.
Does not: allocate (memory/region.py) or size (placement/plan.py).
Threads: one ring is leased from by one lane; a lease may be given back from any thread.

Note [Ring order]: lease k gets staging buffer k modulo n, so it waits for lease k - n and for nothing else. Which staging buffer serves
what is a function of program order, never of timing. A lease names at once the unit that will give it back
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
    """The right to one staging buffer; given back exactly once."""

    __slots__ = ("_after", "_mark", "_released", "bytes", "released_by")

    def __init__(self, buffer: Tensor, released_by: "Future[Any]") -> None:
        self.bytes = buffer
        self.released_by = released_by
        self._released = False
        self._after: Future[Any] | None = None
        self._mark: Mark | None = None

    def release(self, after: "Future[Any] | None" = None, *, mark: Mark | None = None) -> None:
        """Hand the staging buffer back; its next user may write to it once `after` is done and `mark` is reached."""
        if self._released:
            raise InternalError(f"a staging buffer was given back twice (lease until {self.released_by.name!r}).")
        self._released, self._after, self._mark = True, after, mark

    @property
    def released(self) -> bool:
        """Whether it has been given back."""
        return self._released

    @property
    def after(self) -> "Future[Any] | None":
        """What its next user waits for."""
        return self._after

    @property
    def mark(self) -> Mark | None:
        """What the queue waits for on which its next user writes: a staging buffer on the device."""
        return self._mark


class Ring:
    """Equal staging buffers of one buffer, lent round and round."""

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
        """How many can be lent at once."""
        return len(self._buffers)

    def acquire(self, released_by: "Future[Any]", *, written_on: ComputeQueue | None = None) -> Lease:
        """The next staging buffer; waits until its last user has let it go. `released_by`: the unit that gives it back.

        `written_on`: what its taker writes with, for staging buffers given back with a mark. Where that is a stream, the stream
        waits for the mark: this thread waits for nothing that the device does.
        """
        if not self._buffers:
            raise InternalError(f"ring {self.name!r} has no staging buffers, yet {released_by.name!r} needs one.")
        self._lanes.declare(writes=[("ring", self.name, 0, 1)])
        if len(self._lent) == len(self._buffers):
            oldest = self._lent.popleft()
            # Without this the staging buffer may still hold what a unit submitted earlier has not even begun to use.
            self._lanes.wait(oldest.released_by, Reason.BUFFER_RELEASED)
            if oldest.after is not None:
                # Without this a copy or write still reads the staging buffer: half of two chunks would reach the device or disk.
                self._lanes.wait(oldest.after, Reason.BUFFER_FREE)
            if oldest.mark is not None and written_on is not None:
                # Without this a staging buffer is overwritten while it is still copied: parts of two gradients land as one.
                written_on.after(oldest.mark, Reason.BUFFER_FREE)
            else:
                self._lanes.declare(reclaims=[oldest.bytes])  # where a stream waits, nobody here knows when
        lease = Lease(self._buffers[self._num_leases % len(self._buffers)], released_by)
        self._num_leases += 1
        self._lent.append(lease)
        return lease

    def close(self) -> None:
        """Let go of the buffer, so that its owner can free it."""
        self._buffers.clear()
        self._lent.clear()
