"""Hooks on modules: when a partition's weights are needed, and when no longer.

Owns: every hook handle on the user's modules, the calls that a forward or backward holds.
Does not: fetch (weights/), take gradients (gradients/) or know what a call may become (calls.py).
Threads: forward on the training thread, backward on autograd's; never two at once.

Note [Calls]: the outermost module of a partition that is being called makes one *call*. It holds the partition during
forward (also while recomputing). If something it returns requires grad, a hook there acquires the partition again
before the call's backward. It is released by the first hook of the same graph task, on an input of a call or on an
output, that comes before the call in forward order (Note [Passed]). What no hook passes (the first call, whose inputs
need no gradient) is released once all its gradients are finished, or when the graph task ends. A backward within a
backward needs no hold of its own on a call: the outer one goes on after it. Nothing is inserted into the graph:
gradients are summed in torch's own order, and a module may change its input in place.

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

from offload.errors import BudgetError, RankFailedError, SessionFailedError, UnsupportedModelError
from offload.model import norms
from offload.model.calls import Call, CallState
from offload.model.nested import mapped, tensors_in
from offload.model.partitions import Partition
from offload.model.weak import weakly


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


class NoStepInBackward:
    """`BackwardStepEvents` of a session that steps in `step()` alone."""

    def begin_backward(self) -> None: ...

    def check_use(self, pids: Sequence[int]) -> None: ...

    def complete(self, pid: int) -> None: ...

    def abandon(self) -> None: ...


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
        self._in_backward = in_backward or NoStepInBackward()
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
        before, changed, after = map(opaque, (self._pre_forward, self._inputs_changed, self._post_forward))
        self._handles.append(self._model.register_forward_hook(opaque(self._leave_model), always_call=True))
        for module, pids in self._pids_by_module().items():
            attributes = [vars(inner) for inner in module.modules()]
            # Hooks that are there already may use the weights (torch.nn.utils.weight_norm) and change the inputs.
            is_hooked = bool(module._forward_pre_hooks)
            self._handles.append(
                module.register_forward_pre_hook(partial(before, pids), prepend=is_hooked, with_kwargs=True)
            )
            if is_hooked:
                self._handles.append(module.register_forward_pre_hook(changed, with_kwargs=True))
            self._handles.append(module.register_forward_hook(partial(after, pids, attributes), always_call=True))
        enter = opaque(self._enter_model)  # before all others, of partitions too
        self._handles.append(self._model.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
        self._handles.extend(norms.widen(self._model, self._dtype, opaque))

    def _pids_by_module(self) -> dict[nn.Module, tuple[int, ...]]:
        pids_of: dict[nn.Module, tuple[int, ...]] = {}
        for partition in self._partitions:
            for module in partition.modules:
                pids_of[module] = (*pids_of.get(module, ()), partition.id)
        return pids_of

    def detach(self) -> None:
        """Remove every hook."""
        while self._handles:
            self._handles.pop().remove()

    def recover(self) -> None:
        """Forget a forward or backward that ended by an exception; nothing to do otherwise."""
        if _is_in_backward():
            return
        if self._held or self._broken:
            if self._held:
                self._intake.abandon()
            for call in self._calls_held():
                call.become(CallState.WAITING)
            self._held.clear()
            self._broken = False
            self._fetcher.reset()
            self._depth = [0] * len(self._partitions)
            self._calls.clear()

    def is_running(self) -> bool:
        """A forward or backward of the model, or of a part of it, is under way."""
        return bool(self._model_depth or self._calls) or torch._C._current_graph_task_id() != -1

    def begin_backward(self) -> None:
        """A backward is about to bring gradients, perhaps of parameters whose modules were not called."""
        self._begin_task(torch._C._current_graph_task_id())

    # ----------------------------------------------------------------------------------------------- forward

    def _enter_model(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._model_depth == 0 and not self._calls:
            self._begin_pass(of_model=True)
        self._model_depth += 1

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)

        return mapped(args, cast), mapped(kwargs, cast)

    def _leave_model(self, *_: Any) -> None:
        self._model_depth -= 1
        if self._model_depth == 0 and self._fetcher.evaluating:
            self._fetcher.end_evaluation()

    def _begin_pass(self, *, of_model: bool) -> None:
        """The model, or a part of it by itself, is called: an evaluation begins, or ends.

        Every call of the model begins an evaluation of its own; a part counts like the calls before it.
        """
        evaluating = not torch.is_grad_enabled()
        if evaluating == self._fetcher.evaluating and not (of_model and evaluating):
            return
        # In a backward nothing is evaluated, but a forward that counted as evaluation may be recomputed (checkpoints).
        if not _is_in_backward() or (of_model and not evaluating):
            self._fetcher.begin(evaluating=evaluating)

    def _pre_forward(self, pids: tuple[int, ...], module: nn.Module, args: Any, kwargs: Any) -> Any:
        outermost = [pid for pid in pids if self._depth[pid] == 0]
        try:
            if outermost:
                self._begin_call(outermost, module)
        finally:
            # In spite of an error, too: the forward hook runs all the same, and lowers the counts.
            for pid in pids:
                self._depth[pid] += 1
        if outermost:
            self._hook_inputs(self._calls[-1], (args, kwargs))

    def _begin_call(self, pids: Sequence[int], module: nn.Module) -> None:
        """Acquire partitions for a call, and put it on top of those under way."""
        if not self._calls:
            self.recover()
            if self._model_depth == 0:
                self._begin_pass(of_model=False)
        acquired: list[int] = []
        try:
            try:
                self._acquire(pids, acquired)
            except BudgetError:
                if not self._suspend():
                    raise
                self._acquire(pids, acquired)
        except BaseException:
            for pid in acquired:
                self._fetcher.release(pid)
            raise
        state = CallState.COVERED if self._backward_holds(pids) else CallState.FORWARD
        self._calls.append(Call(module, tuple(pids), tuple(self._partitions[pid].version for pid in pids), state))

    def _inputs_changed(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._calls and self._calls[-1].is_of(module):
            self._hook_inputs(self._calls[-1], (args, kwargs))

    def _acquire(self, pids: Sequence[int], acquired: list[int]) -> None:
        if _is_in_backward():
            self._in_backward.check_use(pids)
        for pid in pids[len(acquired) :]:
            self._fetcher.acquire(pid)
            acquired.append(pid)

    def _hook_inputs(self, call: Call, inputs: Any) -> None:
        if call.state is CallState.COVERED or not torch.is_grad_enabled():
            return
        for tensor in tensors_in(inputs):
            if tensor.requires_grad:
                call.has_inputs = True
                if tensor.grad_fn is not None:  # accumulating into a leaf has no place in the order of nodes
                    tensor.register_hook(weakly(self._passed, tensor.grad_fn._sequence_nr()))

    def _post_forward(
        self, pids: tuple[int, ...], attributes: Sequence[dict[str, Any]], module: nn.Module, args: Any, output: Any
    ) -> None:
        for pid in pids:
            self._depth[pid] -= 1
        if not self._calls or not self._calls[-1].is_of(module) or any(self._depth[p] for p in self._calls[-1].pids):
            return
        call = self._calls.pop()
        if torch.is_grad_enabled() and call.state is CallState.FORWARD:
            call.become(CallState.WAITING)
            # Also what modules leave on themselves, as losses of routers: backward may come there before the outputs.
            # (Not isinstance: it takes three times as long, for some hundred attributes of a block.)
            left = [value for own in attributes for value in own.values() if type(value) is Tensor]
            for tensor in (*tensors_in(output), *left):
                if tensor.requires_grad:
                    self._hook_output(call, tensor)
        else:
            call.become(CallState.OVER)
        for pid in call.pids:
            self._fetcher.release(pid)
        if not self._calls:
            self._resume([held for held in self._calls_held() if held.state is CallState.SUSPENDED])
        for pid in call.pids:
            self._fetcher.check_weights(pid)

    def _hook_output(self, call: Call, tensor: Tensor) -> None:
        """Also on the node behind a view: changed in place by the caller, a view gets another node and loses hooks."""
        node = tensor.grad_fn
        if node is not None and call.made(node._sequence_nr()):  # else an input, returned as it is
            tensor.register_hook(weakly(self._before_backward, call, node._sequence_nr()))
        base = tensor._base if tensor._is_view() else None
        node = base.grad_fn if base is not None else None
        if node is not None and call.made(node._sequence_nr()):
            node.register_prehook(weakly(self._before_backward, call, node._sequence_nr()))

    # ---------------------------------------------------------------------------------------------- backward

    def _before_backward(self, call: Call, node: int, *_: Any) -> None:
        self._passed(node)
        if call.state is CallState.SUSPENDED:
            self._resume([call])
        if call.state is CallState.HELD:
            return
        if torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"double backward (create_graph=True) through {call.name} is not supported: its "
                "weights leave the device after the first backward. Run this part of the loss outside offload.enable."
            )
        self._check_versions(call)
        task = torch._C._current_graph_task_id()
        self._begin_task(task)
        for pid in call.pids:
            self._fetcher.acquire(pid)
        call.become(CallState.HELD)
        self._has_held.update(call.pids)
        self._held[task][call] = None

    def _check_versions(self, call: Call) -> None:
        for pid, version in zip(call.pids, call.versions, strict=True):
            partition = self._partitions[pid]
            if partition.version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"the weights of {partition.name!r} are at version {partition.version}; expected version {version} "
                    "instead. The optimizer has stepped since this graph was built; run the forward again."
                )

    def _calls_held(self) -> list[Call]:
        """By any backward under way: there is more than one where a node runs another."""
        return [call for calls in self._held.values() for call in calls]

    def _backward_holds(self, pids: Sequence[int]) -> bool:
        """In a node of a running backward, and its tasks hold all of these: none is released before the node ends."""
        if not self._held or not _is_in_backward():
            return False
        return {pid for call in self._calls_held() for pid in call.pids}.issuperset(pids)

    def _suspend(self) -> bool:
        """Release the partitions of all held calls while a module is recomputed; False where there are none."""
        if not _is_in_backward():
            return False
        calls = [call for call in self._calls_held() if call.state is CallState.HELD]
        for call in calls:
            call.become(CallState.SUSPENDED)
            for pid in call.pids:
                self._fetcher.release(pid)
        return bool(calls)

    def _resume(self, calls: Sequence[Call]) -> None:
        for call in calls:
            call.become(CallState.HELD)
            for pid in call.pids:
                self._fetcher.acquire(pid)

    def _begin_task(self, task: int) -> None:
        if task in self._held:
            return
        if not self._held:
            self._complete.clear()
            self._has_held.clear()
            self._intake.begin_backward()
            self._in_backward.begin_backward()
        self._held[task] = {}
        ending = partial(self._end_task, task)
        Variable._execution_engine.queue_callback(ending)
        # After an exception no callback runs, but the engine drops it: the placeholder gradients must stand before the
        # user's next line, which may be zero_grad().
        weakref.finalize(ending, self._task_gone, task).atexit = False

    def _passed(self, node: int, *_: Any) -> None:
        """The node with this number is about to run: calls whose nodes are all younger are over (Note [Passed])."""
        self._release_where(lambda call: not call.made(node))

    def _gradients_complete(self, pid: int) -> None:
        self._complete.add(pid)
        if not self._partitions[pid].frozen.entries:  # a frozen weight may be needed until the task ends: nobody tells
            # Calls without an input that needs a gradient end here: nothing of their backward is left.
            self._release_where(lambda call: not call.has_inputs and call.pids == (pid,))
        self._step_in_backward((pid,))

    def _step_in_backward(self, pids: Sequence[int]) -> None:
        for pid in pids:
            if pid in self._complete and self._fetcher.num_uses(pid) == 0:
                self._in_backward.complete(pid)

    def _end_task(self, task: int) -> None:
        self._release(list(self._held.pop(task, {})))
        if not self._held:
            self._intake.end_backward()

    def _task_gone(self, task: int) -> None:
        if task in self._held:
            self._broken = True
            self._complete.clear()
            self._in_backward.abandon()
            with suppress(SessionFailedError, RankFailedError):  # nobody here takes it; the next call says it again
                self._end_task(task)

    def _release_where(self, is_over: Callable[[Call], bool]) -> None:
        """Calls that the backward under way has no further use for."""
        held = self._held.get(torch._C._current_graph_task_id())
        if held:
            over = [call for call in held if is_over(call)]
            for call in over:
                del held[call]
            self._release(over)

    def _release(self, calls: Sequence[Call]) -> None:
        has_partitions = [call.state is CallState.HELD for call in calls]
        for call in calls:  # all, before an error can come
            call.become(CallState.WAITING)
        for call, held in zip(calls, has_partitions, strict=True):
            for pid in call.pids if held else ():
                self._fetcher.release(pid)
            for pid in call.pids:
                if self._fetcher.num_uses(pid) == 0:
                    self._intake.released(pid)
            self._step_in_backward(call.pids)


def _is_in_backward() -> bool:
    """The calling thread runs a node of a backward."""
    return bool(torch._C._current_graph_task_id() != -1)
