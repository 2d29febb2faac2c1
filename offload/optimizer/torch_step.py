"""The slower path: torch's own code steps parameters whose optimizer has no kernel.

Owns: the stand-in of the user's optimizer, and the state that is not fp32 of the parameter's shape.
Does not: know what such an optimizer computes, or decide whether it may be run (probe.py).
Threads: made by the training thread; steps on the step lane.

Note [Whole or sliced]: optimizers of ELEMENTWISE treat each element by itself, so slices of a parameter are stepped as
they come, each of SLICE_NUMEL elements at most: torch does not cut so few among threads, so no bits depend on their
number, nor on the plan. Any other optimizer sees whole parameters (Muon's products, Adafactor's row sums), so the plan
makes one chunk of every partition. Masters are fp32 and so are gradients; state of a parameter's shape streams like
moments, the rest stays in host memory.
"""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from offload.errors import UnsupportedOptimizerError
from offload.optimizer.kernel_step import Run
from offload.storage.chunk_state import ChunkState
from offload.storage.state_tensors import StateTensors
from offload.units import round_up

ELEMENTWISE: Final = (
    torch.optim.RMSprop,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.Rprop,
)
SLICE_NUMEL: Final = 32_768
"""at::internal::GRAIN_SIZE of torch: loops over no more elements run in one thread."""

NOT_COPIED: Final = ("param_groups", "state", "step")
"""Attributes that the stand-in does not copy; `step` is one where a scheduler has wrapped it."""

Options = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Group:
    """One group as it was when `step()` was called: a change after that does not touch the step."""

    options: Options
    attributes: dict[str, Any] = field(compare=False)
    """The optimizer's own, without hooks: some count their steps there."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a tensor of an optimizer's state must be at every step."""

    kind: type
    """A subclass may quantize its elements, whatever its dtype says."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind.__name__} of {str(self.dtype).removeprefix('torch.')}, shape {self.shape}"


def forms(state: Mapping[str, Any]) -> "dict[str, Form | None]":
    """By key; None for what is no tensor."""
    return {key: Form(type(v), v.dtype, tuple(v.shape)) if isinstance(v, Tensor) else None for key, v in state.items()}


@dataclass(frozen=True, slots=True)
class StateForms:
    """Where a session keeps the state of an optimizer (probe.py finds it)."""

    tensors: StateTensors
    """What is fp32 of the parameter's shape: it streams. The rest, of any form, stays in host memory as it is."""
    streamed: tuple[frozenset[str], ...]
    """Which of these each group has."""
    late: frozenset[str]
    """Keys of the rest that do not have their form after the first step."""
    small_bytes: int
    """What the rest takes, for all parameters: exact but for those larger than the clones that were tried."""


class StandIn:
    """An optimizer of the user's class, over one parameter at a time."""

    def __init__(self, kind: type[torch.optim.Optimizer]) -> None:
        self._kind = kind
        self._optimizer = object.__new__(kind)

    def step(
        self, parameter: nn.Parameter, groups: Sequence[Group], index: int, state: dict[str, Any]
    ) -> dict[str, Any]:
        """One step of a parameter of group `index`, changed in place; its state before, and after as returned."""
        replaced = {
            "param_groups": [g.options | {"params": [parameter] if i == index else []} for i, g in enumerate(groups)],
            "state": defaultdict(dict, {parameter: state} if state else {}),
        }
        self._optimizer.__dict__ = groups[index].attributes | replaced
        self._kind.step(self._optimizer)
        after = dict(self._optimizer.state[parameter])
        self._optimizer.__dict__.update(state=defaultdict(dict))  # it keeps no view of a staging buffer alive
        self._optimizer.param_groups[index]["params"] = []
        return after


def groups_of(optimizer: torch.optim.Optimizer) -> tuple[Group, ...]:
    """The groups now."""
    attributes = {
        name: OrderedDict() if name.endswith("_hooks") else value
        for name, value in optimizer.__dict__.items()
        if name not in NOT_COPIED
    }
    return tuple(
        Group({k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}, attributes)
        for group in optimizer.param_groups
    )


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether slices of a parameter may be stepped by themselves."""
    return type(optimizer) in ELEMENTWISE


class TorchStepper:
    """Steps by the user's own optimizer class."""

    def __init__(self, optimizer: torch.optim.Optimizer, state_forms: StateForms) -> None:
        self._name = type(optimizer).__name__
        self._stand_in = StandIn(type(optimizer))
        self._state_forms = state_forms
        self._state_tensors = frozenset(state_tensor.name for state_tensor in state_forms.tensors)
        self._is_elementwise = is_elementwise(optimizer)
        self._small: dict[tuple[int, int], dict[str, Any]] = {}
        """State that is in no state tensor, by parameter (Entry.index) and first element of the slice."""
        self._taken_over: dict[int, dict[str, Any]] = {}
        """The same of parameters that had state at the start."""

    def prepare(self, hypers: Sequence[Group], *, split: bool, plain: bool) -> None:
        """Nothing is compiled."""

    def take_over(self, index: int, state: Mapping[str, Any]) -> None:
        """State that a parameter came with; what is in state tensors has been read already."""
        self._taken_over[index] = {k: copy.deepcopy(v) for k, v in state.items() if k not in self._state_tensors}

    def forget(self) -> None:
        """Drop the state of every parameter: another one is loaded."""
        self._small.clear()
        self._taken_over.clear()

    def state_of(self, index: int) -> dict[str, Any] | None:
        """State of a parameter that is in no state tensor; None where it never had any."""
        small = self._small.get((index, 0), self._taken_over.get(index))
        return None if small is None else copy.deepcopy(small)

    def step(
        self,
        stored: ChunkState,
        gradient: Tensor,
        runs: Sequence[Run],
        hypers: Sequence[Group],
        *,
        scale: float,
        first: int,
        borders_from: int,
    ) -> None:
        """See Stepper."""
        for run in runs:
            for start, stop in self._slices(run, borders_from):
                at = run.in_parameter + start - run.start
                shape = (stop - start,) if self._is_elementwise else run.shape
                values = gradient[start:stop].to(torch.float32, copy=True).mul_(scale).view(shape)
                self._step_slice(stored, values, (start, stop), (run.index, at), hypers, run.group)

    def _slices(self, run: Run, borders_from: int) -> Iterator[tuple[int, int]]:
        """See Note [Whole or sliced]: borders are those of the flat parameter, never of the chunk."""
        start, stop = run.start, run.stop
        if not self._is_elementwise:
            yield start, stop
            return
        first = round_up(borders_from + start + 1, SLICE_NUMEL) - borders_from
        yield from pairwise([start, *range(first, stop, SLICE_NUMEL), stop])

    def _step_slice(
        self,
        stored: ChunkState,
        gradient: Tensor,
        where: tuple[int, int],
        key: tuple[int, int],
        groups: Sequence[Group],
        index: int,
    ) -> None:
        values = np.empty(where[1] - where[0], np.float32)
        stored.read("master", *where, values)
        parameter = nn.Parameter(torch.from_numpy(values).view(gradient.shape))
        parameter.grad = gradient
        small = self._small.get(key)
        if small is None and key[0] in self._taken_over:
            small = copy.deepcopy(self._taken_over[key[0]])
        names = self._state_forms.streamed[index]
        state: dict[str, Any] = {}
        if small is not None:  # else it is the first step, which makes its own
            streamed = {n: torch.from_numpy(stored.part(n, *where)).view(gradient.shape) for n in names}
            state = small | streamed
        after = self._stand_in.step(parameter, groups, index, state)
        self._check(after, names, small, tuple(gradient.shape))
        stored.write("master", *where, values)
        for name in names:
            place = torch.from_numpy(stored.part(name, *where))
            place.copy_(after.pop(name).reshape(-1))
        self._small[key] = after

    def _check(
        self, after: Mapping[str, Any], streamed: Set[str], small: Mapping[str, Any] | None, shape: tuple[int, ...]
    ) -> None:
        """Raise where state has come back in another form than planned: stored as planned it would be another."""
        planned: dict[str, Form | None] = dict.fromkeys(streamed, Form(Tensor, torch.float32, shape))
        if small is not None:
            planned |= forms(small)
        found = forms(after)
        checked = planned.keys() | found.keys() if small is not None else planned.keys()
        for key in sorted(checked - self._state_forms.late):
            if key not in planned or key not in found or planned[key] != found[key]:
                expected, got = (
                    "nothing" if key not in either else str(either[key] or "no tensor") for either in (planned, found)
                )
                raise UnsupportedOptimizerError(
                    f"optimizer {self._name} left in state[{key!r}] of a parameter of shape {shape}: {got}; planned "
                    f"was: {expected}. State that changes its form cannot be offloaded; nothing of this parameter's "
                    "step was stored. Use torch.optim.AdamW or another whose state has one form."
                )
