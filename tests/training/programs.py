"""Small training programs of many kinds, run in any legal order of events.

Owns: the model whose blocks can be called in any order, the operations of a program, and how it is run.
Does not: decide the order of events (tests/doubles) or what a program should give (the tests).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.concurrency.lanes import Lanes
from offload.concurrency.timeline import Timeline
from offload.config import Config, make_config
from offload.device.host import HostDevice
from offload.disk.io_queue import IoQueue
from offload.disk.transfer import REAL, OsFunctions
from offload.enable import make_plan, start
from offload.planning.planner import Plan
from offload.session import Session
from offload.units import parse_bytes
from tests.doubles.lane_queue import LaneQueue
from tests.doubles.late import LateLanes
from tests.doubles.turns import TurnLanes

NUM_BLOCKS = 5

BUDGETS = {"host": ("24KiB", "1GiB"), "state on disk": ("24KiB", "220KiB"), "all on disk": ("24KiB", "165KiB")}
"""Weights have the first claim on the host."""


class Blocks(nn.Module):
    """Blocks of one partition each, called in any order; those in `without_gradient` run under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(NUM_BLOCKS))
        self.head = nn.Linear(64, 8)

    def forward(
        self, x: torch.Tensor, order: Sequence[int] = range(NUM_BLOCKS), without_gradient: Sequence[int] = ()
    ) -> torch.Tensor:
        for number in order:
            with torch.no_grad() if number in without_gradient else contextlib.nullcontext():
                x = self.blocks[number](x)
        return self.head(x).float().square().mean()


class Run:
    """A session and its loop, one operation after another."""

    def __init__(self, model: Blocks, optimizer: torch.optim.Optimizer, session: Session) -> None:
        self.model = model
        self.optimizer = optimizer
        self.session = session
        self.seen: list[float] = []
        """Numbers that must not depend on the order of events."""
        self._inputs = torch.Generator().manual_seed(1)

    def forward(self, **calls: Any) -> torch.Tensor:
        loss = self.model(torch.randn(4, 64, generator=self._inputs), **calls)
        self.seen.append(loss.item())
        return loss

    def backward(self, **calls: Any) -> None:
        self.session.backward(self.forward(**calls))

    def step(self) -> None:
        self.session.step()
        self.optimizer.zero_grad()

    def train(self, **calls: Any) -> None:
        self.backward(**calls)
        self.step()

    def evaluate(self) -> None:
        with torch.no_grad():
            self.forward()

    def drop_gradients(self) -> None:
        self.backward()
        self.optimizer.zero_grad()

    def overflow(self) -> None:
        """A gradient that is not finite: the step is skipped."""
        self.session.backward(self.forward() * float("inf"))
        self.step()

    def break_off(self) -> None:
        """A backward that ends by an exception in its middle."""

        def stop(_: torch.Tensor) -> None:
            raise KeyError("stop")

        loss = self.forward()
        handle = self.model.blocks[2][0].weight.register_hook(stop)
        with contextlib.suppress(KeyError):
            loss.backward()
        handle.remove()
        self.optimizer.zero_grad()

    def edit(self) -> None:
        """Between backward and step somebody changes the masters."""
        self.backward()
        with self.session.gathered() as masters:
            for master in masters.values():
                master.mul_(0.75)
        self.step()

    def step_twice(self) -> None:
        """The second step is over gradients of the user's own."""
        self.train()
        for parameter in self.model.parameters():
            parameter.grad = torch.full(parameter.shape, 0.01, dtype=parameter.dtype)
        self.step()

    def accumulate(self) -> None:
        self.backward()
        self.evaluate()
        self.train()


OPERATIONS: dict[str, Callable[[Run], None]] = {
    "train": Run.train,
    "other order": lambda run: run.train(order=(3, 4, 0, 1, 2)),
    "reversed": lambda run: run.train(order=range(NUM_BLOCKS - 1, -1, -1)),
    "first block without gradient": lambda run: run.train(without_gradient=(0,)),
    "only the head": lambda run: run.train(order=()),
    "evaluate": Run.evaluate,
    "drop gradients": Run.drop_gradients,
    "overflow": Run.overflow,
    "break off": Run.break_off,
    "edit": Run.edit,
    "step twice": Run.step_twice,
    "accumulate": Run.accumulate,
    "step without gradients": Run.step,
}


@contextlib.contextmanager
def running(
    lanes: Lanes, home: str, folder: Path, *, step_buffers: int = 0, os_functions: OsFunctions = REAL, **options: Any
) -> Iterator[Run]:
    """A session with these lanes. `step_buffers`: instead of what the plan chose."""
    torch.manual_seed(2)
    model = Blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    device_memory, host_memory = BUDGETS[home]
    more = (
        {"device_memory": "1GiB", "host_memory": "1GiB"} if step_buffers else {}
    )  # more staging buffers than would fit
    settings = {
        "device_memory": device_memory, "host_memory": host_memory, "disk": folder, "disk_space": None,
        "precision": "bf16", "max_grad_norm": 1.0, "accumulate": None, "wait_timeout_s": 5.0,
    }  # fmt: skip
    device_memory, host_memory = options.get("device_memory", device_memory), options.get("host_memory", host_memory)
    config = make_config(**(settings | options | more))

    def plan_of(partitions: Any, config: Config, device: Any, kind: Any, disk: Any, ranks: Any) -> Plan:
        budgets = {
            "device_bytes": parse_bytes(device_memory, name="device_memory"),
            "host_bytes": parse_bytes(host_memory, name="host_memory"),
        }
        plan = make_plan(partitions, dataclasses.replace(config, **budgets), device, kind, disk, ranks)
        return dataclasses.replace(plan, step_buffers=step_buffers) if step_buffers else plan

    in_turns = isinstance(lanes, LateLanes | TurnLanes)
    queue_of: Any = partial(LaneQueue if in_turns else IoQueue, os_functions=os_functions)
    session = start(
        model, optimizer, config, "cpu", lanes=lanes, queue_of=queue_of, plan_of=plan_of,
        device_of=lambda name, lanes: HostDevice(lanes),
    )  # fmt: skip
    try:
        yield Run(model, optimizer, session)
    except BaseException:
        session.close(give_back=False)
        raise
    session.close()


def outcome(lanes: Lanes, home: str, folder: Path, program: Sequence[str], **options: Any) -> tuple[list[float], str]:
    """What a program has seen, and the weights after it."""
    with running(lanes, home, folder, **options) as run:
        for name in program:
            OPERATIONS[name](run)
        return run.seen, run.session.weights_sha256()


def threads() -> Lanes:
    """The lanes of the product."""
    return Lanes(Timeline(), wait_timeout_s=30.0)
