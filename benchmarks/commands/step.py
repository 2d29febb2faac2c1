"""`offload bench step`: the optimizer step alone, through a session's own parts, against what the machine allows.

Owns: the options, the bound, the ratio of both.
Does not: step (the session does), or measure disk and memory (offload/cli/disk_file.py, adam_contenders.py).
Threads: the main thread, and those of a session.

Note [Bound]: a step reads and writes its state once, beside gradients and weights. It cannot end before the kernel has
moved its bytes at the rate of the reference of `bench adam`, with the threads that training has, nor before the disk
has moved its bytes at the best rate of mixed traffic. Both rates are measured in every round, around the step, and
`step_vs_bound` is the median of the rounds' ratios.
"""

import argparse
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.commands.adam_arrays import AdamArrays
from benchmarks.commands.adam_contenders import REFERENCE_BYTES, ReferenceStreams
from benchmarks.commands.step_model import make_gradients, make_model, make_session
from benchmarks.measure.chart import Bar, bar_chart
from benchmarks.measure.comparison import describe_run
from benchmarks.measure.options import add_round_options
from benchmarks.measure.progress import make_round_progress
from benchmarks.measure.result import check_result_path, write_result
from benchmarks.measure.rounds import quartiles_of
from offload.cli.disk_file import UNIT_BYTES, DiskFile, Setting
from offload.cli.gpt import parse_count
from offload.config import STATE_DTYPES, Precision
from offload.errors import ConfigError
from offload.kernels.workers import Workers
from offload.planning.hardware import training_threads
from offload.planning.record import load_record
from offload.report.console import Console, format_table
from offload.report.results import STANDARD_OUTPUT
from offload.session import Session
from offload.storage.state_tensors import is_split
from offload.units import GIB, MIB, format_bytes, round_up

WARM_UP: Final = 1
"""The first step reads no moments, and compiles what is not in the cache."""
REFERENCE_NUMEL: Final = 2**24
REFERENCE_PASSES: Final = 4
DISK_FILE_BYTES: Final = 1 * GIB
DISK_RUN_BYTES: Final = 512 * MIB
SETTINGS: Final = (Setting(8 * MIB, 8), Setting(16 * MIB, 8), Setting(4 * MIB, 16), Setting(4 * MIB, 8))
TRIES: Final = 2


@dataclass
class Samples:
    """Of every round, in seconds and bytes a second."""

    step_s: list[float] = field(default_factory=list)
    memory_rate: list[float] = field(default_factory=list)
    disk_rate: list[float] = field(default_factory=list)
    bound_s: list[float] = field(default_factory=list)
    disk_bytes: list[int] = field(default_factory=list)


def add_command(benchmarks: "argparse._SubParsersAction[Any]") -> None:
    """Add `step` to `offload bench`."""
    words = "the optimizer step alone, with its state on disk or on the host, against the bound of disk and memory"
    parser = benchmarks.add_parser("step", help=words, description=words)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--state", choices=("disk", "host"), default="disk", help="home of the state (default: %(default)s)")
    add("--params", default="200m", metavar="N", help="parameters, as 200m (default: %(default)s)")
    add("--disk", type=Path, metavar="DIR", help="folder for the swap files; needed where the state is on disk")
    add("--precision", choices=[str(p) for p in Precision], default="bf16", help="(default: %(default)s)")
    add("--state-dtype", choices=STATE_DTYPES, default="fp32", help="of Adam's moments (default: %(default)s)")
    add_round_options(parser)


def run(options: argparse.Namespace) -> int:
    """Carry out `offload bench step`; returns the exit code."""
    console = Console(sys.stderr if options.json == STANDARD_OUTPUT else sys.stdout)
    check_result_path(options.json)
    on_disk = options.state == "disk"
    if on_disk and (options.disk is None or not options.disk.is_dir()):
        raise ConfigError(f"--disk {options.disk} is not a folder; name one on the disk that shall hold the state.")
    num_parameters = parse_count(options.params)
    result = describe_run("step", arguments_of(options), {"values": options.seed}, ("torch", "numpy", "numba"))
    title = f"One AdamW step of {num_parameters:,} parameters, {options.precision}, state on the {options.state}"
    console.line(f"{title}, {WARM_UP} + {options.rounds} rounds")
    with ExitStack() as stack:
        workers = stack.enter_context(Workers(training_threads()))
        reference = ReferenceStreams(AdamArrays(REFERENCE_NUMEL, options.seed), "bf16", workers)
        disk = None
        if on_disk:
            disk = stack.enter_context(DiskFile(options.disk, DISK_FILE_BYTES, largest(), options.seed))
            disk.run("write", SETTINGS[0], disk.num_bytes)
        setting = best_setting(disk, options.disk) if disk is not None else None
        model = make_model(num_parameters)
        session, optimizer = make_session(
            model, state=options.state, folders=[str(options.disk)] if on_disk else [], precision=options.precision,
            state_dtype=options.state_dtype,
        )  # fmt: skip
        stack.callback(session.close, give_back=False)
        encoding = encoding_of(session, options.precision)
        progress = stack.enter_context(make_round_progress(console, WARM_UP, options.rounds, 1))
        samples = Samples()
        kernel_bytes = num_parameters * encoding["kernel_bytes_per_param"]
        for number in range(-WARM_UP, options.rounds):
            rates = measure_rates(reference, disk, setting)
            seconds, moved = timed_step(model, session, optimizer)
            progress.ran(options.state, seconds)
            if number >= 0:
                add_sample(samples, seconds, moved, rates, kernel_bytes)
    finish(console, options, result, samples, encoding, num_parameters, title, setting)
    return 0


def largest() -> Setting:
    """The setting with the most bytes in flight."""
    return max(SETTINGS, key=lambda setting: setting.request_bytes * setting.depth)


def best_setting(disk: DiskFile, folder: Path) -> Setting:
    """For mixed traffic: that of the hardware record, else the quickest of a few."""
    record = load_record(folder)
    settings: tuple[Setting, ...] = SETTINGS
    if record is not None:
        settings = (Setting(record.read_request_bytes, record.depth), *SETTINGS)
    settings = tuple(s for s in settings if s.request_bytes * s.depth <= largest().request_bytes * largest().depth)
    seconds = {s: min(disk.run("mixed", s, DISK_RUN_BYTES) for _ in range(TRIES)) for s in settings}
    return min(seconds, key=lambda s: seconds[s])


def measure_rates(
    reference: ReferenceStreams, disk: DiskFile | None, setting: Setting | None
) -> tuple[float, float | None]:
    """Bytes a second of the reference's streams, and of mixed traffic on the disk."""
    start_s = time.perf_counter()
    for _ in range(REFERENCE_PASSES):
        reference.step()
    memory = REFERENCE_PASSES * REFERENCE_BYTES * REFERENCE_NUMEL / (time.perf_counter() - start_s)
    if disk is None or setting is None:
        return memory, None
    num_bytes = round_up(DISK_RUN_BYTES, UNIT_BYTES)
    return memory, num_bytes / disk.run("mixed", setting, num_bytes)


def timed_step(model: Any, session: Session, optimizer: torch.optim.Optimizer) -> tuple[float, int]:
    """Seconds from `step()` until the last state is written, and bytes that the disk moved meanwhile."""
    make_gradients(model)
    before = session.metrics()["bytes_moved"]  # waits until nothing is under way
    start_s = time.perf_counter()
    session.step()
    after = session.metrics()["bytes_moved"]
    seconds = time.perf_counter() - start_s
    optimizer.zero_grad()
    return seconds, sum(after[lane] - before[lane] for lane in ("read", "write"))


def add_sample(
    samples: Samples, seconds: float, moved: int, rates: tuple[float, float | None], kernel_bytes: float
) -> None:
    """See Note [Bound]."""
    memory_rate, disk_rate = rates
    samples.step_s.append(seconds)
    samples.memory_rate.append(memory_rate)
    samples.disk_bytes.append(moved)
    bounds = [kernel_bytes / memory_rate]
    if disk_rate is not None:
        samples.disk_rate.append(disk_rate)
        bounds.append(moved / disk_rate)
    samples.bound_s.append(max(bounds))


def encoding_of(session: Session, precision: str) -> dict[str, Any]:
    """What is kept of each parameter, and the bytes that a kernel moves for it."""
    state_tensors = session.state_tensors(0)
    itemsize = Precision(precision).dtype.itemsize
    weights = itemsize * (2 if is_split(state_tensors) else 1)
    state = sum(state_tensor.bytes_per_element for state_tensor in state_tensors)
    return {
        "state_tensors": {
            state_tensor.name: str(state_tensor.dtype).removeprefix("torch.") for state_tensor in state_tensors
        },
        "weights": precision,
        "gradient": precision,
        "state_bytes_per_param": state,
        "kernel_bytes_per_param": 2 * state + itemsize + weights,
    }


# ----------------------------------------------------------------------------------------------------- results


def finish(
    console: Console,
    options: argparse.Namespace,
    result: dict[str, Any],
    samples: Samples,
    encoding: dict[str, Any],
    num_parameters: int,
    title: str,
    setting: Setting | None,
) -> None:
    """Tables for people; JSON and chart where they were asked for."""
    ratios = [step / bound for step, bound in zip(samples.step_s, samples.bound_s, strict=True)]
    step, bound, ratio = quartiles_of(samples.step_s), quartiles_of(samples.bound_s), statistics.median(ratios)
    moved = statistics.median(samples.disk_bytes) / num_parameters
    rows = [
        ["step", f"{step.median:.3f} s", f"{step.lower:.3f} - {step.upper:.3f}"],
        ["bound", f"{bound.median:.3f} s", f"{bound.lower:.3f} - {bound.upper:.3f}"],
        ["step / bound", f"{ratio:.3f}", f"{min(ratios):.3f} - {max(ratios):.3f}"],
        ["disk bytes a parameter", f"{moved:.2f}", ""],
        ["memory", f"{statistics.median(samples.memory_rate) / 1e9:.2f} GB/s", "reference"],
    ]
    if samples.disk_rate:
        words = f"mixed, {format_bytes(setting.request_bytes)} x {setting.depth}" if setting else ""
        rows.append(["disk", f"{statistics.median(samples.disk_rate) / 1e9:.2f} GB/s", words])
    console.line()
    console.line(format_table(["", "median", "spread"], rows))
    if options.json is None:
        return
    result |= {
        "params": num_parameters,
        "step_s": step.median,
        "bound_s": bound.median,
        "step_vs_bound": ratio,
        "bytes_per_param": moved,
        "encoding": encoding,
        "samples": vars(samples) | {"step_vs_bound": ratios},
        "warm_up_rounds": WARM_UP,
        "rounds": options.rounds,
    }
    bars = [
        Bar("step", step.median, step.lower, step.upper, "offload"),
        Bar("bound", bound.median, bound.lower, bound.upper, "this machine allows"),
    ]
    chart = bar_chart(title, bars, axis="seconds, lower is better (median; whiskers: quartiles)")
    for file in write_result(options.json, result, chart):
        console.line(f"wrote {file}")


def arguments_of(options: argparse.Namespace) -> list[str]:
    """The arguments that repeat this run."""
    arguments = [f"--state={options.state}", f"--params={options.params}", f"--precision={options.precision}"]
    arguments += [f"--state-dtype={options.state_dtype}", f"--rounds={options.rounds}", f"--seed={options.seed}"]
    for name, value in (("--disk", options.disk), ("--json", options.json)):
        if value is not None:
            arguments.append(f"{name}={value}")
    return arguments
