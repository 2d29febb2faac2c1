"""Dynamic loss scaling for fp16, as torch.amp.GradScaler defines it.

Owns: the scale, its growth and back-off.
Does not: find overflows (decision.py) or scale losses (history.py).
Threads: the training thread.
"""

from collections.abc import Mapping
from typing import Any, Final

INITIAL_SCALE: Final = 2.0**16
GROWTH_FACTOR: Final = 2.0
BACKOFF_FACTOR: Final = 0.5
GROWTH_INTERVAL: Final = 2000
"""torch.amp.GradScaler's defaults."""


class LossScale:
    """The number that losses are multiplied by; 1 and constant unless `dynamic`."""

    def __init__(self, *, dynamic: bool) -> None:
        self._dynamic = dynamic
        self.value = INITIAL_SCALE if dynamic else 1.0
        self._good_steps = 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"loss_scale": self.value, "good_steps": self._good_steps}

    def take_over(self, state: Mapping[str, Any]) -> None:
        """What `state` gave."""
        self.value, self._good_steps = float(state["loss_scale"]), int(state["good_steps"])

    def update(self, *, skipped: bool) -> None:
        """After a step: back off where it was skipped, grow after GROWTH_INTERVAL good ones in a row."""
        if not self._dynamic:
            return
        if skipped:
            self.value *= BACKOFF_FACTOR
            self._good_steps = 0
            return
        self._good_steps += 1
        if self._good_steps == GROWTH_INTERVAL:
            self.value *= GROWTH_FACTOR
            self._good_steps = 0
