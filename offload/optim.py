"""Optimizers that torch does not have, as ordinary torch optimizers.

Owns: Lion, for any parameters on any device. Inside an offload session its fused kernel steps it instead.
Does not: offload anything.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Lion"]


class Lion(torch.optim.Optimizer):
    """Lion, of Chen et al., Symbolic Discovery of Optimization Algorithms (2023), algorithm 2.

    params: parameters or groups, as for every torch optimizer.
    lr: three to ten times smaller than AdamW's, as its authors advise.
    betas: of the direction that is taken the sign of, and of the momentum.
    weight_decay: decoupled, times lr; three to ten times larger than AdamW's.
    maximize: climb instead of descend.

    Raises ValueError for numbers out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"Lion: {name}={value} must be at least 0.")
        for beta in betas:
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Lion: betas={betas} must be at least 0 and less than 1.")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all parameters that have a gradient; the closure's value, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = -parameter.grad if group["maximize"] else parameter.grad
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                momentum = state["exp_avg"]
                direction = (momentum * beta1 + gradient * (1.0 - beta1)).sign_()
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-float(group["lr"]))
                momentum.mul_(beta2).add_(gradient, alpha=1.0 - beta2)
        return loss
