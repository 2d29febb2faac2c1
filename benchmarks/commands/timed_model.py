"""A model of equal blocks whose compute is a timed wait.

Owns: the blocks, and gradients of full size for every parameter.
Does not: wait (paced.py), train (overlap_rig.py, hook_costs.py).
Threads: the training thread.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn

PARAMETERS_PER_BLOCK: Final = 12
"""As of a transformer: four or more matrices, their biases, two norms."""

GRADIENT: Final = 1e-3

Compute = Callable[[str], AbstractContextManager[Any]]
"""`with compute("forward"):` takes as long as the forward of one block is to take."""


def no_wait(name: str) -> AbstractContextManager[None]:
    """A `Compute` that takes no time."""
    return nullcontext()


class _Work(torch.autograd.Function):
    """As few operations as a forward and a backward can have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: Compute, *parameters: Tensor) -> Tensor:
        ctx.compute = compute
        ctx.save_for_backward(*parameters)
        with compute("forward"):
            return x + parameters[0][0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        with ctx.compute("backward"):
            own = [torch.full_like(parameter, GRADIENT) for parameter in ctx.saved_tensors]
            return gradients[0] * 1, None, *own


class TimedBlock(nn.Module):
    """One block."""

    def __init__(self, numel: int, compute: Compute) -> None:
        super().__init__()
        self._compute = compute
        for index in range(PARAMETERS_PER_BLOCK):
            self.register_parameter(f"p{index}", nn.Parameter(torch.zeros(numel // PARAMETERS_PER_BLOCK)))

    def forward(self, x: Tensor) -> Tensor:
        """Adds one element of one parameter, and takes its time."""
        result: Tensor = _Work.apply(x, self._compute, *self._parameters.values())  # type: ignore[no-untyped-call]
        return result


def make_model(blocks: int, numel: int, compute: Compute = no_wait) -> nn.Sequential:
    """`blocks` blocks of `numel` parameters each."""
    return nn.Sequential(*(TimedBlock(numel, compute) for _ in range(blocks)))
