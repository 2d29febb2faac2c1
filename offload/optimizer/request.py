"""What `step()` asks of the optimizer's lanes.

Owns: the record of one step: which partitions, which gradients, which options.
Does not: collect it (torch_hooks.py, in_backward.py) or carry it out (pipeline.py).
Threads: made by the training thread; immutable.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRequest:
    """One step."""

    order: Sequence[int]
    """The partitions that are stepped, in forward order."""
    in_norm: Sequence[int]
    """The partitions whose gradients make the norm."""
    offloaded: Mapping[int, set[int]]
    """By partition, the entries that have a gradient."""
    hypers: tuple[Any, ...]
    """The options of every group."""
    loss_scale: float
    """What the loss was multiplied by."""
    must_be_finite: bool
    """A gradient that is not finite is an error, not a skip: weights may have been stepped in backward."""
