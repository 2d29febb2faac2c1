"""Gradient slots: the device memory in which the gradients of a partition are put together before they go home.

Owns: which partitions have a slot that is being filled, and the views of parameters in each slot.
Does not: know which gradients are in a slot (state.py), or decide when one is offloaded (reduction.py).
Threads: autograd's own thread during backward, else the training thread; never two at once.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from offload.concurrency.futures import Future
from offload.memory.region import typed
from offload.memory.ring import Lease, Ring
from offload.runtime import Runtime


@dataclass(frozen=True, slots=True, eq=False)
class GradientSlot:
    """A slot that is being filled, or was."""

    lease: Lease
    issued: "Future[Any]"
    """Of the unit that releases the lease."""
    views: list[Tensor]
    """Of every parameter, in its shape."""


class GradientSlots:
    """The slots that are being filled, at most one for each partition."""

    def __init__(self, runtime: Runtime, ring: Ring) -> None:
        self._partitions = runtime.partitions
        self._dtype = runtime.precision.dtype
        self._device = runtime.device
        self._lanes = runtime.lanes
        self._ring = ring
        self._open: dict[int, GradientSlot] = {}
        self._lent: deque[tuple[int, GradientSlot]] = deque()
        """The latest leases, as many as there are slots, oldest first."""
        self._views: dict[tuple[int, int], list[Tensor]] = {}
        self._when_needed: Callable[[int], None] = lambda pid: None

    def when_needed(self, callback: Callable[[int], None]) -> None:
        """`callback(pid)` closes the slot of a partition: the ring is about to lend it again."""
        self._when_needed = callback

    @property
    def partitions(self) -> AbstractSet[int]:
        """Those with a slot that is being filled. A view that changes."""
        return self._open.keys()

    def open(self, pid: int) -> GradientSlot:
        """The slot that a partition's gradients are copied to; another one where it has none."""
        slot = self._open.get(pid)
        if slot is None:
            slot = self._open[pid] = self._acquire(pid)
        return slot

    def close(self, pid: int) -> GradientSlot:
        """Nothing more is copied to the partition's slot: the caller hands it on, or releases it."""
        return self._open.pop(pid)

    def release(self, slot: GradientSlot) -> None:
        """What was in a closed slot has been copied elsewhere on the device."""
        slot.lease.release(mark=self._device.compute.record())
        slot.issued.resolve()

    def forget(self) -> None:
        """Drop the slots, and the staging buffers that their futures refer to, so that their memory can be freed.

        A graph that the user keeps alive reaches this object through its hooks.
        """
        self._open.clear()
        self._lent.clear()
        self._views.clear()

    def _acquire(self, pid: int) -> GradientSlot:
        if len(self._lent) == self._ring.num_buffers:
            oldest_pid, oldest = self._lent.popleft()
            if self._open.get(oldest_pid) is oldest:  # its slot is the next to be leased: Note [Ring order]
                self._when_needed(oldest_pid)
        issued = self._lanes.future(f"gradient {pid} issued")
        lease = self._ring.acquire(released_by=issued, written_on=self._device.compute)
        slot = GradientSlot(lease, issued, self._views_of(pid, lease.bytes))
        self._lent.append((pid, slot))
        return slot

    def _views_of(self, pid: int, memory: Tensor) -> list[Tensor]:
        """Made once for each slot: they cost more than the copies of small gradients."""
        key = (pid, memory.data_ptr())
        views = self._views.get(key)
        if views is None:
            flat = self._partitions[pid].trainable
            values = typed(memory[: flat.numel * self._dtype.itemsize], self._dtype)
            views = self._views[key] = [values[e.start : e.stop].view(e.shape) for e in flat.entries]
        return views
