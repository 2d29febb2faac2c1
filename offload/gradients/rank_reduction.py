"""Reduction among ranks: gradients are averaged over the ranks before they are offloaded.

Owns: what of a partition waits to be averaged, and what its home holds of this step.
Does not: decide when a partition is due (agreement.py) or talk to other ranks (ranks/exchange.py).
Threads: autograd's own thread during backward, else the training thread; never two at once.

Note [Whole partitions]: every rank must send every element, so a partition is averaged whole, with zeros where a rank
has no gradient. What a home holds after that is right for all its entries; which of them have a gradient at all is
what the ranks agree on when a backward ends. Until a partition is due its gradients wait in its slot; where the slot
is needed by others, they are set aside in memory of their own.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from offload.errors import InternalError
from offload.gradients.agreement import Agreement
from offload.gradients.offload import GradientOffload
from offload.gradients.slots import GradientSlot, GradientSlots
from offload.gradients.state import GradientTable
from offload.ranks.exchange import ShardExchange
from offload.runtime import Runtime


class RankReduction:
    """Of one rank among several."""

    is_local = False

    def __init__(
        self,
        runtime: Runtime,
        gradient_offload: GradientOffload,
        slots: GradientSlots,
        table: GradientTable,
        *,
        exchange: ShardExchange,
        options: Callable[[], str],
    ) -> None:
        """`options`: what the ranks must be alike in when they step."""
        self.table = table
        self._partitions = runtime.partitions
        self._dtype = runtime.precision.dtype
        self._compute = runtime.device.compute
        self._timeline = runtime.timeline
        self._gradient_offload = gradient_offload
        self._slots = slots
        self._exchange = exchange
        self._options = options
        self._agreement = Agreement(exchange.ranks, runtime.partitions)
        self._held: list[set[int]] = [set() for _ in runtime.partitions]
        """Entries whose home holds values of this step: averages that were offloaded, zeros among them."""
        self._aside: dict[int, dict[int, Tensor]] = {}
        """By partition: gradients that wait outside a slot, by position."""
        slots.when_needed(self._set_aside)

    def take(self, pid: int, position: int, gradient: Tensor | None) -> None:
        view = self._slot(pid).views[position]
        if position in self.table.filling(pid):
            if gradient is not None:
                view.add_(gradient)
            return
        self.table.arrive(pid, position)
        self._agreement.arrived(pid, (position,))
        if gradient is None:
            view.zero_()
        else:
            view.copy_(gradient)

    def settle(self) -> None:
        """`take` has copied all."""

    def drop(self, pid: int, positions: Sequence[int]) -> None:
        """The next gradients overwrite them. Zeros in the same home need no keeping either."""
        for position in positions:
            self._agreement.dropped(pid, position)
        self.table.drop(pid, positions)
        self._held[pid].difference_update(positions)
        if not self.table.stored(pid):
            self._held[pid] = set()

    def released(self, pid: int) -> None:
        if self._agreement.released(pid):
            self._average(pid)

    def offload_now(self, pid: int) -> None:
        raise InternalError(
            f"partition {pid} was to be offloaded before the ranks had averaged it; steps in backward need one rank."
        )

    def end_backward(self) -> None:
        for pid in self._agreement.end_backward():
            self._average(pid)
        self._agree("end a backward")

    def end_step(self) -> None:
        self._agree("collect the gradients of a step", f" with {self._options()}")

    def detach(self) -> None:
        self._aside.clear()
        self._slots.forget()

    def _agree(self, what: str, details: str = "") -> None:
        """Average what some rank still has, and learn which entries have a gradient on any."""
        waiting, united = self._agreement.unite(self._slots.partitions | self._aside.keys(), what, details)
        for pid in waiting:
            self._average(pid)
        self.table.agree(united)

    @torch.no_grad()
    def _average(self, pid: int) -> None:
        """A partition's gradients are averaged and offloaded; see Note [Whole partitions]."""
        slot = self._slot(pid)
        self._slots.close(pid)
        partition = self._partitions[pid]
        everything = set(range(len(partition.trainable.entries)))
        for position in sorted(everything - self.table.filling(pid)):
            slot.views[position].zero_()
        self.table.reduce(pid)
        whole = slot.lease.bytes[: partition.trainable.numel * self._dtype.itemsize]
        averaged = self._exchange.average(partition.name, whole, self._compute.record())
        self._gradient_offload.submit(pid, everything, self._held[pid], slot, averaged)
        self._held[pid] = everything

    # ------------------------------------------------------------------------------------------------ the slot

    def _slot(self, pid: int) -> GradientSlot:
        """The partition's slot, with what was set aside in it."""
        if pid in self._slots.partitions:
            return self._slots.open(pid)
        slot = self._slots.open(pid)
        for position, values in self._aside.pop(pid, {}).items():
            slot.views[position].copy_(values)
        return slot

    def _set_aside(self, pid: int) -> None:
        """Others need the slot of a partition that is not due yet."""
        slot = self._slots.close(pid)
        arrived = sorted(self.table.filling(pid))
        self._aside[pid] = {position: slot.views[position].clone() for position in arrived}
        self._timeline.count("gradients set aside", len(arrived))
        self._slots.release(slot)
