"""The ledger's peak on the device is the plan's formula, to the byte, where a run fills the ring for slots."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload.config import make_config
from offload.enable import PlanOf, make_plan, start
from offload.planning.on_device import SLOT_ALIGN_BYTES
from offload.session import Session
from offload.units import Tier, round_up
from tests.doubles.smallest_rings import make_smallest_plan

WIDTH = 64
BLOCKS = 6


def equal_blocks() -> nn.Module:
    """Every partition has the same slot: whatever the number of slots, they fill the ring."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(BLOCKS)))


def half_frozen_blocks() -> nn.Module:
    """The gradient slot is smaller than the slot."""
    model = equal_blocks()
    for block in model:
        block.append(nn.Linear(WIDTH, WIDTH).requires_grad_(False))
    return model


def tied_blocks() -> nn.Module:
    """The last block uses the first one's weights: one partition, used at both ends."""
    model = equal_blocks()
    model[-1][0].weight, model[-1][0].bias = model[0][0].weight, model[0][0].bias
    return model


MODELS = {"equal": equal_blocks, "half frozen": half_frozen_blocks, "tied": tied_blocks}


def train(
    model: nn.Module, device_bytes: int, folder: Path, plan_of: PlanOf = make_plan, **options: Any
) -> tuple[Session, dict[str, Any]]:
    settings: dict[str, Any] = {"host_memory": "1GiB", "precision": "fp32", "accumulate": 1} | options
    config = make_config(
        device_memory=device_bytes, disk=folder, disk_space=None, max_grad_norm=None, wait_timeout_s=60, **settings
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with start(model, optimizer, config, "cpu", plan_of=plan_of) as session:
        for seed in range(3):
            x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))
            model(x.requires_grad_()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return session, session.metrics()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("num_slots", [2, 3, 5, 8])
@pytest.mark.parametrize("name", MODELS)
def test_the_peak_on_the_device_is_homes_and_slots_to_the_byte(
    name: str, num_slots: int, precision: str, tmp_path: Path
) -> None:
    model = MODELS[name]()
    itemsize = 4 if precision == "fp32" else 2
    slot_bytes = sum(p.numel() for p in model[1].parameters()) * itemsize
    budget = num_slots * round_up(slot_bytes, SLOT_ALIGN_BYTES)
    session, metrics = train(model, budget, tmp_path, precision=precision)
    plan = session.plan
    # Weights in slots, gradients in theirs, and whatever of weights, gradients and state is at home there.
    at_home = sum(by_tier[Tier.DEVICE] for by_tier in plan.bytes_by_kind_and_tier.values())
    expected = plan.slot_ring_bytes + plan.gradient_slots * plan.gradient_slot_bytes + at_home
    assert plan.device_bytes == expected <= budget
    assert metrics["peak_bytes"]["device"] == expected


@pytest.mark.parametrize("plan_of", [make_plan, make_smallest_plan])
def test_with_everything_on_disk_it_is_the_slots_alone(plan_of: PlanOf, tmp_path: Path) -> None:
    model = equal_blocks()
    slot_bytes = sum(p.numel() for p in model[0].parameters()) * 4
    session, metrics = train(model, 4 * slot_bytes, tmp_path, plan_of, host_memory="300KiB")
    plan = session.plan
    assert plan.bytes_by_kind_and_tier["state"][Tier.DISK] > 0
    assert metrics["peak_bytes"]["device"] == plan.device_bytes
    assert metrics["peak_bytes"]["disk"] == plan.disk_bytes
