"""A model whose step is all of its work: blocks of one parameter each, with gradients that cost almost nothing.

Owns: the model, and the plan that puts its state where a benchmark wants it.
Does not: time anything (step.py).
Threads: those of a session.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

import offload
from offload.config import Config, make_config
from offload.device.protocol import Device
from offload.enable import make_plan, start
from offload.errors import BudgetError
from offload.model.partitions import Partition
from offload.optimizer.kinds import OptimizerKind, splits
from offload.planning.disk_settings import DiskSettings
from offload.planning.planner import Plan
from offload.planning.rings import WANTED
from offload.ranks.protocol import Ranks
from offload.session import Session
from offload.storage.state_tensors import record_bytes
from offload.units import Tier, format_bytes

StateHome = Literal["disk", "host"]

BLOCK_NUMEL: Final = 8 * 1024 * 1024
"""Parameters of a block: four chunks of full size."""
INIT_STD: Final = 0.02
GRADIENT_STD: Final = 1e-3
GRADIENT_PATTERN_NUMEL: Final = 65_536


class _Touch(torch.autograd.Function):
    """Passes its input through; the weight's gradient is a repeated pattern, other in every backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.like = (weight.numel(), weight.dtype)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        numel, dtype = ctx.like
        pattern = torch.randn(GRADIENT_PATTERN_NUMEL, dtype=dtype).mul_(GRADIENT_STD)
        return gradient, pattern.repeat(-(-numel // GRADIENT_PATTERN_NUMEL))[:numel]


class TouchBlock(nn.Module):
    """One parameter of `numel` elements."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(numel))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        touched: Tensor = _Touch.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return touched


def make_model(num_parameters: int) -> nn.Sequential:
    """Blocks of BLOCK_NUMEL parameters, the last one smaller; deferred."""
    numels = [BLOCK_NUMEL] * (num_parameters // BLOCK_NUMEL)
    if num_parameters % BLOCK_NUMEL:
        numels.append(num_parameters % BLOCK_NUMEL)
    with offload.deferred_init():
        return nn.Sequential(*(TouchBlock(numel) for numel in numels))


def make_gradients(model: nn.Module) -> None:
    """One forward and backward."""
    model(torch.ones(1, requires_grad=True)).sum().backward()


def make_session(
    model: nn.Module, *, state: StateHome, folders: Sequence[str], precision: str, state_dtype: str
) -> tuple[Session, torch.optim.Optimizer]:
    """Weights and gradients stored on the host, and state there or on disk. Raises BudgetError where that fails."""
    config = make_config(
        device_memory="1GiB", host_memory=None, disk=list(folders), disk_space=None, precision=precision,
        max_grad_norm=1.0, accumulate=1, wait_timeout_s=600.0, state_dtype=state_dtype,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return start(model, optimizer, config, "cpu", plan_of=_plan_for(state)), optimizer


def _plan_for(state: StateHome) -> Any:
    def plan_of(
        partitions: Sequence[Partition],
        config: Config,
        device: Device,
        kind: OptimizerKind,
        disk: DiskSettings,
        ranks: Ranks,
    ) -> Plan:
        itemsize = config.precision.dtype.itemsize
        block_bytes = max(p.trainable.numel for p in partitions) * itemsize
        # Two slots of weights and two of gradients: nothing finds a home on the device.
        on_device = min(4, len(partitions)) * block_bytes
        budgets = replace(config, device_bytes=on_device, host_bytes=1 << 60, disk_bytes=1 << 60)
        everything = make_plan(partitions, budgets, device, kind, disk)
        if state == "host":
            made = everything
        else:
            state_bytes = everything.bytes_by_kind_and_tier["state"][Tier.HOST]
            state_tensors = kind.state_tensors(split=splits(config.precision, weights_on_device=False))
            buffer_bytes = record_bytes(
                state_tensors, min(everything.chunk_numel, max(p.trainable.numel for p in partitions))
            )
            # To the byte: with less, rings or chunks would shrink; with more, a chunk of state would stay.
            bare = everything.host_bytes - state_bytes
            for num_buffers in range(max(WANTED["step"], 2 + -(-disk.in_flight_bytes // buffer_bytes)), 0, -1):
                host_bytes = bare + num_buffers * buffer_bytes
                made = make_plan(partitions, replace(budgets, host_bytes=host_bytes), device, kind, disk)
                if not made.bytes_by_kind_and_tier["state"][Tier.HOST]:
                    break  # else so many staging buffers would be too large a part of the budget
        if made.host_bytes > (config.host_bytes or 0):
            raise BudgetError(
                f"state on the {state} needs {format_bytes(everything.host_bytes)} of host memory, "
                f"{format_bytes(config.host_bytes or 0)} are free; ask for fewer --params."
            )
        return made

    return plan_of
