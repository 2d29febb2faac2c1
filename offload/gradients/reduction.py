"""Reduction: what is done with the gradients that autograd has made, before and when they are offloaded.

Owns: the interface, and the reduction of a single rank: a partition is offloaded as soon as its slot is filled.
Does not: take gradients from parameters (intake.py), average over ranks (rank_reduction.py) or copy them home
(offload.py).
Threads: autograd's own thread during backward, else the training thread; never two at once.

Note [One copy]: the gradients of one partition wait as autograd made them, and are copied to a slot together: one call
for a partition instead of one for each parameter, and the slot is needed only then. When a gradient of another
partition comes, those that wait go to their slot, to stay there until the rest has come.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from offload.device.protocol import Device
from offload.gradients.offload import GradientOffload
from offload.gradients.slots import GradientSlots
from offload.gradients.state import GradientTable


class Reduction(Protocol):
    """Where the intake brings gradients."""

    table: GradientTable
    """The state of every gradient."""
    is_local: bool
    """What is complete on this rank is complete."""

    def take(self, pid: int, position: int, gradient: Tensor | None) -> None:
        """One contribution to the gradient of a parameter (None: zeros), which may be changed after `settle`."""

    def settle(self) -> None:
        """Copy what `take` has only noted."""

    def drop(self, pid: int, positions: Sequence[int]) -> None:
        """The user has dropped stored gradients of a partition: the next ones overwrite them."""

    def released(self, pid: int) -> None:
        """A backward has released a partition."""

    def offload_now(self, pid: int) -> None:
        """Offload what of a partition has arrived."""

    def end_backward(self) -> None:
        """Offload all that has arrived: a backward is over."""

    def end_step(self) -> None:
        """Offload all that has arrived: a step follows, or somebody reads gradients."""

    def detach(self) -> None:
        """The session ends: forget what has arrived, so that its memory can be freed."""


class LocalReduction:
    """Of a single rank: gradients are offloaded as they are."""

    is_local = True

    def __init__(
        self, gradient_offload: GradientOffload, slots: GradientSlots, table: GradientTable, device: Device
    ) -> None:
        self.table = table
        self._gradient_offload = gradient_offload
        self._slots = slots
        self._compute = device.compute
        self._waiting_pid = -1
        self._waiting: dict[int, Tensor] = {}
        """Gradients of that partition, by position, that are not in its slot yet: Note [One copy]."""
        slots.when_needed(self._offload)

    def take(self, pid: int, position: int, gradient: Tensor | None) -> None:
        if pid != self._waiting_pid:
            self.settle()
            self._waiting_pid = pid
        if position in self.table.filling(pid):
            # Each contribution is offloaded on its own, so that sums do not depend on the number of slots.
            self._offload(pid)
        self.table.arrive(pid, position)
        if gradient is None:
            self.settle()
            self._slots.open(pid).views[position].zero_()
        else:
            self._waiting[position] = gradient
        if self.table.is_filled(pid):
            self._offload(pid)

    def settle(self) -> None:
        if self._waiting:
            gradients, self._waiting = self._waiting, {}
            views = self._slots.open(self._waiting_pid).views
            torch._foreach_copy_([views[position] for position in gradients], list(gradients.values()))

    def drop(self, pid: int, positions: Sequence[int]) -> None:
        self.table.drop(pid, positions)

    def released(self, pid: int) -> None:
        """Nothing follows from it."""

    def offload_now(self, pid: int) -> None:
        self.settle()
        if pid in self._slots.partitions:  # its slot was leased to others meanwhile, so it comes in parts
            self._offload(pid)

    def end_backward(self) -> None:
        self.settle()
        for pid in list(self._slots.partitions):
            self._offload(pid)

    def end_step(self) -> None:
        self.end_backward()

    def detach(self) -> None:
        self._waiting.clear()
        self._slots.forget()

    def _offload(self, pid: int) -> None:
        """What has arrived of a partition goes home, whether or not it is all."""
        if pid == self._waiting_pid:
            self.settle()
        slot = self._slots.close(pid)
        arrived, stored = self.table.store(pid)
        self._gradient_offload.submit(pid, arrived, stored, slot, self._compute.record())
