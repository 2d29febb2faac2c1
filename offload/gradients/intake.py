"""Intake: gradients from autograd into device slots, and placeholder gradients in their place.

Owns: which parameters have a gradient of this step, the gradient slots, the hooks on parameters.
Does not: carry gradients home (gradients/gradient offload.py).
Threads: autograd's own thread during backward, else the training thread; never two at once.

Note [Placeholder gradients]: after backward `p.grad` is a placeholder gradient. The next backward takes it back first: a gradient whose placeholder gradient is
gone was dropped by the user (`zero_grad()`), one whose placeholder gradient was zeroed counts as zeros, as in torch.

Note [One copy]: the gradients of the partition that is arriving wait as autograd made them, and are copied to a slot
together: one call for a partition instead of one for each parameter, and the slot is needed only then. At most one
partition waits so. When a gradient of another one comes, those that wait go to their slot, to stay there until the
rest has come.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Reason
from offload.errors import UnsupportedModelError
from offload.gradients.offload import GradientOffload
from offload.gradients.placeholder import PlaceholderGradient
from offload.memory.region import typed
from offload.memory.ring import Lease, Ring
from offload.model.partitions import Entry
from offload.runtime import Runtime


@dataclass(slots=True, eq=False)
class OpenSlot:
    """A gradient slot that is being filled."""

    lease: Lease
    issued: "Future[Any]"
    views: list[Tensor]
    """Of every parameter, in its shape."""
    arrived: set[int] = field(default_factory=set)


class GradientIntake:
    """Takes gradients over from autograd, and sends each home when its partition has all.

    When and how they go home is for a subclass to change (ranked.py): `released`, `end_backward`, `collect_for_step`,
    `_take`, `_count`, `_begin_slot`, `_make_room`, `_dropped`. Hooks and placeholder gradients are not.
    """

    def __init__(self, runtime: Runtime, gradient_offload: GradientOffload, ring: Ring) -> None:
        """`ring`: of gradient slots."""
        self._partitions = runtime.partitions
        self._gradient_offload = gradient_offload
        self._ring = ring
        self._num_slots = runtime.plan.gradient_slots
        self._dtype = runtime.precision.dtype
        self._device = runtime.device
        self._lanes = runtime.lanes
        self._timeline = runtime.timeline
        self._open: dict[int, OpenSlot] = {}
        self._views: dict[tuple[int, int], list[Tensor]] = {}
        self._recent: deque[tuple[int, OpenSlot]] = deque()
        """The latest slots lent, as many as there are, oldest first."""
        self._arriving = -1
        """The partition whose gradients wait for their copy (Note [One copy])."""
        self._waiting: dict[int, Tensor] = {}
        """These gradients, by position."""
        self._offloaded: list[set[int]] = [set() for _ in runtime.partitions]
        self._placeholders: dict[Entry, PlaceholderGradient] = {}
        self.handed_out = True
        """Parameters have their placeholder gradients, or what the user has put there."""
        self._handles: list[Any] = []
        self._num_accumulated: dict[tuple[int, int], int] = {}
        """By graph task and partition: parameters whose gradient that task has finished."""
        self.closed: set[int] = set()
        """Partitions that backward has stepped already: no gradient may come for them until `step()`."""
        self._when_complete: Callable[[int], None] = lambda pid: None
        self._when_begun: Callable[[], None] = lambda: None
        self._has_held: Callable[[int], bool] = lambda pid: True

    def when_complete(self, callback: Callable[[int], None]) -> None:
        """Call `callback(pid)` when a graph task has finished every trainable gradient of a partition."""
        self._when_complete = callback

    def when_begun(self, callback: Callable[[], None]) -> None:
        """Call `callback()` when a backward begins."""
        self._when_begun = callback

    def ask_held(self, has_held: Callable[[int], bool]) -> None:
        """`has_held(pid)` tells whether the backward under way holds a partition's weights, or has held them."""
        self._has_held = has_held

    def attach(self) -> None:
        """Register a hook on every trainable parameter; parameters outside the optimizer lose their gradients."""
        for partition in self._partitions:
            for position, entry in enumerate(partition.trainable.entries):
                take = partial(self._accumulated, partition.id, position)
                self._handles.append(entry.parameter.register_post_accumulate_grad_hook(take))
            for entry in partition.frozen.entries:
                if entry.parameter.requires_grad:
                    self._handles.append(entry.parameter.register_post_accumulate_grad_hook(self._drop))

    def detach(self) -> None:
        """Remove every hook and placeholder gradient."""
        while self._handles:
            self._handles.pop().remove()
        for entry, placeholder in self._placeholders.items():
            if entry.parameter.grad is placeholder:
                entry.parameter.grad = None
        self._placeholders.clear()
        self._views.clear()
        self._waiting.clear()

    # ------------------------------------------------------------------------------------------- in backward

    def begin_backward(self) -> None:
        """Take the placeholder gradients back: before the first gradient of a backward."""
        if torch._C._current_graph_task_id() != -1:
            self._when_begun()
        if self.handed_out:
            self.handed_out = False
            self._collect()

    def end_backward(self) -> None:
        """Send off what has arrived and put placeholder gradients in its place."""
        self._num_accumulated.clear()
        self._flush_all()
        self.hand_out()

    def released(self, pid: int) -> None:
        """A backward has released a partition."""

    def abandon(self) -> None:
        """A backward ended by an exception: what has arrived is offloaded, as torch keeps it."""
        self.end_backward()

    def send_off(self, pid: int) -> set[int]:
        """What of a partition has arrived goes home now; which of its entries have a gradient there or on its way."""
        self._settle()
        if pid in self._open:  # its slot was lent to others meanwhile, so it comes in parts
            self._flush(pid)
        return set(self._offloaded[pid])

    @property
    def last_offload(self) -> "Future[Any]":
        """The newest gradient offload."""
        return self._gradient_offload.last

    def _accumulated(self, pid: int, position: int, parameter: Tensor) -> None:
        if pid in self.closed:
            name = self._partitions[pid].trainable.entries[position].name
            raise UnsupportedModelError(
                f"another gradient arrived for {name!r} when backward had stepped it already (it is used by several "
                'reentrant checkpoints, perhaps). Use overlap="forward".'
            )
        gradient = parameter.grad
        if gradient is not None:
            parameter.grad = None
            if not self._has_held(pid):
                self._check_finite(pid, position, gradient)
            self._take(pid, position, gradient.detach() if torch.is_grad_enabled() else gradient)  # create_graph=True
        self._count(pid)

    def _check_finite(self, pid: int, position: int, gradient: Tensor) -> None:
        if not gradient.isfinite().all():
            name = self._partitions[pid].trainable.entries[position].name
            raise UnsupportedModelError(
                f"the gradient of {name!r} is not finite, and no module that owns this parameter was called: elsewhere "
                "it reads NaN. Call the module, or make the one that uses the parameter an owner, too: "
                "user.register_parameter(name, owner.weight) before offload.enable."
            )

    def _count(self, pid: int) -> None:
        key = (torch._C._current_graph_task_id(), pid)
        count = self._num_accumulated.get(key, 0) + 1
        if count < len(self._partitions[pid].trainable.entries):
            self._num_accumulated[key] = count
        else:
            self._num_accumulated.pop(key, None)
            self._when_complete(pid)

    def _drop(self, parameter: Tensor) -> None:
        parameter.grad = None
        self._timeline.count("gradients of parameters outside the optimizer")

    def _check_layout(self, pid: int, position: int, gradient: Tensor | None) -> None:
        if gradient is not None and gradient.layout is not torch.strided:
            name = self._partitions[pid].trainable.entries[position].name
            raise UnsupportedModelError(
                f"parameter {name!r} has a sparse gradient; build its embedding with sparse=False."
            )

    def _take(self, pid: int, position: int, gradient: Tensor | None) -> None:
        self._check_layout(pid, position, gradient)
        if pid != self._arriving:
            self._settle()
            self._arriving = pid
        slot = self._open.get(pid)
        if position in self._waiting or (slot is not None and position in slot.arrived):
            self._flush(
                pid
            )  # each contribution is offloaded on its own, so that sums do not depend on the number of slots
            slot = None
        if gradient is None:
            self._settle()
            slot = self._slot_of(pid)
            slot.views[position].zero_()
            slot.arrived.add(position)
        else:
            self._waiting[position] = gradient
        num_arrived = len(self._waiting) + (len(slot.arrived) if slot is not None else 0)
        if num_arrived == len(self._partitions[pid].trainable.entries):
            self._flush(pid)

    def _slot_of(self, pid: int) -> OpenSlot:
        slot = self._open.get(pid)
        if slot is None:
            slot = self._open[pid] = self._begin_slot(pid)
        return slot

    def _settle(self) -> None:
        """Copy what waits to its slot (Note [One copy])."""
        if self._waiting:
            gradients, self._waiting = self._waiting, {}
            slot = self._slot_of(self._arriving)
            torch._foreach_copy_([slot.views[position] for position in gradients], list(gradients.values()))
            slot.arrived.update(gradients)

    def _begin_slot(self, pid: int) -> OpenSlot:
        if len(self._recent) == self._num_slots:
            oldest_pid, oldest = self._recent.popleft()
            if self._open.get(oldest_pid) is oldest:
                # Its slot is the next to be lent (Note [Ring order]) and still waits for gradients: it is offloaded in parts.
                self._make_room(oldest_pid)
        issued = self._lanes.future(f"gradient {pid} issued")
        lease = self._ring.acquire(released_by=issued, written_on=self._device.compute)
        slot = OpenSlot(lease, issued, self._views_of(pid, lease.bytes))
        self._recent.append((pid, slot))
        return slot

    def _make_room(self, pid: int) -> None:
        """Others need the slot of a partition that still waits for gradients."""
        self._flush(pid)

    def _views_of(self, pid: int, memory: Tensor) -> list[Tensor]:
        """Made once for each slot: they cost more than the copies of small gradients."""
        key = (pid, memory.data_ptr())
        views = self._views.get(key)
        if views is None:
            flat = self._partitions[pid].trainable
            values = typed(memory[: flat.numel * self._dtype.itemsize], self._dtype)
            views = self._views[key] = [values[e.start : e.stop].view(e.shape) for e in flat.entries]
        return views

    def _flush_all(self) -> None:
        self._settle()
        for pid in list(self._open):
            self._flush(pid)

    def _flush(self, pid: int) -> None:
        if pid == self._arriving:
            self._settle()
        slot = self._open.pop(pid)
        offloaded = self._offloaded[pid]
        ready = self._device.compute.record()
        self._gradient_offload.submit(pid, slot.arrived, offloaded, slot.lease.bytes, ready, slot.lease, slot.issued)
        offloaded |= slot.arrived

    # ----------------------------------------------------------------------------------------------- placeholder gradients

    def collect_for_step(self) -> list[set[int]]:
        """Which entries of every partition have a gradient: what the step will consume. Takes the placeholder gradients back."""
        self.begin_backward()
        self._flush_all()
        return [set(offloaded) for offloaded in self._offloaded]

    def hand_out(self) -> None:
        """Put a placeholder gradient on every parameter that has a gradient."""
        self.handed_out = True
        for partition, offloaded in zip(self._partitions, self._offloaded, strict=True):
            for position in offloaded:
                entry = partition.trainable.entries[position]
                placeholder = self._placeholders.get(entry)
                if placeholder is None:
                    placeholder = self._placeholders[entry] = PlaceholderGradient.of(entry.parameter)
                entry.parameter.grad = placeholder

    @torch.no_grad()
    def _collect(self) -> None:
        for partition, offloaded in zip(self._partitions, self._offloaded, strict=True):
            for position, entry in enumerate(partition.trainable.entries):
                gradient = entry.parameter.grad
                placeholder = self._placeholders.get(entry)
                entry.parameter.grad = None
                if gradient is placeholder and placeholder is not None:
                    if placeholder.zeroed:
                        placeholder.zeroed = False
                        self._dropped(partition.id, position)
                        self._take(partition.id, position, None)
                    continue
                if position in offloaded:
                    self._dropped(partition.id, position)
                if gradient is not None:  # the user's own
                    self._take(partition.id, position, gradient)
        self._settle()  # what is the user's may be changed as soon as this returns

    def _dropped(self, pid: int, position: int) -> None:
        """The next gradient overwrites what is at home."""
        self._offloaded[pid].discard(position)

    def consumed(self, pid: int, by: Sequence["Future[Any]"]) -> None:
        """The step units `by` read the chunks of this partition's gradient: no gradient offload before them."""
        for target, future in zip(self._gradient_offload.chunks[pid], by, strict=True):
            target.consumed = future

    def wait_offloaded(self) -> None:
        """Wait for everything submitted (reading gradients outside a step)."""
        self._lanes.wait(self._gradient_offload.last, Reason.OFFLOADED)
