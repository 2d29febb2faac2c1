"""What the runtime costs the thread that trains, without any transfer.

Owns: the comparison of a model in a session, everything at home on the device, with the same model without one.
Does not: lay out results (overlap.py).
Threads: the training thread; the lanes are idle whenever a phase begins.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import nn

from benchmarks.commands.timed_model import make_model
from benchmarks.measure.progress import RoundProgress
from benchmarks.measure.rounds import WARM_UP_ROUNDS
from offload.concurrency.lanes import Lanes
from offload.concurrency.timeline import Timeline
from offload.config import make_config
from offload.enable import start

SMALL_NUMEL: Final = 12 * 64
"""Parameters of a block: so few that no time goes into their bytes."""

PHASES: Final = ("forward", "backward")


def hook_costs(partitions: int, rounds: int, progress: RoundProgress) -> dict[str, list[float]]:
    """Microseconds a partition of each round, by phase: `forward` and `backward` as a clock shows them, and `…_cpu`
    without what the thread waited for others."""
    plain, inside = make_model(partitions, SMALL_NUMEL).bfloat16(), make_model(partitions, SMALL_NUMEL)
    optimizer = torch.optim.AdamW(inside.parameters(), lr=1e-4)
    lanes = Lanes(Timeline())
    config = make_config(
        device_memory="1GiB", host_memory="1GiB", disk=None, disk_space=None, precision="bf16", max_grad_norm=1.0,
        accumulate=1, wait_timeout_s=60.0,
    )  # fmt: skip
    samples: dict[str, list[float]] = {f"{phase}{kind}": [] for kind in ("", "_cpu") for phase in PHASES}
    with start(inside, optimizer, config, "cpu", lanes=lanes) as session:
        if not all(homes.weights_on_device for homes in session.plan.homes):
            raise AssertionError("a model of some MiB does not fit a device of 1 GiB")
        for number in range(-WARM_UP_ROUNDS, rounds):
            without = _phases(plain, _nothing)
            plain.zero_grad()
            within = _phases(inside, lanes.drain)
            optimizer.step()
            optimizer.zero_grad()
            lanes.drain()
            progress.ran(f"{partitions} partitions", sum(without[:2]) + sum(within[:2]))
            if number >= 0:
                for name, more, less in zip(samples, within, without, strict=True):
                    samples[name].append((more - less) / partitions * 1e6)
    return samples


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    """Of every phase."""
    return {name: statistics.median(values) for name, values in samples.items()}


def _phases(model: nn.Module, settle: Callable[[], None]) -> Sequence[float]:
    """Seconds of forward and backward by the clock, then of CPU; `settle` before each."""
    x = torch.zeros(8, dtype=torch.bfloat16)
    settle()
    times = [_now()]
    loss = model(x).sum()
    times.append(_now())
    settle()
    times.append(_now())
    loss.backward()
    times.append(_now())
    (a, cpu_a), (b, cpu_b), (c, cpu_c), (d, cpu_d) = times
    return b - a, d - c, cpu_b - cpu_a, cpu_d - cpu_c


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


def _nothing() -> None:
    """Without a session there is nothing to settle."""
