"""Hyper-parameters: plain floats of every group, taken at `step()`.

Owns: which torch optimizers have a kernel, and the snapshot of their groups.
Does not: apply them (optimizer/pipeline.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from offload.errors import UnsupportedOptimizerError


@dataclass(frozen=True, slots=True)
class AdamHyper:
    """Hyper-parameters of one group, as they were when `step()` was called."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool

    def bias_corrections(self, num_steps: int) -> tuple[float, float]:
        """`1 - beta1^t` and `sqrt(1 - beta2^t)` at the `num_steps`-th step of a parameter."""
        return 1.0 - self.beta1**num_steps, math.sqrt(1.0 - self.beta2**num_steps)


def check_supported(optimizer: torch.optim.Optimizer) -> None:
    """Raise UnsupportedOptimizerError unless `optimizer` is an Adam or AdamW whose options have a kernel."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        raise UnsupportedOptimizerError(
            f"optimizer {type(optimizer).__name__} has no kernel; use torch.optim.AdamW or torch.optim.Adam."
        )
    for index, group in enumerate(optimizer.param_groups):
        for option in ("amsgrad", "maximize", "differentiable", "capturable"):
            if group.get(option):
                raise UnsupportedOptimizerError(
                    f"group {index} of {type(optimizer).__name__} has {option}=True, which has no kernel; "
                    "set it to False."
                )


def snapshot(optimizer: torch.optim.Optimizer) -> tuple[AdamHyper, ...]:
    """The groups' hyper-parameters now; a change after this does not touch the step in flight."""
    return tuple(_of_group(optimizer, group) for group in optimizer.param_groups)


def _of_group(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> AdamHyper:
    beta1, beta2 = group["betas"]
    decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay", False))
    return AdamHyper(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        decoupled=decoupled,
    )
