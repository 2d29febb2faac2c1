"""A session over an emulated device, and the figures of one of its steps.

Owns: the model, the device and the session of the benchmark; what a step took, and what it had to do.
Does not: choose shares or lay out results (overlap.py).
Threads: the training thread.

Note [Bound]: no schedule ends a step before the longest of its parts, compute, transfers or optimizer, and in an
endless row of steps some of it cannot overlap whatever the order. With exact clipping a step begins when the last
gradient is home, and the next forward begins when the first block is stepped and fetched. So

    bound = max(compute, h2d, d2h, optimizer) + d2h of one block + optimizer of one block + h2d of one block

`compute` is measured: the same model without a session, its gradients copied to one buffer, as a device does within
its own memory. `h2d` and `d2h` are bytes by bandwidth, each direction for itself; `optimizer` is what the kernels of
that step took. `serial` is the sum of the same parts: nothing overlaps, and nothing else costs anything.

Note [Equal passes]: forward and backward take the same time. Weights cross the link in both, so a share of the link
holds in each. With a backward of two forwards, weights that take 0.9 of a step would take 1.35 of the forward.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Final

import torch

from benchmarks.commands.timed_model import make_model
from benchmarks.measure.rounds import Contender
from offload.concurrency.lanes import Lanes
from offload.concurrency.timeline import Timeline
from offload.config import make_config
from offload.device.paced import PacedDevice, keep_freed_memory
from offload.enable import start
from offload.report.lane_shares import Share, shares
from offload.session import Session
from offload.units import Tier

MAX_GRAD_NORM: Final = 1.0
ITEMSIZE: Final = 2  # bf16
SLOTS: Final = 6
"""Of the device: three for weights and three for gradients, as a plan wants them."""
FAST_BYTES_PER_S: Final = 1e12
"""A link that never waits."""

LEAD_IN_STEPS: Final = 1
MEASURED_STEPS: Final = 2
CALIBRATION_STEPS: Final = 4
CALIBRATION_SHARE: Final = 0.6


@dataclass(frozen=True, slots=True)
class Setting:
    """What is emulated: seconds of forward (and of backward) of one block, and the link as a share of them."""

    forward_s: float
    transfer_share: float


@dataclass(frozen=True, slots=True)
class StepParts:
    """What one step had to do, and took. Seconds."""

    step_s: float
    h2d_s: float
    d2h_s: float
    optimizer_s: float
    h2d_block_s: float
    d2h_block_s: float
    optimizer_block_s: float

    def bound_s(self, compute_s: float) -> float:
        """Note [Bound]."""
        ends_s = self.d2h_block_s + self.optimizer_block_s + self.h2d_block_s
        return max(compute_s, self.h2d_s, self.d2h_s, self.optimizer_s) + ends_s

    def serial_s(self, compute_s: float) -> float:
        """Note [Bound]."""
        return compute_s + self.h2d_s + self.d2h_s + self.optimizer_s


def mean_of(steps: Sequence[StepParts]) -> StepParts:
    """Part by part."""
    return StepParts(**{name: statistics.mean(asdict(step)[name] for step in steps) for name in asdict(steps[0])})


class OverlapRig:
    """One model twice: plain, and offloaded to an emulated device with weights, gradients and state on the host."""

    def __init__(self, blocks: int, numel: int, seed: int) -> None:
        torch.manual_seed(seed)
        keep_freed_memory()
        self.blocks = blocks
        self.block_bytes = numel * ITEMSIZE
        self.lanes = Lanes(Timeline())
        self.device = PacedDevice(self.lanes, link_bytes_per_s=FAST_BYTES_PER_S)
        self._forward_s = 0.0
        self._x = torch.zeros(8, dtype=torch.bfloat16)
        self._plain = make_model(blocks, numel, self._compute).bfloat16()
        self._packed = [torch.zeros_like(parameter) for parameter in self._plain.parameters()]
        self._model = make_model(blocks, numel, self._compute)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        self.session = self._start()
        self.parts: dict[str, list[StepParts]] = {}
        """Of every run of `step_contender`, in order."""
        self.shares: dict[str, dict[str, Share]] = {}
        """Of the latest run of each."""

    def _start(self) -> Session:
        config = make_config(
            device_memory=SLOTS * self.block_bytes, host_memory=None, disk=None, disk_space=None, precision="bf16",
            max_grad_norm=MAX_GRAD_NORM, accumulate=1, wait_timeout_s=60.0,
        )  # fmt: skip
        session = start(
            self._model, self._optimizer, config, "cpu", lanes=self.lanes, device_of=lambda name, lanes: self.device
        )
        homes = session.plan.bytes_by_kind_and_tier.values()
        if any(by_tier[Tier.DEVICE] or by_tier[Tier.DISK] for by_tier in homes):
            session.close(give_back=False)
            raise AssertionError(f"not everything is at home on the host:\n{session.plan.table()}")
        return session

    def close(self) -> None:
        """End the session; nothing is given back, the model is thrown away."""
        self.session.close(give_back=False)

    # ------------------------------------------------------------------------------------------------- emulated

    def emulate(self, setting: Setting) -> None:
        """From the next block on compute and copies take this long."""
        self._forward_s = setting.forward_s
        seconds = setting.forward_s * setting.transfer_share
        self.device.link.bytes_per_s = self.block_bytes / seconds if seconds else FAST_BYTES_PER_S

    @contextmanager
    def _compute(self, name: str) -> Iterator[None]:
        with self.device.compute_for(self._forward_s, name):
            yield

    # ------------------------------------------------------------------------------------------------- measured

    def calibrate(self) -> float:
        """Seconds that the kernels of one step take, while compute waits and copies cross the link as in the rows."""
        optimizer_s = 0.0
        for _ in range(2):  # the first of these knows nothing, and waits for nothing
            forward_s = optimizer_s / CALIBRATION_SHARE / self.blocks
            self.emulate(Setting(forward_s, CALIBRATION_SHARE))
            optimizer_s = statistics.median(parts.optimizer_s for parts in self._steps(CALIBRATION_STEPS))
        return optimizer_s

    def compute_contender(self, name: str, words: str, forward_s: float) -> Contender:
        """Forward and backward of the plain model."""

        def run() -> float:
            self.emulate(Setting(forward_s, 0.0))
            start_s = time.perf_counter()
            self._plain(self._x).sum().backward()
            with torch.no_grad():
                torch._foreach_copy_(self._packed, [p.grad for p in self._plain.parameters() if p.grad is not None])
            seconds = time.perf_counter() - start_s
            self._plain.zero_grad()
            return seconds

        return Contender(name, words, run)

    def step_contender(self, name: str, words: str, setting: Setting) -> Contender:
        """A step in the middle of a row of equal ones."""
        self.parts[name] = []

        def run() -> float:
            self.emulate(setting)
            mean = mean_of(self._steps(MEASURED_STEPS))
            self.parts[name].append(mean)
            self.shares[name] = shares(self.lanes.timeline.spans())
            return mean.step_s

        return Contender(name, words, run)

    def _steps(self, count: int) -> list[StepParts]:
        for _ in range(LEAD_IN_STEPS):
            self._step()
        self.lanes.timeline.restart()
        found = []
        start_s, before = time.perf_counter(), self._done()
        for _ in range(count):
            self._step()
            stop_s, after = time.perf_counter(), self._done()
            did = {lane: tuple(b - a for a, b in zip(before[lane], after[lane], strict=True)) for lane in after}
            found.append(self._parts(stop_s - start_s, did))
            start_s, before = stop_s, after
        return found

    def _step(self) -> None:
        self._model(self._x).sum().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _done(self) -> dict[str, tuple[float, int]]:
        """Busy seconds and bytes so far."""
        totals = self.lanes.timeline.totals()
        return {
            lane: (totals[lane].busy_s, totals[lane].num_bytes) if lane in totals else (0.0, 0)
            for lane in ("h2d", "step")
        }

    def _parts(self, step_s: float, did: dict[str, tuple[float, ...]]) -> StepParts:
        link = self.device.link
        block_s = link.seconds(self.block_bytes)
        optimizer_s = did["step"][0]
        return StepParts(
            step_s=step_s,
            h2d_s=link.seconds(int(did["h2d"][1])),
            d2h_s=self.blocks * block_s,  # each gradient once; the last of them cross it when the next step has begun
            optimizer_s=optimizer_s,
            h2d_block_s=block_s,
            d2h_block_s=block_s,
            optimizer_block_s=optimizer_s / self.blocks,
        )
