"""The slower path: torch's own code steps parameters whose optimizer has no kernel.

Owns: the stand-in of the user's optimizer, and the state that has not the shape of a parameter.
Does not: know what such an optimizer computes. One that looks at several parameters at once is not supported.
Threads: made by the training thread; steps on the step lane.

Note [Whole or sliced]: optimizers of ELEMENTWISE treat each element by itself, so slices of a parameter are stepped as
they come, each of SLICE_NUMEL elements at most: torch does not cut so few among threads, so no bits depend on their
number, nor on the plan. Any other optimizer sees whole parameters (Muon's products, Adafactor's row sums), so the plan
makes one piece of every partition. Masters are fp32 and so are gradients; state of a parameter's shape streams like
moments, the rest stays in host memory.
"""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from offload.errors import UnsupportedOptimizerError
from offload.optimizer.kernel_step import Run
from offload.optimizer.planes import Plane, Planes
from offload.optimizer.stored import StoredPiece
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

OWN: Final = ("param_groups", "state", "step")
"""Attributes that the stand-in has of its own; `step` is one where a scheduler has wrapped it."""

Options = dict[str, Any]


class StandIn:
    """An optimizer of the user's class and attributes, over one parameter at a time, with no hooks."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        kind = type(optimizer)
        self._optimizer = object.__new__(kind)
        kept = {
            name: OrderedDict() if name.endswith("_hooks") else value
            for name, value in optimizer.__dict__.items()
            if name not in OWN
        }
        self._optimizer.__dict__.update(kept)
        self._step = kind.step

    def step(self, parameter: nn.Parameter, options: Options, state: dict[str, Any]) -> dict[str, Any]:
        """One step of `parameter`, changed in place; the state after it."""
        self._optimizer.__dict__["param_groups"] = [options | {"params": [parameter]}]
        self._optimizer.__dict__["state"] = defaultdict(dict, {parameter: state} if state else {})
        self._step(self._optimizer)
        after = dict(self._optimizer.state[parameter])
        self._optimizer.__dict__.update(param_groups=[], state=defaultdict(dict))  # it keeps no view of a slab alive
        return after


def options_of(optimizer: torch.optim.Optimizer) -> tuple[Options, ...]:
    """The groups' options now; a change after this does not touch the step in flight."""
    return tuple(
        {name: copy.deepcopy(value) for name, value in group.items() if name not in ("params", "param_names")}
        for group in optimizer.param_groups
    )


def probe(optimizer: torch.optim.Optimizer) -> Planes:
    """Planes for the state of a parameter's shape, found by stepping a small matrix with each group's options."""
    planes: dict[str, Plane] = {}
    name = type(optimizer).__name__
    for options in options_of(optimizer):
        parameter = nn.Parameter(torch.zeros(PROBE_SHAPE))
        parameter.grad = torch.linspace(-1.0, 1.0, parameter.numel()).view(PROBE_SHAPE)
        try:
            state = StandIn(optimizer).step(parameter, options, {})
        except Exception as error:
            raise UnsupportedOptimizerError(
                f"optimizer {name} has no kernel, and its own step does not work on one parameter by itself ({error}); "
                "use torch.optim.AdamW or another that steps each parameter for itself."
            ) from error
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                if value.dtype is not torch.float32:
                    raise UnsupportedOptimizerError(
                        f"optimizer {name} keeps {key!r} as {value.dtype} beside an fp32 parameter; only fp32 is kept."
                    )
                planes[key] = Plane(key, value.dtype)
    return tuple(planes.values())


class TorchStepper:
    """Steps by the user's own optimizer class."""

    def __init__(self, optimizer: torch.optim.Optimizer, planes: Planes) -> None:
        self._stand_in = StandIn(optimizer)
        self._planes = tuple(plane.name for plane in planes)
        self._is_elementwise = type(optimizer) in ELEMENTWISE
        self._small: dict[tuple[int, int], dict[str, Any]] = {}
        """State that is in no plane, by parameter (Entry.index) and first element of the slice."""
        self._taken_over: dict[int, dict[str, Any]] = {}
        """The same of parameters that had state at the start."""

    def prepare(self, hypers: Sequence[Options], *, split: bool, plain: bool) -> None:
        """Nothing is compiled."""

    def take_over(self, index: int, state: Mapping[str, Any]) -> None:
        """State that a parameter came with; what is in planes has been read already."""
        self._taken_over[index] = {k: copy.deepcopy(v) for k, v in state.items() if k not in self._planes}

    def forget(self) -> None:
        """Drop the state of every parameter: another one is loaded."""
        self._small.clear()
        self._taken_over.clear()

    def state_of(self, index: int) -> dict[str, Any] | None:
        """State of a parameter that is in no plane; None where it never had any."""
        small = self._small.get((index, 0), self._taken_over.get(index))
        return None if small is None else copy.deepcopy(small)

    def step(
        self,
        stored: StoredPiece,
        gradient: Tensor,
        runs: Sequence[Run],
        hypers: Sequence[Options],
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
        """See Note [Whole or sliced]: borders are those of the flat, never of the piece."""
        start, stop = run.start, run.stop
        if not self._is_elementwise:
            yield start, stop
            return
        first = round_up(borders_from + start + 1, SLICE_NUMEL) - borders_from
        yield from pairwise([start, *range(first, stop, SLICE_NUMEL), stop])

    def _step_slice(
        self, stored: StoredPiece, gradient: Tensor, where: tuple[int, int], key: tuple[int, int], options: Options
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
            kept = {n: torch.from_numpy(stored.part(n, *where)).view(gradient.shape) for n in self._planes}
            state = small | kept
        after = self._stand_in.step(parameter, options, state)
        stored.write("master", *where, values)
        for name in self._planes:
            if name in after:
                place = torch.from_numpy(stored.part(name, *where))
                place.copy_(after.pop(name).reshape(-1))
        self._small[key] = after
