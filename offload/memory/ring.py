"""Rings of slabs: a limited supply of equal buffers, lent in order.

Owns: which slab the next lease gets and what its taker must wait for.
Does not: allocate (memory/region.py) or size (placement/plan.py).
Threads: one ring is leased from by one lane; a lease may be given back from any thread.

Note [Ring order]: lease k gets slab k modulo n, so it waits for lease k - n and for nothing else. Which slab serves
what is a function of program order, never of timing. A lease names at once the unit that will give it back
(`returned_by`, submitted already or together with it), so waiting for it is waiting for an earlier number.
"""

from collections import deque
from typing import Any

from torch import Tensor

from offload.device import ComputeQueue, Mark
from offload.errors import InternalError
from offload.lanes import Lanes, Promise, Reason


class Lease:
    """The right to one slab; given back exactly once."""

    __slots__ = ("_after", "_mark", "_returned", "bytes", "returned_by")

    def __init__(self, slab: Tensor, returned_by: "Promise[Any]") -> None:
        self.bytes = slab
        self.returned_by = returned_by
        self._returned = False
        self._after: Promise[Any] | None = None
        self._mark: Mark | None = None

    def give_back(self, after: "Promise[Any] | None" = None, *, mark: Mark | None = None) -> None:
        """Hand the slab back; its next user may write to it once `after` is done and `mark` is reached."""
        if self._returned:
            raise InternalError(f"a slab was given back twice (lease until {self.returned_by.name!r}).")
        self._returned, self._after, self._mark = True, after, mark

    @property
    def returned(self) -> bool:
        """Whether it has been given back."""
        return self._returned

    @property
    def after(self) -> "Promise[Any] | None":
        """What its next user waits for."""
        return self._after

    @property
    def mark(self) -> Mark | None:
        """What the queue waits for on which its next user writes: a slab on the device."""
        return self._mark


class SlabRing:
    """Equal slabs of one buffer, lent round and round."""

    def __init__(self, name: str, buffer: Tensor, *, slab_bytes: int, num_slabs: int, lanes: Lanes) -> None:
        if buffer.numel() != slab_bytes * num_slabs:
            raise InternalError(f"ring {name!r}: {num_slabs} slabs of {slab_bytes} bytes in {buffer.numel()} bytes.")
        self.name = name
        self.slab_bytes = slab_bytes
        self._slabs = [buffer[i * slab_bytes : (i + 1) * slab_bytes] for i in range(num_slabs)]
        self._lent: deque[Lease] = deque()
        self._num_leases = 0
        self._lanes = lanes

    @property
    def num_slabs(self) -> int:
        """How many can be lent at once."""
        return len(self._slabs)

    def lease(self, returned_by: "Promise[Any]", *, written_on: ComputeQueue | None = None) -> Lease:
        """The next slab; waits until its last user has let it go. `returned_by`: the unit that gives it back.

        `written_on`: what its taker writes with, for slabs given back with a mark. Where that is a stream, the stream
        waits for the mark: this thread waits for nothing that the device does.
        """
        if not self._slabs:
            raise InternalError(f"ring {self.name!r} has no slabs, yet {returned_by.name!r} needs one.")
        self._lanes.declare(writes=[("ring", self.name, 0, 1)])
        if len(self._lent) == len(self._slabs):
            oldest = self._lent.popleft()
            # Without this the slab may still hold what a unit submitted earlier has not even begun to use.
            self._lanes.wait(oldest.returned_by, Reason.SLAB_RETURNED)
            if oldest.after is not None:
                # Without this a copy or write still reads the slab: half of two pieces would reach the device or disk.
                self._lanes.wait(oldest.after, Reason.SLAB_FREE)
            if oldest.mark is not None and written_on is not None:
                # Without this a slab is overwritten while it is still copied: parts of two gradients land as one.
                written_on.after(oldest.mark, Reason.SLAB_FREE)
            else:
                self._lanes.reclaimed(oldest.bytes)  # of a slab that a stream waits for nobody here knows when
        lease = Lease(self._slabs[self._num_leases % len(self._slabs)], returned_by)
        self._num_leases += 1
        self._lent.append(lease)
        return lease

    def close(self) -> None:
        """Let go of the buffer, so that its owner can free it."""
        self._slabs.clear()
        self._lent.clear()
