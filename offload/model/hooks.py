"""Hooks on modules: when a partition's weights are needed, and when no longer.

Owns: every hook handle on the user's modules, the calls that are still needed by a backward.
Does not: fetch (weights/) or take gradients (gradients/).
Threads: forward on the training thread, backward on autograd's; never two at once.

Note [Calls]: the outermost module of a partition that is being called makes one *call*. It holds the partition during
forward (also while recomputing). If something it returns requires grad, a hook there acquires the partition again
before the call's backward. It is released by the first hook of the same graph task, on an input of a call or on an
output, that stands before the call in forward order (Note [Passed]). What no hook passes (the first call, whose inputs
need no gradient) is released once all its gradients are finished, or when the graph task ends. Nothing is inserted
into the graph: gradients are summed in torch's own order, and a module may change its input in place.

Note [Passed]: torch numbers the nodes of a graph in the order in which forward makes them, and of those that are ready
a backward runs the one with the greatest number first. A node is younger than all that it passes gradients to, so when
one runs, every younger node of the task has run: a call whose nodes are all younger than it is over.

Note [Recompute]: a backward that holds a partition may recompute others (a checkpoint around several blocks). Those
come one by one, and what is held meanwhile may lose its slot to them: the nodes of a held call do not run before the
recomputing is over.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.modules.batchnorm import _NormBase

from offload.errors import BudgetError, RankFailedError, SessionFailedError, UnsupportedModelError
from offload.model.nested import mapped, tensors_in
from offload.model.partitions import Partition


class WeightUses(Protocol):
    """Who brings weights to the device: weights/fetch.py."""

    def acquire(self, pid: int) -> None:
        """A use of a partition begins. Counted."""

    def release(self, pid: int) -> None:
        """A use ends."""

    def num_uses(self, pid: int) -> int:
        """How many are under way."""

    def reset(self) -> None:
        """All uses have ended, by an exception."""

    def check_weights(self, pid: int) -> None:
        """Raise ParameterWritten where a use that has just ended changed the weights."""

    @property
    def evaluating(self) -> bool:
        """Uses are those of a forward without gradients."""

    def begin(self, *, evaluating: bool) -> None:
        """A pass begins: a forward without gradients, or anything else."""

    def end_evaluation(self) -> None:
        """A forward without gradients has ended."""


class GradientEvents(Protocol):
    """Who takes gradients: gradients/intake.py."""

    def when_complete(self, callback: Callable[[int], None]) -> None:
        """Call `callback(pid)` when a graph task has finished every trainable gradient of a partition."""

    def ask_held(self, has_held: Callable[[int], bool]) -> None:
        """`has_held(pid)`: the backward under way holds a partition's weights, or has held them."""

    def begin_backward(self) -> None:
        """Before the first gradient of a backward."""

    def released(self, pid: int) -> None:
        """A backward has released a partition."""

    def end_backward(self) -> None:
        """After its last gradient."""

    def abandon(self) -> None:
        """A backward ended by an exception."""


class BackwardStepEvents(Protocol):
    """Who steps in backward: optimizer/in_backward.py."""

    def begin_backward(self) -> None:
        """A backward begins."""

    def check_use(self, pids: Sequence[int]) -> None:
        """Raise where a backward needs weights that it has already stepped."""

    def complete(self, pid: int) -> None:
        """Every gradient of a partition has arrived, and nothing uses its weights."""

    def abandon(self) -> None:
        """A backward ended by an exception."""


class Call:
    """One call of a partition's outermost module."""

    __slots__ = ("covered", "first_node", "has_inputs", "module", "pids", "suspended", "task", "versions")

    def __init__(self, module: nn.Module, pids: tuple[int, ...], versions: tuple[int, ...]) -> None:
        self.module = module
        self.pids = pids
        self.versions = versions
        self.covered = False
        """Recomputed inside a node of a backward that holds its partitions longer: it needs no hooks of its own."""
        self.first_node: int = torch._C._autograd._get_sequence_nr()
        """Number of the first autograd node that it may have made."""
        self.has_inputs = False
        """An input needs a gradient."""
        self.suspended = False
        """Held by a backward, but without its partitions: another call recomputes (Note [Recompute])."""
        self.task = -1


class ModuleHooks:
    """Acquires and releases partitions as the model runs."""

    def __init__(
        self,
        model: nn.Module,
        partitions: Sequence[Partition],
        *,
        fetcher: WeightUses,
        intake: GradientEvents,
        in_backward: BackwardStepEvents | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._model = model
        self._partitions = partitions
        self._fetcher = fetcher
        self._intake = intake
        self._in_backward = in_backward
        self._complete: set[int] = set()
        """Partitions of which every gradient of this backward has arrived."""
        self._dtype = dtype
        self._device = device
        self._depth = [0] * len(partitions)
        self._calls: list[Call] = []
        self._model_depth = 0
        """Calls of the outermost module under way."""
        self._held: dict[int, dict[Call, None]] = {}
        """By graph task: calls whose partitions a backward holds."""
        self._has_held: set[int] = set()
        """Partitions that this backward holds or has held."""
        self._broken = False
        """A backward ended by an exception, and no forward or step has begun since."""
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Register every hook, each as a black box to torch.compile: one graph per block, no breaks inside."""
        self._intake.when_complete(self._gradients_complete)
        self._intake.ask_held(self._has_held.__contains__)
        opaque: Callable[[Any], Any] = torch.compiler.disable  # not at import: it brings in the whole of torch.compile
        self._handles.append(self._model.register_forward_hook(opaque(self._leave_model), always_call=True))
        pids_of: dict[nn.Module, list[int]] = {}
        for partition in self._partitions:
            for module in partition.modules:
                pids_of.setdefault(module, []).append(partition.id)
        for module, pids in pids_of.items():
            before = opaque(partial(self._pre_forward, tuple(pids)))
            after = opaque(partial(self._post_forward, tuple(pids), [vars(inner) for inner in module.modules()]))
            # Hooks that are there already may use the weights (torch.nn.utils.weight_norm) and change the inputs.
            is_hooked = bool(module._forward_pre_hooks)
            self._handles.append(module.register_forward_pre_hook(before, prepend=is_hooked, with_kwargs=True))
            if is_hooked:
                changed = opaque(self._inputs_changed)
                self._handles.append(module.register_forward_pre_hook(changed, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after, always_call=True))
        enter = opaque(self._enter_model)  # before all others, of partitions too
        self._handles.append(self._model.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
        for module in self._model.modules():
            if isinstance(module, _NormBase) and module.running_mean is not None:
                self._widen(module, opaque)

    def _widen(self, norm: _NormBase, opaque: Callable[[Any], Any]) -> None:
        """Running statistics keep their dtype, and torch wants weight and bias in the same: fp32 copies, for a call."""
        assert norm.running_mean is not None
        wide = norm.running_mean.dtype
        if wide == self._dtype:
            return
        own: dict[str, nn.Parameter | None] = {}

        def before(module: nn.Module, args: Any) -> None:
            own.update(module._parameters)
            for name, parameter in own.items():
                module._parameters[name] = None if parameter is None else parameter.to(wide)  # type: ignore[assignment]

        def after(module: nn.Module, args: Any, output: Any) -> None:
            module._parameters.update(own)

        # Between acquire and release: it reads the weights.
        self._handles.append(norm.register_forward_pre_hook(opaque(before)))
        self._handles.append(norm.register_forward_hook(opaque(after), prepend=True, always_call=True))

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

    def _enter_model(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        evaluating = not torch.is_grad_enabled()
        # In a backward nothing is evaluated, but a forward that counted as evaluation may be recomputed (checkpoints).
        may_turn = torch._C._current_graph_task_id() == -1 or not evaluating
        turns = may_turn and (evaluating or self._fetcher.evaluating)
        if turns and self._model_depth == 0 and not self._calls:
            self._fetcher.begin(evaluating=evaluating)
        self._model_depth += 1

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)

        return mapped(args, cast), mapped(kwargs, cast)

    def _leave_model(self, *_: Any) -> None:
        self._model_depth -= 1
        if self._model_depth == 0 and self._fetcher.evaluating:
            self._fetcher.end_evaluation()

    def _begin_part(self) -> None:
        """A part of the model is called by itself: it counts as evaluation, or as training, like the calls before."""
        evaluating = not torch.is_grad_enabled()
        if evaluating != self._fetcher.evaluating and torch._C._current_graph_task_id() == -1:
            self._fetcher.begin(evaluating=evaluating)

    def _pre_forward(self, pids: tuple[int, ...], module: nn.Module, args: Any, kwargs: Any) -> Any:
        outermost = [pid for pid in pids if self._depth[pid] == 0]
        if not outermost:
            for pid in pids:
                self._depth[pid] += 1
            return None
        if not self._calls:
            self.recover()
            if self._model_depth == 0:
                self._begin_part()
        acquired: list[int] = []
        try:
            try:
                self._acquire(outermost, acquired)
            except BudgetError:
                if not self._suspend():
                    raise
                self._acquire(outermost, acquired)
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
        call.covered = self._backward_holds(call.pids)
        self._hook_inputs(call, (args, kwargs))

    def _inputs_changed(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._calls and self._calls[-1].module is module:
            self._hook_inputs(self._calls[-1], (args, kwargs))

    def _acquire(self, pids: Sequence[int], acquired: list[int]) -> None:
        if self._in_backward is not None and torch._C._current_graph_task_id() != -1:
            self._in_backward.check_use(pids)
        for pid in pids[len(acquired) :]:
            self._fetcher.acquire(pid)
            acquired.append(pid)

    def _hook_inputs(self, call: Call, inputs: Any) -> None:
        if call.covered or not torch.is_grad_enabled():
            return
        for tensor in tensors_in(inputs):
            if tensor.requires_grad:
                call.has_inputs = True
                if tensor.grad_fn is not None:  # accumulating into a leaf has no place in the order of nodes
                    tensor.register_hook(partial(self._passed, tensor.grad_fn._sequence_nr()))

    def _post_forward(
        self, pids: tuple[int, ...], attributes: Sequence[dict[str, Any]], module: nn.Module, args: Any, output: Any
    ) -> None:
        for pid in pids:
            self._depth[pid] -= 1
        if not self._calls or self._calls[-1].module is not module or any(self._depth[p] for p in self._calls[-1].pids):
            return
        call = self._calls.pop()
        if torch.is_grad_enabled() and not call.covered:
            # Also what modules leave on themselves, as losses of routers: backward may come there before the outputs.
            # (Not isinstance: it takes three times as long, for some hundred attributes of a block.)
            left = [value for own in attributes for value in own.values() if type(value) is Tensor]
            for tensor in (*tensors_in(output), *left):
                if tensor.requires_grad:
                    self._hook_output(call, tensor)
        for pid in call.pids:
            self._fetcher.release(pid)
        if not self._calls:
            self._resume()
        for pid in call.pids:
            self._fetcher.check_weights(pid)

    def _hook_output(self, call: Call, tensor: Tensor) -> None:
        """Also on the node behind a view: changed in place by the caller, a view gets another node and loses hooks."""
        node = tensor.grad_fn
        if node is not None and node._sequence_nr() >= call.first_node:  # else made before: an input, returned as it is
            tensor.register_hook(partial(self._before_backward, call, node._sequence_nr()))
        base = tensor._base if tensor._is_view() else None
        node = base.grad_fn if base is not None else None
        if node is not None and node._sequence_nr() >= call.first_node:
            node.register_prehook(partial(self._before_backward, call, node._sequence_nr()))

    # ---------------------------------------------------------------------------------------------- backward

    def _before_backward(self, call: Call, node: int, *_: Any) -> None:
        self._passed(node)
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
        call.task = task
        for pid in call.pids:
            self._fetcher.acquire(pid)
        self._has_held.update(call.pids)
        self._held[task][call] = None

    def _backward_holds(self, pids: Sequence[int]) -> bool:
        """In a node of a running backward, and its tasks hold all of these: none is released before the node ends."""
        if not self._held or torch._C._current_graph_task_id() == -1:
            return False
        held = {pid for calls in self._held.values() for call in calls for pid in call.pids}
        return held.issuperset(pids)

    def _suspend(self) -> bool:
        """Take the partitions of all held calls away while a module is recomputed; False where there are none."""
        if torch._C._current_graph_task_id() == -1:
            return False
        calls = [call for held in self._held.values() for call in held if not call.suspended]
        for call in calls:
            call.suspended = True
            for pid in call.pids:
                self._fetcher.release(pid)
        return bool(calls)

    def _resume(self) -> None:
        for held in self._held.values():
            for call in held:
                if call.suspended:
                    call.suspended = False
                    for pid in call.pids:
                        self._fetcher.acquire(pid)

    def _begin_task(self, task: int) -> None:
        if task in self._held:
            return
        if not self._held:
            self._complete.clear()
            self._has_held.clear()
            self._intake.begin_backward()
            if self._in_backward is not None:
                self._in_backward.begin_backward()
        self._held[task] = {}
        ending = partial(self._end_task, task)
        Variable._execution_engine.queue_callback(ending)
        # After an exception no callback runs, but the engine drops it: the placeholder gradients must stand before the user's next
        # line, which may be zero_grad().
        weakref.finalize(ending, self._task_gone, task).atexit = False

    def _passed(self, node: int, *_: Any) -> None:
        """The node with this number is about to run: calls whose nodes are all younger are over (Note [Passed])."""
        held = self._held.get(torch._C._current_graph_task_id(), {})
        for call in [call for call in held if call.first_node > node]:
            del held[call]
            self._release(call)

    def _gradients_complete(self, pid: int) -> None:
        self._complete.add(pid)
        self._end_calls_without_inputs(pid)
        self._step_in_backward((pid,))

    def _step_in_backward(self, pids: Sequence[int]) -> None:
        for pid in pids if self._in_backward is not None else ():
            if pid in self._complete and self._fetcher.num_uses(pid) == 0:
                assert self._in_backward is not None
                self._in_backward.complete(pid)

    def _end_calls_without_inputs(self, pid: int) -> None:
        """Calls without an input that needs a gradient end here: nothing of their backward is left."""
        if self._partitions[pid].frozen.entries:
            return  # a frozen weight may be needed until the task ends: nobody says when
        held = self._held.get(torch._C._current_graph_task_id(), {})
        for call in [call for call in held if not call.has_inputs and call.pids == (pid,)]:
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
            self._complete.clear()
            if self._in_backward is not None:
                self._in_backward.abandon()
            with suppress(SessionFailedError, RankFailedError):  # nobody here takes it; the next call says it again
                self._end_task(task)

    def _release(self, call: Call) -> None:
        call.task = -1
        for pid in call.pids if not call.suspended else ():
            self._fetcher.release(pid)
        call.suspended = False
        for pid in call.pids:
            if self._fetcher.num_uses(pid) == 0:
                self._intake.released(pid)
        self._step_in_backward(call.pids)
