"""Small runs that between them pass every wait in offload/.

Owns: the model, the budgets and the calls of each scenario, and how its outcome is compared.
Does not: decide the order of events (tests/doubles).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from offload.config import make_config
from offload.device import make_device
from offload.disk.io_queue import IoQueue, LaneQueue
from offload.lanes import Lanes
from offload.session import Session
from offload.start import start
from offload.timeline import Timeline
from tests.doubles.late import LateLanes
from tests.doubles.stream_device import StreamDevice
from tests.doubles.turns import TurnLanes

Outcome = tuple[list[float], str]

# Weights have the first claim on the host: at `state on disk` they are there, at `all on disk` most are not.
BUDGETS = {
    ("bf16", "host"): ("24KiB", "1GiB"),
    ("bf16", "state on disk"): ("24KiB", "220KiB"),
    ("bf16", "all on disk"): ("24KiB", "165KiB"),
    ("bf16", "weights on device"): ("1MiB", "1GiB"),
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
    steps: int = 4


def run(lanes: Lanes, scenario: Scenario, folder: Path) -> Outcome:
    """Steps with clipping; losses and weights."""
    torch.manual_seed(2)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(5)), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    device_memory, host_memory = BUDGETS[scenario.precision, scenario.home]
    config = make_config(
        device_memory=device_memory,
        host_memory=host_memory,
        disk=folder,
        disk_space=None,
        precision=scenario.precision,
        max_grad_norm=1.0,
        accumulate=scenario.accumulate,
        wait_timeout_s=5.0,
    )
    devices: list[StreamDevice] = []

    def stream_device(name: Any, lanes: Lanes) -> StreamDevice:
        devices.append(StreamDevice(lanes))
        return devices[0]

    device_of: Any = stream_device if scenario.device == "stream" else make_device
    queue_of: Any = LaneQueue if isinstance(lanes, LateLanes | TurnLanes) else IoQueue
    session = start(model, optimizer, config, "cpu", lanes=lanes, queue_of=queue_of, device_of=device_of)
    losses: list[float] = []
    try:
        with devices[0].operations() if devices else contextlib.nullcontext():
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
        for _ in range(scenario.micro_batches):
            loss = model(torch.randn(4, 64, generator=inputs)).float().square().mean()
            if scenario.reads:
                yield loss.item()
            loss.backward()
        if scenario.reads:
            with _disable_current_modes():  # on the host, at once
                yield from [gradient.sum().item() for gradient in session.gathered_gradients().values()]
        result = session.step()
        optimizer.zero_grad()
        if scenario.reads:
            yield result.grad_norm
            with _disable_current_modes(), session.gathered() as masters:
                yield from [master.sum().item() for master in masters.values()]
    yield loss.item()


def threads() -> Lanes:
    """The lanes of the product."""
    return Lanes(Timeline(), wait_timeout_s=30.0)
