"""The link to the accelerator: our copies, while the optimizer's kernel runs, against torch's plain pinned copies.

    python -m benchmarks.gpu.link --json benchmarks/results/gpu_link.json
    python -m benchmarks.gpu.link --device cpu --mib 32 --json out.json

Owns: what is copied in which direction, the kernel beside it, the ratio to plain copies.
Does not: copy in any way of its own: our copies go through the device's queues, from registered regions, in chunks.
Threads: the main thread issues; the kernel runs on its workers.

The target: each direction at least 95 % of a plain copy of the same bytes from torch's own pinned memory, both together
at least 95 % of both plain ones together. Rounds alternate, so that a machine that slows down slows both.
`--device cpu` runs the same code on the host device: it shows that it works, and nothing of a link.
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.commands.adam_arrays import AdamArrays
from benchmarks.commands.adam_contenders import MODES, OurStep
from benchmarks.measure.chart import Bar, bar_chart
from benchmarks.measure.result import check_result_path, command_of, versions, write_result
from offload.concurrency.lanes import Lanes, Reason
from offload.concurrency.timeline import Timeline
from offload.device.choose import make_device
from offload.device.protocol import Device
from offload.kernels.workers import Workers
from offload.memory.ledger import Ledger
from offload.memory.region import Region
from offload.planning.hardware import training_threads
from offload.report.console import Console, format_table
from offload.report.results import machine_facts
from offload.units import MIB

CHUNK_BYTES: Final = 4 * MIB
"""Of 2 Mi elements in 16 bit: what one copy of ours moves."""
KERNEL_NUMEL: Final = 32 * 1024 * 1024
TARGET: Final = 0.95
WAYS: Final[dict[str, tuple[str, ...]]] = {"h2d": ("h2d",), "d2h": ("d2h",), "both": ("h2d", "d2h")}


class Plain:
    """torch's way: pinned tensors, one copy of all bytes on a stream for each direction."""

    def __init__(self, device: str, num_bytes: int) -> None:
        pinned = device != "cpu"
        self._device = device
        self._host = {way: torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pinned) for way in ("h2d", "d2h")}
        self._there = {way: torch.zeros(num_bytes, dtype=torch.uint8, device=device) for way in ("h2d", "d2h")}
        self._streams = {way: torch.cuda.Stream() for way in ("h2d", "d2h")} if pinned else {}

    def run(self, ways: tuple[str, ...]) -> float:
        """Seconds."""
        start_s = time.perf_counter()
        for way in ways:
            source, destination = self._host[way], self._there[way]
            if way == "d2h":
                source, destination = destination, source
            if self._streams:
                with torch.cuda.stream(self._streams[way]):
                    destination.copy_(source, non_blocking=True)
            else:
                destination.copy_(source)
        for stream in self._streams.values():
            stream.synchronize()
        return time.perf_counter() - start_s


@dataclass
class Ours:
    """The device's queues, from registered regions, in chunks."""

    device: Device
    lanes: Lanes
    host: dict[str, Tensor]
    there: dict[str, Tensor]

    def run(self, ways: tuple[str, ...]) -> float:
        """Seconds."""
        start_s = time.perf_counter()
        queues = {"h2d": self.device.h2d, "d2h": self.device.d2h}
        for offset in range(0, next(iter(self.host.values())).numel(), CHUNK_BYTES):
            chunk = slice(offset, offset + CHUNK_BYTES)
            for way in ways:
                source, destination = self.host[way][chunk], self.there[way][chunk]
                if way == "d2h":
                    source, destination = destination, source
                queues[way].copy(destination, source, "link")
        for way in ways:
            # Without this the clock stops while bytes are still on their way.
            self.lanes.wait(queues[way].record().future, Reason.DRAIN)
        return time.perf_counter() - start_s


class Kernel:
    """The optimizer's step, over and over while it is entered; counts its steps."""

    def __init__(self, numel: int, seed: int) -> None:
        self._workers = Workers(training_threads())
        self._step = OurStep(
            AdamArrays(numel, seed), next(mode for mode in MODES if mode.name == "split"), self._workers
        )
        self._step.step()  # compiled
        self._numel = numel
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.num_steps = 0
        self.seconds = 0.0

    def __enter__(self) -> "Kernel":
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="kernel")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def parameters_per_s(self) -> float:
        """While copies ran beside it."""
        return self.num_steps * self._numel / self.seconds if self.seconds else 0.0

    def close(self) -> None:
        """End the workers."""
        self._workers.close()

    def _run(self) -> None:
        start_s = time.perf_counter()
        while not self._stop.is_set():
            self._step.step()
            self.num_steps += 1
        self.seconds += time.perf_counter() - start_s


def measure(options: argparse.Namespace, ours: Ours, plain: Plain, kernel: Kernel) -> dict[str, dict[str, list[float]]]:
    """Seconds by way and contender, round by round."""
    contenders: dict[str, Callable[[tuple[str, ...]], float]] = {"plain": plain.run, "ours": ours.run}
    samples: dict[str, dict[str, list[float]]] = {}
    for way, ways in WAYS.items():
        samples[way] = {name: [] for name in (*contenders, "ours, kernel running")}
        for run in contenders.values():
            run(ways)  # touched, woken
        for _ in range(options.rounds):
            for name, run in contenders.items():
                samples[way][name].append(run(ways))
            with kernel:
                samples[way]["ours, kernel running"].append(ours.run(ways))
    return samples


def options_of_this_run() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--mib", type=int, default=1024, metavar="N", help="in each direction (default: %(default)s)")
    add("--rounds", type=int, default=10, metavar="N")
    add("--seed", type=int, default=0, metavar="N")
    add("--json", required=True, metavar="PATH", help="a chart is written beside it (.svg)")
    return parser.parse_args()


def main() -> int:
    """Measure, show, write; 1 where a target is missed."""
    options = options_of_this_run()
    check_result_path(options.json)
    num_bytes = options.mib * MIB
    lanes = Lanes(Timeline())
    device = make_device(options.device, lanes)
    ledger = Ledger({})
    with (
        Region(num_bytes, owner="h2d", ledger=ledger, register=device.register) as up,
        Region(num_bytes, owner="d2h", ledger=ledger, register=device.register) as down,
    ):
        there = {way: device.allocate(num_bytes) for way in ("h2d", "d2h")}
        ours = Ours(device, lanes, {"h2d": up.tensor, "d2h": down.tensor}, there)
        kernel = Kernel(KERNEL_NUMEL if options.device != "cpu" else KERNEL_NUMEL // 16, options.seed)
        samples = measure(options, ours, Plain(options.device, num_bytes), kernel)
        kernel.close()
        del ours
        lanes.close()
        device.close()
    gb = {way: num_bytes * len(ways) / 1e9 for way, ways in WAYS.items()}
    rates = {
        way: {name: gb[way] / statistics.median(seconds) for name, seconds in by_name.items()}
        for way, by_name in samples.items()
    }
    shares = {
        way: {name: by_name[name] / by_name["plain"] for name in by_name if name != "plain"}
        for way, by_name in rates.items()
    }
    met = {way: share["ours, kernel running"] >= TARGET for way, share in shares.items()}
    result: dict[str, Any] = {
        "benchmark": "gpu_link",
        "command": f"python -m benchmarks.gpu.link{command_of(sys.argv[1:]).removeprefix('offload')}",
        "device": options.device if options.device != "cpu" else "cpu: no link, a try of the code",
        "machine": machine_facts(),
        "versions": versions(("torch", "numpy", "numba")),
        "seconds": samples,
        "plain_gb_per_s": {way: by_name["plain"] for way, by_name in rates.items()},
        "gb_per_s": rates,
        "share_of_plain": shares,
        "kernel_parameters_per_s": kernel.parameters_per_s(),
        "target": TARGET,
        "met": met,
    }
    names = list(next(iter(rates.values())))
    console = Console(sys.stdout)
    rows = [
        [way, *(f"{rates[way][name]:.1f}" for name in names), f"{shares[way]['ours, kernel running']:.0%}"]
        for way in rates
    ]
    console.line(format_table(["GB/s", *names, "of plain"], rows))
    bars = [
        Bar(f"{way}, {name}", *[gb[way] / part for part in quartiles(samples[way][name])], name)
        for way in rates
        for name in names
    ]
    write_result(options.json, result, bar_chart("Copies over the link", bars, axis="GB/s, higher is better"))
    return 0 if all(met.values()) or options.device == "cpu" else 1


def quartiles(seconds: list[float]) -> list[float]:
    """Median, and the quartiles that make the low and the high rate."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return [middle, high, low]


if __name__ == "__main__":
    raise SystemExit(main())
