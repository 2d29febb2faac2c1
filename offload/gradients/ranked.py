"""Intake of one rank among several: gradients are averaged over the ranks before they go home.

Owns: what of a partition waits to be averaged, and what its home holds of this step.
Does not: decide when a partition is due (agreement.py) or talk to other ranks (exchange.py).
Threads: as GradientIntake.

Note [Whole partitions]: every rank must send every element, so a partition is averaged whole, with zeros where a rank
has no gradient. What a home holds after that is right for all its entries; which of them have a gradient at all is
what the ranks agree on when a backward ends. Until a partition is due its gradients wait in its slot; where the slot
is needed by others, they are set aside in memory of their own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from offload.gradients.agreement import Agreement
from offload.gradients.intake import GradientIntake, OpenSlot
from offload.gradients.offload import GradientOffload
from offload.memory.ring import Ring
from offload.ranks.exchange import ShardExchange
from offload.runtime import Runtime


class RankedIntake(GradientIntake):
    """Takes gradients over from autograd, and averages them."""

    def __init__(
        self,
        runtime: Runtime,
        gradient_offload: GradientOffload,
        ring: Ring,
        *,
        exchange: ShardExchange,
        options: Callable[[], str],
    ) -> None:
        """`options`: what the ranks must be alike in when they step."""
        super().__init__(runtime, gradient_offload, ring)
        self._exchange = exchange
        self._options = options
        self._agreement = Agreement(exchange.ranks, self._partitions)
        self._held: list[set[int]] = [set() for _ in self._partitions]
        """Entries whose home holds values of this step: averages that offloaded, zeros among them."""
        self._aside: dict[int, dict[int, Tensor]] = {}
        """By partition: gradients that wait outside a slot, by position."""

    # ------------------------------------------------------------------------------------------- in backward

    def released(self, pid: int) -> None:
        if self._agreement.released(pid):
            self._send(pid)

    def end_backward(self) -> None:
        self._num_accumulated.clear()
        for pid in self._agreement.end_backward():
            self._send(pid)
        self._agree("end a backward")
        self.hand_out()

    def _agree(self, what: str, details: str = "") -> None:
        """Average what some rank still has, and learn which entries have a gradient on any."""
        waiting, united = self._agreement.unite(self._open.keys() | self._aside.keys(), what, details)
        for pid in waiting:
            self._send(pid)
        for pid, positions in united.items():
            self._offloaded[pid] |= positions

    def _count(self, pid: int) -> None:
        """What is complete on one rank may not be on another: nothing follows from it."""

    def _take(self, pid: int, position: int, gradient: Tensor | None) -> None:
        self._check_layout(pid, position, gradient)
        slot = self._open.get(pid)
        if slot is None:
            slot = self._open[pid] = self._begin_slot(pid)
        view = slot.views[position]
        if position in slot.arrived:
            if gradient is not None:
                view.add_(gradient)
        elif gradient is None:
            view.zero_()
        else:
            view.copy_(gradient)
        slot.arrived.add(position)
        self._agreement.arrived(pid, (position,))

    def _begin_slot(self, pid: int) -> OpenSlot:
        slot = super()._begin_slot(pid)
        for position, values in self._aside.pop(pid, {}).items():
            slot.views[position].copy_(values)
            slot.arrived.add(position)
        return slot

    def _make_room(self, pid: int) -> None:
        """A slot that others need: what is in it is set aside."""
        slot = self._open.pop(pid)
        self._aside[pid] = {position: slot.views[position].clone() for position in sorted(slot.arrived)}
        self._timeline.count("gradients set aside", len(slot.arrived))
        slot.lease.release(mark=self._device.compute.record())
        slot.issued.resolve()

    @torch.no_grad()
    def _send(self, pid: int) -> None:
        """A partition's gradients are averaged and go home; see Note [Whole partitions]."""
        slot = self._open.pop(pid, None) or self._begin_slot(pid)
        entries = self._partitions[pid].trainable.entries
        for position in range(len(entries)):
            if position not in slot.arrived:
                slot.views[position].zero_()
        ready = self._device.compute.record()
        flat = self._partitions[pid].trainable
        whole = slot.lease.bytes[: flat.numel * self._dtype.itemsize]
        averaged = self._exchange.average(self._partitions[pid].name, whole, ready)
        everything = set(range(len(entries)))
        self._gradient_offload.submit(
            pid, everything, self._held[pid], slot.lease.bytes, averaged, slot.lease, slot.issued
        )
        self._held[pid] = everything

    # ----------------------------------------------------------------------------------------------- placeholder gradients

    def collect_for_step(self) -> list[set[int]]:
        self.begin_backward()
        self._agree("collect the gradients of a step", f" with {self._options()}")
        return [set(offloaded) for offloaded in self._offloaded]

    def _dropped(self, pid: int, position: int) -> None:
        """The user has dropped a gradient: the next one overwrites it. Zeros beside it need no keeping either."""
        self._agreement.dropped(pid, position)
        self._offloaded[pid].discard(position)
        self._held[pid].discard(position)
        if not self._offloaded[pid]:
            self._held[pid] = set()
