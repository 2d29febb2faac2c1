"""The slower path: torch's own code steps parameters whose optimizer has no kernel.

Owns: the stand-in of the user's optimizer, and the state that has not the shape of a parameter.
Does not: know what such an optimizer computes. One that looks at several parameters at once raises.
Threads: made by the training thread; steps on the step lane.

Note [Whole or sliced]: optimizers of ELEMENTWISE treat each element by itself, so slices of a parameter are stepped as
they come, each of SLICE_NUMEL elements at most: torch does not cut so few among threads, so no bits depend on their
number, nor on the plan. Any other optimizer sees whole parameters (Muon's products, Adafactor's row sums), so the plan
makes one chunk of every partition. Masters are fp32 and so are gradients; state of a parameter's shape streams like
moments, the rest stays in host memory.
"""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from offload.errors import UnsupportedOptimizerError
from offload.optimizer.kernel_step import Run
from offload.storage.chunk_state import ChunkState
from offload.storage.state_tensors import StateTensor, StateTensors
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

PROBE_SHAPE: Final = (8, 12)
"""Of the matrix that is stepped to see what state an optimizer keeps."""

NOT_COPIED: Final = ("param_groups", "state", "step")
"""Attributes that the stand-in does not copy; `step` is one where a scheduler has wrapped it."""

PLAIN: Final = (bool, int, float, complex, str, tuple, Tensor)
"""Values that are compared to see what a step has changed."""

Options = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Group:
    """One group as it was when `step()` was called: a change after that does not touch the step."""

    options: Options
    attributes: dict[str, Any] = field(compare=False)
    """The optimizer's own, without hooks: some count their steps there."""


class StandIn:
    """An optimizer of the user's class, over one parameter at a time."""

    def __init__(self, kind: type[torch.optim.Optimizer]) -> None:
        self._kind = kind
        self._optimizer = object.__new__(kind)

    def step(self, parameters: Sequence[nn.Parameter], group: Group, state: dict[str, Any]) -> dict[str, Any]:
        """One step of `parameters`, changed in place; `state` and what is returned: of the first before and after."""
        first = parameters[0]
        replaced = {
            "param_groups": [group.options | {"params": list(parameters)}],
            "state": defaultdict(dict, {first: state} if state else {}),
        }
        self._optimizer.__dict__ = group.attributes | replaced
        self._kind.step(self._optimizer)
        after = dict(self._optimizer.state[first])
        self._optimizer.__dict__.update(state=defaultdict(dict))  # it keeps no view of a staging buffer alive
        for options in self._optimizer.param_groups:
            options["params"] = []
        return after

    def surroundings(self) -> dict[str, Any]:
        """Plain options and attributes as the last step has left them."""
        values = self._optimizer.__dict__ | self._optimizer.param_groups[0]
        return {name: value for name, value in values.items() if isinstance(value, PLAIN)}


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


def probe(optimizer: torch.optim.Optimizer) -> StateTensors:
    """State tensors for the state of a parameter's shape, found by stepping a small matrix with each group's options.

    Raises UnsupportedOptimizerError for what would silently go wrong: a step that depends on other parameters, or that
    keeps for the next one what it has seen of gradients elsewhere than in the parameter's state (the user's optimizer
    steps without gradients).
    """
    state_tensors: dict[str, StateTensor] = {}
    name = type(optimizer).__name__
    for index in range(len(optimizer.param_groups)):
        alone, state, left = _tried(optimizer, index, [1.0])
        with_another, _, _ = _tried(optimizer, index, [1.0, 3.0])
        _, _, left_without = _tried(optimizer, index, [None])
        if not torch.equal(alone, with_another):
            raise UnsupportedOptimizerError(
                f"optimizer {name} steps a parameter otherwise where another one has a gradient, too, but a session "
                "steps each by itself; use torch.optim.AdamW or another that does so (clip by max_grad_norm)."
            )
        differ = sorted(key for key in left.keys() | left_without.keys() if not _same(left, left_without, key))
        if differ:
            raise UnsupportedOptimizerError(
                f"optimizer {name} keeps what it has seen of gradients in {', '.join(differ)}, of its own or of a "
                "group, but a session steps each parameter by itself; keep it in the state of each parameter."
            )
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == alone.shape:
                if value.dtype is not torch.float32:
                    raise UnsupportedOptimizerError(
                        f"optimizer {name} keeps {key!r} as {value.dtype} for an fp32 parameter; only fp32 is kept."
                    )
                state_tensors[key] = StateTensor(key, value.dtype)
    return tuple(state_tensors.values())


def _tried(
    optimizer: torch.optim.Optimizer, index: int, scales: Sequence[float | None]
) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    """One step of as many small matrices as there are factors on their gradients (None: it has no gradient).

    Returns the first one, its state, and what the step has left in options and attributes.
    """
    parameters = [nn.Parameter(torch.zeros(PROBE_SHAPE)) for _ in scales]
    for parameter, scale in zip(parameters, scales, strict=True):
        if scale is not None:
            parameter.grad = torch.linspace(-scale, scale, parameter.numel()).view(PROBE_SHAPE)
    stand_in = StandIn(type(optimizer))
    try:
        with torch.random.fork_rng(devices=[]):  # the same random numbers each time, and none of the user's
            state = stand_in.step(parameters, groups_of(optimizer)[index], {})
    except Exception as error:
        raise UnsupportedOptimizerError(
            f"optimizer {type(optimizer).__name__} has no kernel, and its own step does not work on one parameter by "
            f"itself ({error}); use torch.optim.AdamW or another that steps each parameter for itself."
        ) from error
    return parameters[0].detach(), state, stand_in.surroundings()


def _same(left: Mapping[str, Any], right: Mapping[str, Any], key: str) -> bool:
    if key not in left or key not in right:
        return False
    a, b = left[key], right[key]
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or bool(a == b)


class TorchStepper:
    """Steps by the user's own optimizer class."""

    def __init__(self, optimizer: torch.optim.Optimizer, state_tensors: StateTensors) -> None:
        self._stand_in = StandIn(type(optimizer))
        self._state_tensors = tuple(state_tensor.name for state_tensor in state_tensors)
        self._is_elementwise = type(optimizer) in ELEMENTWISE
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
                self._step_slice(stored, values, (start, stop), (run.index, at), hypers[run.group])

    def _slices(self, run: Run, borders_from: int) -> Iterator[tuple[int, int]]:
        """See Note [Whole or sliced]: borders are those of the flat parameter, never of the chunk."""
        start, stop = run.start, run.stop
        if not self._is_elementwise:
            yield start, stop
            return
        first = round_up(borders_from + start + 1, SLICE_NUMEL) - borders_from
        yield from pairwise([start, *range(first, stop, SLICE_NUMEL), stop])

    def _step_slice(
        self, stored: ChunkState, gradient: Tensor, where: tuple[int, int], key: tuple[int, int], group: Group
    ) -> None:
        values = np.empty(where[1] - where[0], np.float32)
        stored.read("master", *where, values)
        parameter = nn.Parameter(torch.from_numpy(values).view(gradient.shape))
        parameter.grad = gradient
        small = self._small.get(key)
        if small is None and key[0] in self._taken_over:
            small = copy.deepcopy(self._taken_over[key[0]])
        state: dict[str, Any] = {}
        if small is not None:  # else it is the first step, which makes its own
            streamed = {n: torch.from_numpy(stored.part(n, *where)).view(gradient.shape) for n in self._state_tensors}
            state = small | streamed
        after = self._stand_in.step([parameter], group, state)
        stored.write("master", *where, values)
        for name in self._state_tensors:
            if name in after:
                place = torch.from_numpy(stored.part(name, *where))
                place.copy_(after.pop(name).reshape(-1))
        self._small[key] = after
