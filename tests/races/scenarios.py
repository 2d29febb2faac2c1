"""Small runs that between them pass every wait in offload/.

Owns: the model, the budgets and the calls of each scenario, and how its outcome is compared.
Does not: decide the order of events (tests/doubles).
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from offload.concurrency.lanes import Lanes
from offload.concurrency.timeline import Timeline
from offload.config import Config, make_config
from offload.device.host import HostDevice
from offload.disk.io_queue import IoQueue
from offload.enable import make_plan, start
from offload.planning.planner import Plan
from offload.ranks.single import SINGLE_RANK
from offload.session import Session
from offload.units import parse_bytes
from tests.doubles.lane_queue import LaneQueue
from tests.doubles.late import LateLanes
from tests.doubles.lone_ranks import lone_ranks
from tests.doubles.stream_device import StreamDevice, WatchedHost
from tests.doubles.turns import TurnLanes

Outcome = tuple[list[float], str]

# Weights have the first claim on the host: at `state on disk` they are there, at `all on disk` most are not.
BUDGETS = {
    ("bf16", "host"): ("24KiB", "1GiB"),
    ("bf16", "state on disk"): ("24KiB", "220KiB"),
    ("bf16", "all on disk"): ("24KiB", "165KiB"),
    ("bf16", "weights on device"): ("96KiB", "1GiB"),
    ("bf16", "some state on device"): ("420KiB", "1GiB"),
    ("bf16", "all on device"): ("1MiB", "1GiB"),
    ("bf16", "weights on device, state on disk"): ("96KiB", "200KiB"),
    ("fp32", "host"): ("40KiB", "1GiB"),
    ("fp32", "state on disk"): ("40KiB", "300KiB"),
    ("fp32", "all on disk"): ("40KiB", "185KiB"),
}


@dataclass(frozen=True)
class Scenario:
    """What is run."""

    home: str = "host"
    device: str = "host"
    precision: str = "bf16"
    accumulate: int | None = None
    micro_batches: int = 1
    reads: bool = False
    """Read gradients, masters and weights between steps."""
    own_gradients: bool = False
    """Step twice, the second time on gradients that the user has put there."""
    evaluates: bool = False
    """A forward without gradients right before each step; its loss is looked at after."""
    checkpointing: bool = False
    """Every block is recomputed in backward."""
    edits: bool = False
    """Change the masters between backward and step."""
    counts: bool = False
    """Ask for the bytes written, after every step."""
    drops: bool = False
    """Drop the gradients before the last backward of each step."""
    ranks: bool = False
    """As one of several ranks, of which there is only this one."""
    num_blocks: int = 5
    buffers: int = 0
    """As many in every host ring, and four times the slots, instead of what the plan chose: more than it would choose
    where something has to go to disk."""
    steps: int = 4


class Recomputed(nn.Sequential):
    """A block under activation checkpointing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def run(lanes: Lanes, scenario: Scenario, folder: Path) -> Outcome:
    """Steps with clipping; losses and weights."""
    torch.manual_seed(2)
    block = Recomputed if scenario.checkpointing else nn.Sequential
    model = nn.Sequential(*(block(nn.Linear(64, 64), nn.Tanh()) for _ in range(scenario.num_blocks)), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    device_memory, host_memory = BUDGETS[scenario.precision, scenario.home]
    if scenario.ranks:  # where parts of other ranks arrive, beside the rest
        device_memory = f"{parse_bytes(device_memory, name='device_memory') * 3 // 2}B"
    config = make_config(
        device_memory="1GiB" if scenario.buffers else device_memory,
        host_memory="1GiB" if scenario.buffers else host_memory,
        disk=folder,
        disk_space=None,
        precision=scenario.precision,
        max_grad_norm=1.0,
        accumulate=scenario.accumulate,
        wait_timeout_s=5.0,
    )
    devices: list[Any] = []

    def device_of(name: Any, lanes: Lanes) -> Any:
        devices.append({"stream": StreamDevice, "host": WatchedHost, "product": HostDevice}[scenario.device](lanes))
        return devices[0]

    def plan_of(partitions: Any, config: Config, device: Any, kind: Any, disk: Any, ranks: Any) -> Plan:
        budgets = {
            "device_bytes": parse_bytes(device_memory, name="device_memory"),
            "host_bytes": parse_bytes(host_memory, name="host_memory"),
        }
        made = make_plan(partitions, dataclasses.replace(config, **budgets), device, kind, disk, ranks)
        rings: dict[str, Any] = dict.fromkeys(("weight_buffers", "offload_buffers", "step_buffers"), scenario.buffers)
        slots = 4 * made.slot_ring_bytes
        return dataclasses.replace(made, **rings, slot_ring_bytes=slots) if scenario.buffers else made

    queue_of: Any = LaneQueue if isinstance(lanes, LateLanes | TurnLanes) else IoQueue
    session = start(
        model, optimizer, config, "cpu", lanes=lanes, queue_of=queue_of, device_of=device_of, plan_of=plan_of,
        ranks_of=lone_ranks if scenario.ranks else lambda _: SINGLE_RANK,
    )  # fmt: skip
    losses: list[float] = []
    try:
        with devices[0].operations() if scenario.device != "product" else contextlib.nullcontext():
            for loss in steps(session, model, optimizer, scenario):
                losses.append(loss)
        outcome = losses, session.weights_sha256()
    except BaseException:
        session.close(give_back=False)
        raise
    session.close(give_back=scenario.reads)
    return outcome


def steps(session: Session, model: nn.Module, optimizer: torch.optim.Optimizer, scenario: Scenario) -> Iterator[float]:
    """The loop; yields what is compared."""
    inputs = torch.Generator().manual_seed(1)
    for _ in range(scenario.steps):
        for number in range(scenario.micro_batches):
            if scenario.drops and number == scenario.micro_batches - 1:
                optimizer.zero_grad()
            loss = model(torch.randn(4, 64, generator=inputs)).float().square().mean()
            if scenario.reads:
                yield loss.item()
            loss.backward()
        if scenario.reads:
            with _disable_current_modes():  # on the host, at once
                yield from [gradient.sum().item() for gradient in session.gathered_gradients().values()]
        if scenario.edits:
            with _disable_current_modes(), session.gathered() as masters:
                for master in masters.values():
                    master.mul_(0.5)
        with torch.no_grad():
            evaluated = model(torch.ones(4, 64)).float().sum() if scenario.evaluates else torch.zeros(1)
        result = session.step()
        optimizer.zero_grad()
        if scenario.counts:
            yield float(session.metrics()["bytes_moved"]["write"])
        if scenario.evaluates:
            yield evaluated.item()
        if scenario.own_gradients:
            for parameter in model.parameters():
                parameter.grad = torch.full(parameter.shape, 0.01, dtype=parameter.dtype)
            result = session.step()
            optimizer.zero_grad()
        if scenario.reads:
            yield result.grad_norm
            with _disable_current_modes(), session.gathered() as masters:
                yield from [master.sum().item() for master in masters.values()]
            with _disable_current_modes():
                yield int(session.weights_sha256()[:12], 16)
    yield loss.item()


def threads() -> Lanes:
    """The lanes of the product."""
    return Lanes(Timeline(), wait_timeout_s=30.0)
