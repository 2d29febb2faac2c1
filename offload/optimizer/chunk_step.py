"""Chunks as the optimizer sees them, and the step of one chunk from its read to its end.

Owns: where the homes of a chunk lie in a staging buffer, which states the step of a chunk goes through.
Does not: order the steps (step_queue.py), read (state_reads.py) or run a kernel (chunk_stepper.py).
Threads: a step is made by the training thread. Its state is set by that thread until the step is submitted, then under
the lock of the step queue.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from typing import Any, Final

from offload.concurrency.futures import Future
from offload.config import Precision
from offload.errors import IllegalMove
from offload.gradients.chunks import GradientChunk
from offload.memory.ring import Lease
from offload.storage.homes import Home
from offload.storage.state_tensors import StateTensors, record_bytes
from offload.units import DISK_ALIGN_BYTES, Tier, round_up


@dataclass(frozen=True, slots=True)
class BufferLayout:
    """Which bytes of a staging buffer belong to a chunk's state, gradient and new weights.

    Empty for what the kernel reaches where it is stored.
    """

    state: slice
    gradient: slice
    weights: slice

    @property
    def num_bytes(self) -> int:
        """Of all three; 0 where the chunk needs no staging buffer."""
        return int(self.weights.stop)


@dataclass(slots=True, eq=False)
class StateChunk:
    """One chunk of trainable elements with the homes of its gradient, state and weights."""

    gradient: GradientChunk
    state: Home
    weights: Home
    state_tensors: StateTensors
    layout: BufferLayout
    newest_step: "Future[Any] | None" = None
    """Done when the newest step of the chunk is. Set by the training thread."""
    pid: int = field(init=False)
    partition: str = field(init=False)
    """Its name."""
    numel: int = field(init=False)
    is_staged: bool = field(init=False)
    """Something of it is out of the kernel's reach: it goes through a staging buffer of the step ring."""

    def __post_init__(self) -> None:
        chunk = self.gradient.chunk
        self.pid, self.partition, self.numel = chunk.partition_id, chunk.partition, chunk.numel
        self.is_staged = self.layout.num_bytes > 0

    @property
    def stages_gradient(self) -> bool:
        """The gradient goes through the staging buffer: it is read once it has been offloaded."""
        return self.gradient.home.tier is Tier.DISK


def state_chunk(
    gradient: GradientChunk,
    state: Home,
    weights: Home,
    state_tensors: StateTensors,
    *,
    precision: Precision,
    gradient_precision: Precision,
) -> StateChunk:
    """A chunk, with its layout. `precision`: of working weights; `gradient_precision`: of gradients in their homes."""
    numel = gradient.chunk.numel
    sizes = (
        record_bytes(state_tensors, numel) if state.tier is Tier.DISK else 0,
        _aligned_bytes(numel, gradient_precision) if gradient.home.tier is Tier.DISK else 0,
        _aligned_bytes(numel, precision) if weights_are_staged(weights, state) else 0,
    )
    stops = accumulate(sizes)
    layout = BufferLayout(*(slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)))
    return StateChunk(gradient, state, weights, state_tensors, layout)


def weights_are_staged(weights: Home, state: Home) -> bool:
    """New weights of a chunk go through a staging buffer: to disk, or to a device whose state is elsewhere."""
    return weights.tier is Tier.DISK or (weights.tier is Tier.DEVICE and state.tier is not Tier.DEVICE)


def _aligned_bytes(numel: int, precision: Precision) -> int:
    return round_up(numel * precision.dtype.itemsize, DISK_ALIGN_BYTES)


# ------------------------------------------------------------------------------------------- the step of one chunk


class StepState(StrEnum):
    """How far the step of one chunk has come."""

    AHEAD = "read ahead of its step"
    DROPPED = "read ahead in vain"
    WAITING = "waiting for its turn"
    BEGUN = "begun: its place in the order is fixed"
    STEPPING = "taken by the step lane"


LEGAL: Final = {
    StepState.AHEAD: frozenset({StepState.BEGUN, StepState.DROPPED}),
    StepState.DROPPED: frozenset[StepState](),
    StepState.WAITING: frozenset({StepState.BEGUN, StepState.STEPPING}),
    StepState.BEGUN: frozenset({StepState.STEPPING}),
    StepState.STEPPING: frozenset[StepState](),
}


@dataclass(slots=True, eq=False)
class ChunkStep:
    """The step of a chunk that the kernel reaches where it is stored."""

    chunk: StateChunk
    done: "Future[Any]"
    """The chunk is stepped, and its staging buffer released; where it was read ahead in vain only the latter."""
    state: StepState = field(default=StepState.WAITING, kw_only=True)

    def move(self, new: StepState) -> None:
        """Become `new`. Raises IllegalMove where LEGAL does not have the move."""
        if new not in LEGAL[self.state]:
            raise IllegalMove(f"{self.done.name} is {self.state}, and cannot become {new}. Please report it.")
        self.state = new


@dataclass(frozen=True, slots=True)
class Staged:
    """What has been submitted for a chunk: reads, and the staging buffer that they fill."""

    lease: Lease
    reads: "tuple[Future[Any], ...]"


@dataclass(slots=True, eq=False)
class StagedStep(ChunkStep):
    """The step of a chunk that goes through a staging buffer: issued → read → stepped → done."""

    issued: "Future[Staged]"
    """Everything that the step reads has been submitted."""
    step_before: "Future[Any] | None"
    """The newest step of the same chunk, of those submitted before; None: there was none."""
    ahead: "Future[Staged] | None" = None
    """What was read ahead, which is all but a gradient on disk; None: nothing was."""

    @property
    def is_to_read(self) -> bool:
        """Something is left to be read once the step is submitted."""
        return self.ahead is None or self.chunk.stages_gradient
