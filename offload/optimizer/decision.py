"""The step decision: global norm, clip factor, overflow or skip. One scalar that every chunk needs before its step.

Owns: the order in which the norm is summed, what counts as a gradient that is not finite, clipping.
Does not: sum the squares of a chunk (gradients/) or step (pipeline.py).
Threads: `decide` on the lane `step`; a result is read on the training thread.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Lanes, Reason
from offload.errors import NonFiniteError
from offload.gradients.chunks import GradientChunk
from offload.optimizer.request import StepRequest
from offload.runtime import Runtime

CLIP_EPS: Final = 1e-6
"""Added to the norm before dividing, as torch.nn.utils.clip_grad_norm_ does."""


@dataclass(frozen=True, slots=True)
class StepDecision:
    """The one scalar that every chunk needs before it is stepped."""

    grad_norm: float
    scale: float
    """What the kernel multiplies gradients by: clipping, and the inverse of the loss scale."""
    skipped: bool
    loss_scale: float
    not_finite: str = ""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did. Reading a field waits for the step's norm, not for the step."""

    decided: "Future[StepDecision]"
    """Done once the norm has been taken."""
    _lanes: Lanes

    @property
    def grad_norm(self) -> float:
        """Global norm of the gradients before clipping, over all parameters that have one."""
        return self._decision().grad_norm

    @property
    def skipped(self) -> bool:
        """A gradient was not finite: no parameter changed and no step was counted."""
        return self._decision().skipped

    @property
    def loss_scale(self) -> float:
        """What the loss was multiplied by; 1 outside fp16."""
        return self._decision().loss_scale

    @property
    def not_finite(self) -> str:
        """Partition and parameter of the first gradient that was not finite; empty where all were."""
        return self._decision().not_finite

    def _decision(self) -> StepDecision:
        # Without this there is no norm to read yet.
        return self._lanes.wait(self.decided, Reason.STEP_DONE)


class StepDecider:
    """Makes the decision of every step."""

    def __init__(self, runtime: Runtime, gradients: Sequence[Sequence[GradientChunk]]) -> None:
        self._ranks = runtime.ranks
        self._gradients = gradients
        self._partitions = runtime.partitions
        self._lanes = runtime.lanes
        self._max_grad_norm = runtime.config.max_grad_norm

    def decide(self, request: StepRequest, all_offloaded: "Future[Any]") -> StepDecision:
        """Take the norm, once `all_offloaded` is done (the last gradient offload), and decide."""
        # Without this the norm misses gradients that are still on their way.
        self._lanes.wait(all_offloaded, Reason.OFFLOADED)
        total = self._sum_of_squares(request)
        first = None if math.isfinite(total) else self._first_not_finite(request)
        total, first = self._over_ranks(total, first)
        norm = math.sqrt(total) / request.loss_scale if total >= 0.0 else math.nan
        if request.must_be_finite and not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient of {self._name(first)} is not finite, and part of the weights may "
                'have been stepped inside backward. Use overlap="forward", which skips such a step.'
            )
        if not math.isfinite(norm):
            self._lanes.timeline.count("skipped steps")
            return StepDecision(norm, 0.0, True, request.loss_scale, self._name(first))
        clip = 1.0 if self._max_grad_norm is None else min(1.0, self._max_grad_norm / (norm + CLIP_EPS))
        return StepDecision(norm, clip / request.loss_scale, False, request.loss_scale)

    def _sum_of_squares(self, request: StepRequest) -> float:
        """In partition order, never in that of arrival or of use: the same bits whatever the schedule."""
        total = 0.0
        for pid in sorted(request.in_norm):
            offloaded = request.offloaded[pid]
            for gradient in self._gradients[pid]:
                self._lanes.declare(reads=[gradient.sums_place()])
                squares = gradient.sums
                if not offloaded >= gradient.owners:
                    squares = squares[np.isin(gradient.entries, np.fromiter(offloaded, np.int64, len(offloaded)))]
                for square in squares.tolist():
                    total += square
        return total

    def _over_ranks(self, total: float, first: tuple[int, int] | None) -> tuple[float, tuple[int, int] | None]:
        """Every rank has the squares of its shards: added in the order of ranks, all get the same bits."""
        rows = self._ranks.totals(np.array([total, *(first or (-1, -1))]))
        total = 0.0
        for square in rows[:, 0].tolist():
            total += square
        found = [(int(pid), int(position)) for pid, position in rows[:, 1:] if pid >= 0]
        return total, min(found, default=None)

    def _first_not_finite(self, request: StepRequest) -> tuple[int, int] | None:
        """Partition, and position in it, of the first parameter whose gradient is not finite."""
        for pid in sorted(request.in_norm):
            for gradient in self._gradients[pid]:
                for position, square in zip(gradient.entries.tolist(), gradient.sums.tolist(), strict=True):
                    if position in request.offloaded[pid] and not math.isfinite(square):
                        return pid, position
        return None

    def _name(self, place: tuple[int, int] | None) -> str:
        if place is None:
            return "the sum of all"
        partition = self._partitions[place[0]]
        return f"{partition.trainable.entries[place[1]].name!r} of partition {partition.name!r}"
