"""Intake: gradients are taken from parameters as autograd makes them, and placeholder gradients put in their place.

Owns: the hooks on parameters, the placeholder gradients, which partitions a graph task has finished.
Does not: bring gradients to slots (reduction.py) or to their homes (offload.py).
Threads: autograd's own thread during backward, else the training thread; never two at once.

Note [Placeholder gradients]: after backward `p.grad` is a placeholder gradient. The next backward takes it back first:
a gradient whose placeholder is gone was dropped by the user (`zero_grad()`), one whose placeholder was zeroed counts as
zeros, as in torch.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from offload.concurrency.futures import Future
from offload.errors import UnsupportedModelError
from offload.gradients.offload import GradientOffload
from offload.gradients.placeholder import PlaceholderGradient
from offload.gradients.reduction import Reduction
from offload.gradients.state import GradientState
from offload.model.weak import weakly
from offload.runtime import Runtime

_GRAD: Final[Any] = torch.Tensor.grad
get_grad: Final = _GRAD.__get__
set_grad: Final = _GRAD.__set__


class GradientIntake:
    """Takes gradients over from autograd and from the user."""

    def __init__(self, runtime: Runtime, gradient_offload: GradientOffload, reduction: Reduction) -> None:
        self._partitions = runtime.partitions
        self._timeline = runtime.timeline
        self._gradient_offload = gradient_offload
        self._reduction = reduction
        self._table = reduction.table
        self._rows: list[tuple[list[nn.Parameter], list[PlaceholderGradient | None]]] = [
            ([entry.parameter for entry in p.trainable.entries], [None] * len(p.trainable.entries))
            for p in runtime.partitions
        ]
        """By partition: its trainable parameters, and the placeholder gradients that were made for them."""
        self.has_placeholders = True
        """Parameters have their placeholder gradients, or what the user has put there."""
        self._handles: list[Any] = []
        self._taking: dict[nn.Parameter, tuple[Callable[[Tensor], None], Any]] = {}
        """By trainable parameter: the hook that takes its gradient, and its handle."""
        self._num_accumulated: dict[tuple[int, int], int] = {}
        """By graph task and partition: parameters whose gradient that task has finished."""
        self._when_complete: Callable[[int], None] = lambda pid: None
        self._when_begun: Callable[[], None] = lambda: None
        self._has_held: Callable[[int], bool] = lambda pid: True

    def when_complete(self, callback: Callable[[int], None]) -> None:
        """Call `callback(pid)` when a graph task has finished every trainable gradient of a partition.

        Not among ranks: what is complete on one may not be on another.
        """
        self._when_complete = callback

    def when_begun(self, callback: Callable[[], None]) -> None:
        """Call `callback()` when a backward begins."""
        self._when_begun = callback

    def ask_held(self, has_held: Callable[[int], bool]) -> None:
        """`has_held(pid)` tells whether the backward under way holds a partition's weights, or has held them."""
        self._has_held = has_held

    def attach(self) -> None:
        """Register a hook on every trainable parameter; parameters outside the optimizer lose their gradients."""
        with torch._C.DisableTorchFunctionSubclass():  # they are placeholders, which tell of hooks of the user's
            for partition in self._partitions:
                for position, entry in enumerate(partition.trainable.entries):
                    take = weakly(self._accumulated, partition.id, position)
                    self._taking[entry.parameter] = take, entry.parameter.register_post_accumulate_grad_hook(take)
                for entry in partition.frozen.entries:
                    if entry.parameter.requires_grad:
                        self._handles.append(entry.parameter.register_post_accumulate_grad_hook(weakly(self._discard)))

    def stand_last(self, parameter: nn.Parameter) -> None:
        """The user has registered a hook on a parameter's gradient: it has to see the gradient before it is taken."""
        if parameter in self._taking:
            take, handle = self._taking[parameter]
            handle.remove()
            self._taking[parameter] = take, parameter.register_post_accumulate_grad_hook(take)

    def detach(self) -> None:
        """Remove every hook and placeholder gradient."""
        while self._taking:
            self._taking.popitem()[1][1].remove()
        while self._handles:
            self._handles.pop().remove()
        for parameters, placeholders in self._rows:
            for parameter, placeholder in zip(parameters, placeholders, strict=True):
                if placeholder is not None and parameter.grad is placeholder:
                    parameter.grad = None
        self._rows.clear()
        self._reduction.detach()

    # ------------------------------------------------------------------------------------------- in backward

    def begin_backward(self) -> None:
        """Take the placeholder gradients back: before the first gradient of a backward."""
        if torch._C._current_graph_task_id() != -1:
            self._when_begun()
        if self.has_placeholders:
            self.has_placeholders = False
            self._take_placeholders_back()

    def end_backward(self) -> None:
        """Offload what has arrived and put placeholder gradients in its place."""
        self._num_accumulated.clear()
        self._reduction.end_backward()
        self.attach_placeholders()

    def released(self, pid: int) -> None:
        """A backward has released a partition."""
        self._reduction.released(pid)

    def abandon(self) -> None:
        """A backward ended by an exception: what has arrived is offloaded, as torch keeps it."""
        self.end_backward()

    def offload_now(self, pid: int) -> set[int]:
        """Offload what of a partition has arrived; which of its entries have a gradient in its home, or on its way."""
        self._reduction.offload_now(pid)
        return set(self._table.stored(pid))

    def close(self, pid: int) -> None:
        """A step in backward has taken the partition's gradient: none may come for it before `reopen`."""
        self._table.consume(pid)

    def reopen(self) -> None:
        """`step()` has taken over the steps in backward."""
        self._table.reopen()

    @property
    def last_offload(self) -> "Future[Any]":
        """The newest gradient offload."""
        return self._gradient_offload.last

    def _accumulated(self, pid: int, position: int, parameter: Tensor) -> None:
        """The hook: a graph task has finished the gradient of a parameter."""
        if self._table.state(pid, position) is GradientState.CONSUMED:
            raise UnsupportedModelError(
                f"another gradient arrived for {self._name(pid, position)!r} when backward had stepped it already (it "
                'is used by several reentrant checkpoints, perhaps). Use overlap="forward".'
            )
        gradient = parameter.grad
        if gradient is not None:
            parameter.grad = None
            if self.has_placeholders:  # nothing of the model was called, nor read: a C++ operator brings a gradient
                self.begin_backward()
            if not self._has_held(pid):
                self._check_finite(pid, position, gradient)
            self._take(pid, position, gradient.detach() if torch.is_grad_enabled() else gradient)  # create_graph=True
        if self._reduction.is_local:
            self._count(pid)

    def _count(self, pid: int) -> None:
        key = (torch._C._current_graph_task_id(), pid)
        count = self._num_accumulated.get(key, 0) + 1
        if count < len(self._partitions[pid].trainable.entries):
            self._num_accumulated[key] = count
        else:
            self._num_accumulated.pop(key, None)
            self._when_complete(pid)

    def _discard(self, parameter: Tensor) -> None:
        parameter.grad = None
        self._timeline.count("gradients of parameters outside the optimizer")

    def _take(self, pid: int, position: int, gradient: Tensor) -> None:
        if gradient.layout is not torch.strided:
            raise UnsupportedModelError(
                f"parameter {self._name(pid, position)!r} has a sparse gradient; build its embedding with sparse=False."
            )
        self._reduction.take(pid, position, gradient)

    def _check_finite(self, pid: int, position: int, gradient: Tensor) -> None:
        if gradient.isnan().any():
            raise UnsupportedModelError(
                f"the gradient of {self._name(pid, position)!r} has NaN, and no module that owns this parameter was "
                "called. Code that bypasses Python (a C++ operator that keeps the parameter) reads NaN there. Call the "
                "module, or give that code parameter.detach() or parameter.clone()."
            )

    def _name(self, pid: int, position: int) -> str:
        return self._partitions[pid].trainable.entries[position].name

    # --------------------------------------------------------------------------------- placeholder gradients

    def attach_placeholders(self) -> None:
        """Put a placeholder gradient on every parameter that has a gradient."""
        self.has_placeholders = True
        # Parameters are placeholders too: torch's own accessors, and nothing is asked of their class.
        with torch._C.DisableTorchFunctionSubclass():
            for pid, (parameters, placeholders) in enumerate(self._rows):
                for position in self._table.stored(pid):
                    placeholder = placeholders[position]
                    if placeholder is None:
                        placeholder = placeholders[position] = PlaceholderGradient.of(parameters[position])
                    set_grad(parameters[position], placeholder)

    @torch.no_grad()
    def _take_placeholders_back(self) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            for pid, (parameters, placeholders) in enumerate(self._rows):
                dropped: list[int] = []
                left: list[tuple[int, Tensor | None]] = []
                for position, parameter in enumerate(parameters):
                    gradient = get_grad(parameter)
                    if gradient is not None:
                        set_grad(parameter, None)
                        placeholder = placeholders[position]
                        if gradient is placeholder:
                            if not placeholder.zeroed:
                                continue
                            placeholder.zeroed = False
                            gradient = None
                        left.append((position, gradient))
                    dropped.append(position)
                self._take_back(pid, dropped, left)
        self._reduction.settle()  # what is the user's may be changed as soon as this returns

    def _take_back(self, pid: int, dropped: Sequence[int], left: Sequence[tuple[int, Tensor | None]]) -> None:
        """Parameters that no longer have their placeholder, and what the user has `left` in its place (None: zeros)."""
        stored = self._table.stored(pid)
        if stored and (gone := [position for position in dropped if position in stored]):
            self._reduction.drop(pid, gone)
        for position, gradient in left:
            if gradient is None:
                self._reduction.take(pid, position, None)
            else:
                self._take(pid, position, gradient)

    # ----------------------------------------------------------------------------------------------- for a step

    def collect_for_step(self) -> list[set[int]]:
        """Which entries of every partition have a gradient: what a step will consume. Takes the placeholders back."""
        self.begin_backward()
        self._reduction.end_step()
        return [set(self._table.stored(partition.id)) for partition in self._partitions]

    def consumed(self, pid: int, by: Sequence["Future[Any]"]) -> None:
        """The step units `by` read the chunks of this partition's gradient: no gradient offload before them."""
        for target, future in zip(self._gradient_offload.chunks[pid], by, strict=True):
            target.consumed = future

    def wait_stored(self) -> None:
        """Wait for everything submitted (reading gradients outside a step)."""
        self._gradient_offload.wait_stored()
