"""The step of one chunk by a fused kernel.

Owns: the runs of neighbours that one call can take, and the order of a kernel's arguments.
Does not: the arithmetic (kernels/) or the order of chunks (pipeline.py).
Threads: the step lane; kernels run on the workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from offload.config import Precision
from offload.kernels.workers import Workers
from offload.memory.region import bits
from offload.optimizer.hyper import Hyper
from offload.storage.chunk_state import ChunkState


@dataclass(frozen=True, slots=True)
class Run:
    """Elements [start, stop) of a chunk, all of one parameter."""

    start: int
    stop: int
    group: int
    num_steps: int
    """How many steps the parameter will have taken after this one."""
    index: int
    """Entry.index of the parameter."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    in_parameter: int
    """Which of the parameter's elements is the first."""


class Stepper(Protocol):
    """Steps chunks that are in memory."""

    def prepare(self, hypers: Sequence[Any], *, split: bool, plain: bool) -> None:
        """Compile what training will need, for these forms of master."""

    def step(
        self,
        stored: ChunkState,
        gradient: Tensor,
        runs: Sequence[Run],
        hypers: Sequence[Any],
        *,
        scale: float,
        first: int,
        borders_from: int,
    ) -> None:
        """Step `runs` in rising order. `gradient` (numel,) in the dtype of its home, multiplied by `scale`.

        first: global number of the chunk's element 0. borders_from: its number in the flat parameter, for borders of
        slices.
        """


class KernelStepper:
    """Steps by the kernels of the optimizer's groups."""

    def __init__(self, *, gradient: Precision, precision: Precision, workers: Workers) -> None:
        self._gradient = gradient.value
        self._weights = precision.value
        self._workers = workers

    def prepare(self, hypers: Sequence[Hyper], *, split: bool, plain: bool) -> None:
        """See Stepper."""
        for master, wanted in (("split", split), ("plain", plain)):
            for hyper in hypers if wanted else ():
                hyper.kernel(self._gradient, self._weights, master)

    def step(
        self,
        stored: ChunkState,
        gradient: Tensor,
        runs: Sequence[Run],
        hypers: Sequence[Hyper],
        *,
        scale: float,
        first: int,
        borders_from: int,
    ) -> None:
        """See Stepper. One call for neighbours that share group and step count."""
        gradients, weights = bits(gradient), stored.weights
        for start, stop, group, num_steps in joined(runs):
            hyper = hypers[group]
            kernel = hyper.kernel(self._gradient, self._weights, "split" if stored.is_split else "plain")
            state_tensors, arguments = (stored.array0, *hyper.state_tensors), hyper.arguments(num_steps, scale)

            def work(
                low: int,
                high: int,
                kernel: Any = kernel,
                state_tensors: Any = state_tensors,
                arguments: Any = arguments,
            ) -> None:
                a, b = low - borders_from, high - borders_from
                arrays = [stored.part(name, a, b) for name in state_tensors]
                kernel(*arrays, gradients[a:b], weights[a:b], first + a, *arguments)

            self._workers.run(work, borders_from + start, borders_from + stop)


def joined(runs: Sequence[Run]) -> list[tuple[int, int, int, int]]:
    """(start, stop, group, step count) of neighbours that share both."""
    joined: list[tuple[int, int, int, int]] = []
    for run in runs:
        key = (run.group, run.num_steps)
        if joined and joined[-1][1] == run.start and joined[-1][2:] == key:
            joined[-1] = (joined[-1][0], run.stop, *key)
        else:
            joined.append((run.start, run.stop, *key))
    return joined
