"""Runs a case, and says what came out of it.

Owns: the session under the case's budgets, lanes and device; the operations of its loop; what is compared.
Does not: draw cases (cases.py).
"""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from offload.concurrency.lanes import Lanes
from offload.concurrency.timeline import Timeline
from offload.config import Config, make_config
from offload.device.host import HostDevice
from offload.disk.io_queue import IoQueue
from offload.enable import make_plan, start
from offload.errors import BudgetError
from offload.planning.planner import Plan
from offload.session import Session
from offload.units import GIB
from tests.doubles.clocks import Clocks
from tests.doubles.lane_queue import LaneQueue
from tests.doubles.late import LateLanes
from tests.doubles.smallest_rings import make_smallest_plan
from tests.doubles.stream_device import StreamDevice, WatchedHost
from tests.doubles.turns import TurnLanes, eager, shuffled, slow
from tests.stress.cases import Case, Operation
from tests.stress.models import LENGTH, VOCAB, Model, make_optimizer

BATCH = 2


class InTheMiddle(Exception):
    """What a forward raises that is meant to."""


@dataclass
class Outcome:
    """What must not depend on homes, rings, overlap, lanes or device."""

    numbers: list[float] = field(default_factory=list)
    """Losses, norms and sums, in the order in which they came."""
    hashes: dict[str, str] = field(default_factory=dict)
    """Of weights, masters and moments at the end."""

    def difference(self, expected: "Outcome") -> str:
        """What differs first; empty where nothing does."""
        for index, (ours, theirs) in enumerate(zip(self.numbers, expected.numbers, strict=True)):
            if ours != theirs and not (ours != ours and theirs != theirs):
                return f"number {index} of {len(self.numbers)} is {ours!r}, expected {theirs!r}"
        differing = [name for name in expected.hashes if self.hashes.get(name) != expected.hashes[name]]
        return f"other bits: {differing}" if differing or len(self.hashes) != len(expected.hashes) else ""


def serial(case: Case, folder: Path) -> Outcome:
    """The same loop with everything at home on the device, and nothing overlapped."""
    return run(
        dataclasses.replace(
            case, overlap="off", order="threads", device="product", device_share=1.0, host_share=1.0,
            smallest_rings=False, buffers=0, slots=1.0,
        ),
        folder,
    )  # fmt: skip


def run(case: Case, folder: Path) -> Outcome:
    """Train as the case says."""
    torch.manual_seed(case.seed)
    model = Model(case.kinds, case.width, tied=case.tied).train()
    optimizer = make_optimizer(case.optimizer, model, case.num_groups)
    config = make_config(
        device_memory="1GiB", host_memory="1GiB", disk=folder, disk_space=None, precision=case.precision,
        max_grad_norm=case.max_grad_norm, accumulate=case.accumulate, wait_timeout_s=20.0,
        state_dtype=case.state_dtype, overlap=case.overlap,
    )  # fmt: skip
    lanes = _lanes_of(case)
    devices: list[Any] = []

    def device_of(name: Any, lanes: Lanes) -> Any:
        devices.append({"stream": StreamDevice, "host": WatchedHost, "product": HostDevice}[case.device](lanes))
        return devices[0]

    def plan_of(*arguments: Any) -> Plan:
        return _plan(case, *arguments)

    queue_of: Any = IoQueue if case.order == "threads" else LaneQueue
    session = start(
        model, optimizer, config, "cpu", lanes=lanes, queue_of=queue_of, device_of=device_of, plan_of=plan_of
    )
    outcome = Outcome()
    try:
        loop = Loop(session, model, optimizer, outcome)
        with devices[0].operations() if case.device != "product" else contextlib.nullcontext():
            loop.go_through(case.operations)
        outcome.hashes["weights"] = session.weights_sha256()
        metrics = session.metrics()
        for tier in ("device", "host", "disk"):
            assert metrics["peak_bytes"][tier] <= getattr(session.plan, f"{tier}_bytes"), (tier, metrics["peak_bytes"])
    except BaseException:
        session.close(give_back=False)
        raise
    session.close()
    outcome.hashes |= {name: _hash([p]) for name, p in model.named_parameters()}
    outcome.hashes |= {
        f"state of parameter {index}": _hash([v for _, v in sorted(optimizer.state[p].items())])
        for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"])
    }
    return outcome


class Loop:
    """A user's loop. Each operation is a method."""

    def __init__(self, session: Session, model: Model, optimizer: torch.optim.Optimizer, outcome: Outcome) -> None:
        self._session = session
        self._model = model
        self._optimizer = optimizer
        self._outcome = outcome
        self._pending: list[Tensor] = []
        """Losses that nobody has looked at: looking waits for the device."""

    def go_through(self, operations: Iterable[Operation]) -> None:
        """All of it."""
        for name, argument in operations:
            getattr(self, name)(argument)
        self._look()

    def train(self, argument: tuple[int, Sequence[str]]) -> None:
        """One forward and backward."""
        loss = self._forward(*argument)
        self._pending.append(loss.detach())
        if loss.requires_grad:
            self._session.backward(loss)

    def evaluate(self, route: Sequence[str]) -> None:
        """A forward without gradients."""
        with torch.no_grad():
            self._pending.append(self._forward(7, route))

    def generate(self, count: int) -> None:
        """Forwards one after another, each in the same order."""
        self._model.eval()
        with torch.no_grad():
            for seed in range(count):
                self._pending.append(self._forward(seed, ["run"] * len(self._model.blocks)))
        self._model.train()

    def fail_forward(self, route: Sequence[str]) -> None:
        """A forward that the user's own code ends."""

        def fail(*_: Any) -> None:
            raise InTheMiddle

        handle = self._model.norm.register_forward_pre_hook(fail)
        with contextlib.suppress(InTheMiddle):
            self._forward(5, route)
        handle.remove()

    def step(self, _: None) -> None:
        """The optimizer's step."""
        self._optimizer.step()

    def zero_grad(self, set_to_none: bool) -> None:
        """Drop gradients, or make them zeros."""
        self._optimizer.zero_grad(set_to_none=set_to_none)

    def change_rate(self, factor: float) -> None:
        """As a scheduler does."""
        for group in self._optimizer.param_groups:
            group["lr"] *= factor

    def read_gradients(self, _: None) -> None:
        """All gradients, on the host."""
        self._look()
        with _disable_current_modes():
            gradients = self._session.gathered_gradients()
            self._outcome.numbers += [gradient.double().sum().item() for gradient in gradients.values()]

    def read_weights(self, _: None) -> None:
        """All masters."""
        self._look()
        with _disable_current_modes(), self._session.gathered() as masters:
            self._outcome.numbers += [master.double().sum().item() for master in masters.values()]

    def edit(self, number: int) -> None:
        """The user changes a weight."""
        self._look()
        with _disable_current_modes(), self._session.gathered() as masters:
            masters["embedding.weight"][number] += 0.25

    def state_dict(self, _: None) -> None:
        """What a user would save."""
        self._look()
        with _disable_current_modes():
            state = self._session.state_dict()
            self._outcome.numbers += [value.double().sum().item() for value in state["model"].values()]

    def _forward(self, seed: int, route: Sequence[str]) -> Tensor:
        self._model.route = route
        generator = torch.Generator().manual_seed(seed)
        loss: Tensor = self._model(torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator))
        return loss

    def _look(self) -> None:
        self._outcome.numbers += [loss.item() for loss in self._pending]
        self._pending.clear()


def _lanes_of(case: Case) -> Lanes:
    if case.order == "late":
        return LateLanes()
    if case.order == "shuffled":
        return TurnLanes(shuffled(case.seed), clocks=Clocks())
    if case.order == "checked":
        return TurnLanes(eager, clocks=Clocks())
    if case.order.startswith("slow"):
        return TurnLanes(slow(case.order.removeprefix("slow ")), clocks=Clocks())
    return Lanes(Timeline(), wait_timeout_s=20.0)


def _plan(case: Case, partitions: Any, config: Config, *rest: Any) -> Plan:
    """Budgets between the smallest and plenty, and rings of other sizes than the plan would choose.

    State stays off an accelerator: what is stepped there agrees to within some ulp, not bit for bit.
    """
    device, kind, *others = rest

    def made(device_bytes: int, host_bytes: int) -> Plan:
        budgets = {"device_bytes": device_bytes, "host_bytes": host_bytes}
        by_host = dataclasses.replace(kind, on_accelerator=False)
        plan_of = make_smallest_plan if case.smallest_rings else make_plan
        return plan_of(partitions, dataclasses.replace(config, **budgets), device, by_host, *others)

    def smallest(name: str, *budgets: int) -> int:
        try:
            made(*budgets)
        except BudgetError as error:
            return int(re.findall(rf"smallest {name}\b.*? is (\d+) bytes", str(error))[0])
        return 1  # there is nothing to keep there

    plenty = made(GIB, GIB)
    in_all = plenty.device_bytes + plenty.host_bytes
    device_bytes = _between(smallest("device_memory", 1, GIB), in_all, case.device_share)
    host_bytes = _between(smallest("host_memory", device_bytes, 1), in_all, case.host_share)
    plan = made(device_bytes, host_bytes)
    more = case.buffers
    grown = dataclasses.replace(
        plan,
        step_buffers=plan.step_buffers + more,
        weight_buffers=plan.weight_buffers + more,
        offload_buffers=plan.offload_buffers + more,
        slot_ring_bytes=int(plan.slot_ring_bytes * case.slots),
    )
    buffer_bytes = plan.step_buffer_bytes + plan.weight_buffer_bytes + plan.offload_buffer_bytes
    return dataclasses.replace(
        grown,
        device_bytes=plan.device_bytes + grown.slot_ring_bytes - plan.slot_ring_bytes,
        host_bytes=plan.host_bytes + more * buffer_bytes,
    )


def _between(low: int, high: int, share: float) -> int:
    return low + int(share * max(0, high - low))


def _hash(values: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
