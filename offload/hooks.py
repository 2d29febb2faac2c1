"""Hooks on modules: when a partition's weights are needed, and when no longer.

Owns: every hook handle on the user's modules, the calls that are still needed by a backward.
Does not: fetch (weights/) or take gradients (gradients/).
Threads: forward on the training thread, backward on autograd's; never two at once.

Note [Calls]: the outermost module of a partition that is being called makes one *call*. It holds the partition during
forward (also while recomputing). If something it returns requires grad, a hook there acquires the partition again
before the call's backward, and a hook on a view of its inputs releases it after. What those do not release (inputs
that need no gradient, an input the module ignores) is released once all its gradients are finished, or when the
graph task ends. Views, not autograd functions, stand for the inputs, so that a module may change its input in place.
"""

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from offload.errors import UnsupportedModelError
from offload.gradients.intake import GradientIntake
from offload.partition import Partition
from offload.weights.fetch import WeightFetcher


class Call:
    """One call of a partition's outermost module."""

    __slots__ = ("covered", "inputs_left", "module", "num_inputs", "pids", "task", "versions")

    def __init__(self, module: nn.Module, pids: tuple[int, ...], versions: tuple[int, ...]) -> None:
        self.module = module
        self.pids = pids
        self.versions = versions
        self.covered = False
        """Recomputed inside a node of a backward that holds its partitions longer: it needs no hooks of its own."""
        self.num_inputs = 0
        self.inputs_left = 0
        self.task = -1


class ModuleHooks:
    """Acquires and releases partitions as the model runs."""

    def __init__(
        self,
        model: nn.Module,
        partitions: Sequence[Partition],
        *,
        fetcher: WeightFetcher,
        intake: GradientIntake,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._model = model
        self._partitions = partitions
        self._fetcher = fetcher
        self._intake = intake
        self._dtype = dtype
        self._device = device
        self._depth = [0] * len(partitions)
        self._calls: list[Call] = []
        self._held: dict[int, dict[Call, None]] = {}
        """By graph task: calls whose partitions a backward holds."""
        self._broken = False
        """A backward ended by an exception, and no forward or step has begun since."""
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Register every hook, each as a black box to torch.compile: one graph per block, no breaks inside."""
        self._intake.when_complete(self._gradients_complete)
        opaque: Callable[[Any], Any] = torch.compiler.disable  # not at import: it brings in the whole of torch.compile
        self._handles.append(
            self._model.register_forward_pre_hook(opaque(self._cast_inputs), prepend=True, with_kwargs=True)
        )
        pids_of: dict[nn.Module, list[int]] = {}
        for partition in self._partitions:
            for module in partition.modules:
                pids_of.setdefault(module, []).append(partition.id)
        for module, pids in pids_of.items():
            before = opaque(partial(self._pre_forward, tuple(pids)))
            after = opaque(partial(self._post_forward, tuple(pids)))
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after, always_call=True))

    def detach(self) -> None:
        """Remove every hook."""
        while self._handles:
            self._handles.pop().remove()

    def recover(self) -> None:
        """Forget a forward or backward that ended by an exception; nothing to do otherwise."""
        if torch._C._current_graph_task_id() != -1:
            return
        if self._held or self._broken:
            if self._held:
                self._intake.abandon()
            self._held.clear()
            self._broken = False
            self._fetcher.reset()
            self._depth = [0] * len(self._partitions)
            self._calls.clear()

    # ----------------------------------------------------------------------------------------------- forward

    def _cast_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)

        return _mapped(args, cast), _mapped(kwargs, cast)

    def _pre_forward(self, pids: tuple[int, ...], module: nn.Module, args: Any, kwargs: Any) -> Any:
        outermost = [pid for pid in pids if self._depth[pid] == 0]
        if not outermost:
            for pid in pids:
                self._depth[pid] += 1
            return None
        if not self._calls:
            self.recover()
        acquired = []
        try:
            for pid in outermost:
                self._fetcher.acquire(pid)
                acquired.append(pid)
        except BaseException:
            # The forward hook runs in spite of this error: it must find the counts that it will lower.
            for pid in acquired:
                self._fetcher.release(pid)
            for pid in pids:
                self._depth[pid] += 1
            raise
        for pid in pids:
            self._depth[pid] += 1
        call = Call(module, tuple(outermost), tuple(self._partitions[pid].version for pid in outermost))
        self._calls.append(call)
        # A view would group the gradients of a tensor that a block uses several times: other bits than without.
        call.covered = self._backward_holds(call.pids)
        if call.covered or not torch.is_grad_enabled():
            return None
        views: dict[int, Tensor] = {}

        def view(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            made = views.get(id(tensor))
            if made is None:  # one view per tensor: modules compare their inputs by identity
                made = views[id(tensor)] = tensor.view_as(tensor)
                assert made.grad_fn is not None
                made.grad_fn.register_hook(partial(self._input_done, call))
                call.num_inputs += 1
            return made

        return _mapped(args, view), _mapped(kwargs, view)

    def _post_forward(self, pids: tuple[int, ...], module: nn.Module, args: Any, output: Any) -> None:
        for pid in pids:
            self._depth[pid] -= 1
        if not self._calls or self._calls[-1].module is not module or any(self._depth[p] for p in self._calls[-1].pids):
            return
        call = self._calls.pop()
        if torch.is_grad_enabled() and not call.covered:
            hooked: set[int] = set()
            for tensor in _tensors(output):
                if tensor.requires_grad and id(tensor) not in hooked:
                    hooked.add(id(tensor))
                    tensor.register_hook(partial(self._before_backward, call))
        for pid in call.pids:
            self._fetcher.release(pid)

    # ---------------------------------------------------------------------------------------------- backward

    def _before_backward(self, call: Call, gradient: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if call.task == task:
            return
        if torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"double backward (create_graph=True) through {type(call.module).__name__} is not supported: its "
                "weights leave the device after the first backward. Run this part of the loss outside offload.enable."
            )
        for pid, version in zip(call.pids, call.versions, strict=True):
            partition = self._partitions[pid]
            if partition.version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"the weights of {partition.name!r} are at version {partition.version}; expected version {version} "
                    "instead. The optimizer has stepped since this graph was built; run the forward again."
                )
        self._begin_task(task)
        call.task, call.inputs_left = task, call.num_inputs
        for pid in call.pids:
            self._fetcher.acquire(pid)
        self._held[task][call] = None

    def _backward_holds(self, pids: Sequence[int]) -> bool:
        """In a node of a running backward, and its tasks hold all of these: none is released before the node ends."""
        if not self._held or torch._C._current_graph_task_id() == -1:
            return False
        held = {pid for calls in self._held.values() for call in calls for pid in call.pids}
        return held.issuperset(pids)

    def _begin_task(self, task: int) -> None:
        if task in self._held:
            return
        if not self._held:
            self._intake.begin_backward()
        self._held[task] = {}
        ending = partial(self._end_task, task)
        Variable._execution_engine.queue_callback(ending)
        # After an exception no callback runs, but the engine drops it: the tickets must stand before the user's next
        # line, which may be zero_grad().
        weakref.finalize(ending, self._task_gone, task).atexit = False

    def _input_done(self, call: Call, *_: Any) -> None:
        call.inputs_left -= 1
        if call.inputs_left == 0:
            held = self._held.get(call.task)
            if held is not None and call in held:
                del held[call]
                self._release(call)

    def _gradients_complete(self, pid: int) -> None:
        """Calls without an input that needs a gradient end here: nothing of their backward is left."""
        if self._partitions[pid].frozen.entries:
            return  # a frozen weight may be needed until the task ends: nobody says when
        held = self._held.get(torch._C._current_graph_task_id(), {})
        for call in [call for call in held if call.num_inputs == 0 and call.pids == (pid,)]:
            del held[call]
            self._release(call)

    def _end_task(self, task: int) -> None:
        for call in self._held.pop(task, {}):
            self._release(call)
        if not self._held:
            self._intake.end_backward()

    def _task_gone(self, task: int) -> None:
        if task in self._held:
            self._broken = True
            self._end_task(task)

    def _release(self, call: Call) -> None:
        call.task = -1
        for pid in call.pids:
            self._fetcher.release(pid)


def _tensors(value: Any) -> list[Tensor]:
    """Tensors anywhere in dicts, sequences and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in _tensors(v)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for f in dataclasses.fields(value) for t in _tensors(getattr(value, f.name, None))]
    return []


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with `change` applied to every tensor; the very object where nothing changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        new = [_mapped(v, change) for v in value]
        if all(a is b for a, b in zip(new, value, strict=True)):
            return value
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    if type(value) is dict:
        return {k: _mapped(v, change) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not isinstance(value, dict):
        changes = {}
        for one in dataclasses.fields(value):
            before = getattr(value, one.name, None)
            after = _mapped(before, change)
            if after is not before and one.init:
                changes[one.name] = after
        return dataclasses.replace(value, **changes) if changes else value
    return value
