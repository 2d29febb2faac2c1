"""What steps did: skipped or not, the loss scale that follows from it, and when there are too many skips.

Owns: the newest result, the count of skips in a row, whether the loss was scaled.
Does not: decide a step (decision.py) or hold the scale's rules (loss_scale.py).
Threads: the training thread.
"""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from offload.config import Precision
from offload.errors import ConfigError, NonFiniteError
from offload.optimizer.decision import StepResult
from offload.optimizer.loss_scale import LossScale

log = logging.getLogger("offload")


class StepHistory:
    """Looks at each step's result once, as late as it can: before the next backward or step."""

    def __init__(self, precision: Precision, max_skipped_steps: int) -> None:
        self._is_scaled = precision is Precision.FP16
        self._loss_scale = LossScale(dynamic=self._is_scaled)
        self._max_skipped_steps = max_skipped_steps
        self._newest: StepResult | None = None
        self._num_skipped = 0
        self._was_scaled = False

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by now."""
        return self._loss_scale.value

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss for `backward`."""
        self.absorb()
        self._was_scaled = True
        return loss * self._loss_scale.value if self._is_scaled else loss

    def check_scaled(self) -> None:
        """Raise ConfigError where fp16 gradients come from a loss that was not scaled."""
        was_scaled, self._was_scaled = self._was_scaled, False
        if self._is_scaled and not was_scaled:
            raise ConfigError(
                "in fp16 the loss must be scaled, or small gradients vanish: step() came without a scaled backward. "
                "Call session.backward(loss) instead of loss.backward()."
            )

    def submitted(self, result: StepResult) -> None:
        """A step is on its way."""
        self._newest = result

    def state(self) -> dict[str, Any]:
        """What the next step depends on, for a checkpoint. Waits for the newest step's norm."""
        self.absorb()
        return {"is_scaled": self._is_scaled, "num_skipped": self._num_skipped, **self._loss_scale.state()}

    def take_over(self, state: Mapping[str, Any]) -> None:
        """What `state` gave; a scale only where losses were and are scaled. The newest step does not count any more."""
        self._newest = None
        self._num_skipped = state["num_skipped"]
        if self._is_scaled and state["is_scaled"]:
            self._loss_scale.take_over(state)

    def absorb(self) -> None:
        """Wait for the newest step's norm; it counts as skipped or not, and moves the loss scale."""
        result, self._newest = self._newest, None
        if result is None:
            return
        self._loss_scale.update(skipped=result.skipped)
        if not result.skipped:
            self._num_skipped = 0
            return
        self._num_skipped += 1
        log.warning(
            "step skipped: the gradient of %s is not finite (%d in a row)", result.not_finite, self._num_skipped
        )
        if self._num_skipped >= self._max_skipped_steps:
            raise NonFiniteError(
                f"{self._num_skipped} steps in a row were skipped for gradients that are not finite, first that "
                f"of {result.not_finite}; lower the learning rate or look at the data of these steps. (Weights read "
                "NaN outside the forward of the modules that own them: a module that uses another one's parameter "
                "becomes its owner, too, by register_parameter.)"
            )
