"""`offload bench adam`: one optimizer step on the CPU, by our kernels, by what memory allows and by other libraries.

Owns: the options, the list of contenders, which ratios matter.
Does not: run rounds (measure/rounds.py), step anything (adam_contenders.py, peers.py) or lay out results (measure/).
Threads: the main thread.
"""

import argparse
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.commands.adam_arrays import BETAS, EPS, LR, WEIGHT_DECAY, AdamArrays, arrays_bytes
from benchmarks.commands.adam_contenders import MODES, REFERENCE_BYTES, OurStep, ReferenceStreams
from benchmarks.commands.peers import TorchStep, Unavailable, find_deepspeed, start_deepspeed, torch_threads
from benchmarks.measure.comparison import (
    Row,
    describe_run,
    draw_figures,
    figures_of,
    format_figures,
    format_ratios,
    ratio_figures,
)
from benchmarks.measure.options import add_round_options, checked_threads
from benchmarks.measure.progress import make_round_progress
from benchmarks.measure.result import check_result_path, write_result
from benchmarks.measure.rounds import WARM_UP_ROUNDS, Contender, Ratio, Samples, run_rounds, timed
from offload.cli.numbers import at_least_one
from offload.errors import BudgetError
from offload.kernels.workers import TASK_NUMEL, Workers
from offload.planning.hardware import free_host_bytes
from offload.report.console import Console, format_table
from offload.report.results import STANDARD_OUTPUT
from offload.units import format_bytes

DEFAULT_NUMEL: Final = 2**26

# Bytes a parameter that a peer's passes read and write; not the cache lines that a store reads first.
FP32_STEP_BYTES: Final = 28.0
"""A fused step: master and two moments read and written, an fp32 gradient read."""
FOREACH_BYTES: Final = 80.0
"""Eight passes: decay 8, lerp 12, scale 8, addcmul 12, square root 8, divide 8, add eps 8, addcdiv 16."""
CASTS_BYTES: Final = 12.0
"""bf16 gradient to fp32, master to bf16: 6 each."""

FOREACH_TEMPORARY_BYTES: Final = 8
"""A parameter: the square root, and its quotient."""
DEEPSPEED_BYTES: Final = 20
"""A parameter: the process has arrays of its own."""

TORCH: Final = ("torch_fused", "torch_foreach")
TORCH_WITH_CASTS: Final = tuple(f"{name}_with_casts" for name in TORCH)

RATIOS: Final = {
    "bandwidth_share": Ratio(("reference",), "fused"),
    "bandwidth_share_fp16": Ratio(("reference_fp16",), "fused_fp16"),
    "vs_torch_with_casts": Ratio(TORCH_WITH_CASTS, "fused"),
    "vs_deepspeed_with_casts": Ratio(("deepspeed_with_casts",), "fused"),
    "split_vs_torch_with_casts": Ratio(TORCH_WITH_CASTS, "split"),
    "split_vs_deepspeed_with_casts": Ratio(("deepspeed_with_casts",), "split"),
    "split_master_vs_fused": Ratio(("fused",), "split"),
    "bf16_state_vs_fused": Ratio(("fused",), "bf16_state"),
    "eightbit_vs_fused": Ratio(("fused",), "eightbit"),
    "vs_torch_without_casts": Ratio(TORCH, "fused"),
    "vs_deepspeed_without_casts": Ratio(("deepspeed",), "fused"),
    "split_vs_torch_without_casts": Ratio(TORCH, "split"),
    "split_vs_deepspeed_without_casts": Ratio(("deepspeed",), "split"),
}

NOTES: Final = (
    "reference: the streams of the fused step (28 bytes a parameter) with trivial arithmetic, same slices and threads",
    "with casts: the bf16 gradient is cast before and the weights after the step; offload does both within it",
)


def add_command(benchmarks: "argparse._SubParsersAction[Any]") -> None:
    """Add `adam` to `offload bench`."""
    words = "one AdamW step on the CPU: our kernels, the limit of this machine's memory, torch, DeepSpeed"
    parser = benchmarks.add_parser("adam", help=words, description=words)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--numel", type=at_least_one, default=DEFAULT_NUMEL, metavar="N", help="parameters (default: %(default)s)")
    add("--threads", type=at_least_one, metavar="T", help="of every contender (default: all cores)")
    add_round_options(parser)
    add(
        "--deepspeed-python", type=Path, metavar="PATH",
        help="a Python interpreter that has DeepSpeed (default: this one, where it is installed)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Carry out `offload bench adam`; returns the exit code."""
    console = Console(sys.stderr if options.json == STANDARD_OUTPUT else sys.stdout)
    check_result_path(options.json)
    threads = checked_threads(options.threads)
    deepspeed = find_deepspeed(options.deepspeed_python)
    check_memory(options.numel, with_deepspeed=isinstance(deepspeed, Path))
    result = describe_run("adam", arguments_of(options), {"values": options.seed}, ("torch", "numpy", "numba"))
    title = f"One AdamW step of {options.numel:,} parameters, {threads} threads"
    console.line(f"{title}, {WARM_UP_ROUNDS} + {options.rounds} rounds")
    entrants = Field(options.numel, threads)
    samples = measure(entrants, deepspeed, options, console)
    shares = core_shares(entrants, samples)

    for table in (format_figures(entrants.rows, samples), format_ratios(RATIOS, samples), format_core_shares(shares)):
        console.line()
        console.line(table)
    if options.json is not None:
        result["versions"] |= entrants.versions
        result |= {
            "numel": options.numel,
            "threads": threads,
            "rounds": options.rounds,
            "task_numel": TASK_NUMEL,
            "hyper_parameters": {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY},
            "contenders": figures_of(entrants.rows, samples),
            **ratio_figures(RATIOS, samples),
            "core_s": entrants.core_s,
            "core_shares": shares,
            "samples": samples,
        }
        chart = draw_figures(title, entrants.rows, samples, [*NOTES, f"{result['machine']['cpu']}, {threads} threads"])
        for file in write_result(options.json, result, chart):
            console.line(f"wrote {file}")
    return 0


def measure(
    entrants: "Field", deepspeed: Path | Unavailable, options: argparse.Namespace, console: Console
) -> dict[str, list[float]]:
    """Enter everybody, run the rounds, let go of all memory, threads and processes; returns the samples."""
    with ExitStack() as stack:
        workers = stack.enter_context(Workers(entrants.threads))
        stack.enter_context(torch_threads(entrants.threads))
        arrays = AdamArrays(entrants.numel, options.seed)
        add_ours(entrants, arrays, workers)
        add_torch(entrants, arrays)
        add_deepspeed(entrants, deepspeed, options.seed, stack)
        progress = make_round_progress(console, WARM_UP_ROUNDS, options.rounds, len(entrants.contenders))
        return run_rounds(entrants.contenders, options.rounds, stack.enter_context(progress))


def check_memory(numel: int, *, with_deepspeed: bool) -> None:
    """Raises BudgetError where the arrays would not fit: a machine that swaps measures its disk, if it survives."""
    needed = arrays_bytes(numel) + numel * (FOREACH_TEMPORARY_BYTES + (DEEPSPEED_BYTES if with_deepspeed else 0))
    free = free_host_bytes()
    if needed > free:
        raise BudgetError(
            f"--numel {numel} needs {format_bytes(needed)} of memory, {format_bytes(free)} are free; ask for fewer."
        )


def core_shares(entrants: "Field", samples: Samples) -> dict[str, float]:
    """What the cores alone would take, by what our steps took: near 1 where the cores are the bound, else memory is."""
    return {name: core_s / statistics.median(samples[name]) for name, core_s in entrants.core_s.items()}


def format_core_shares(shares: dict[str, float]) -> str:
    """The table for people: shares of `core_shares`."""
    return format_table(["", "cores alone / step"], [[name, f"{share:.3f}"] for name, share in shares.items()])


def arguments_of(options: argparse.Namespace) -> list[str]:
    """The arguments that repeat this run, with the defaults that it took."""
    arguments = [f"--numel={options.numel}", f"--threads={checked_threads(options.threads)}"]
    arguments += [f"--rounds={options.rounds}", f"--seed={options.seed}"]
    if options.deepspeed_python is not None:
        arguments.append(f"--deepspeed-python={options.deepspeed_python}")
    if options.json is not None:
        arguments.append(f"--json={options.json}")
    return arguments


# -------------------------------------------------------------------------------------------------- contenders


@dataclass
class Field:
    """Who takes part, and how each is shown; in the order of the first round."""

    numel: int
    threads: int
    contenders: list[Contender] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    core_s: dict[str, float] = field(default_factory=dict)
    """Of our kernels: what a step would take if memory cost nothing."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of contenders in environments of their own."""

    def add(self, contender: Contender, group: str, bytes_per_parameter: float) -> None:
        """One that takes part."""
        self.contenders.append(contender)
        self.rows.append(Row(contender.name, contender.words, group, bytes_per_parameter * self.numel))


def add_ours(entrants: Field, arrays: AdamArrays, workers: Workers) -> None:
    """The reference for both dtypes, and our kernels in each mode."""
    for dtype, name in (("bf16", "reference"), ("fp16", "reference_fp16")):
        reference = ReferenceStreams(arrays, dtype, workers)
        contender = Contender(name, f"reference, {dtype}", timed(reference.step))
        entrants.add(contender, "reference", REFERENCE_BYTES)
    for mode in MODES:
        ours = OurStep(arrays, mode, workers)
        contender = Contender(mode.name, f"offload {mode.words}", timed(ours.step))
        entrants.add(contender, "offload", mode.bytes_per_parameter)
        entrants.core_s[mode.name] = ours.core_s(entrants.threads)


def add_torch(entrants: Field, arrays: AdamArrays) -> None:
    """torch's AdamW, fused and foreach, with the casts of a bf16 run and without."""
    for kind, num_bytes in (("fused", FP32_STEP_BYTES), ("foreach", FOREACH_BYTES)):
        peer = TorchStep(arrays, fused=kind == "fused")
        entrants.add(Contender(f"torch_{kind}", f"torch {kind}", timed(peer.step)), "torch", num_bytes)
        with_casts = Contender(f"torch_{kind}_with_casts", f"torch {kind}, with casts", timed(peer.step_with_casts))
        entrants.add(with_casts, "torch", num_bytes + CASTS_BYTES)


def add_deepspeed(entrants: Field, python: Path | Unavailable, seed: int, stack: ExitStack) -> None:
    """DeepSpeedCPUAdam, likewise; where it cannot take part, rows that say why."""
    names = {"deepspeed": "DeepSpeedCPUAdam", "deepspeed_with_casts": "DeepSpeedCPUAdam, with casts"}
    worker = (
        python
        if isinstance(python, Unavailable)
        else start_deepspeed(python, numel=entrants.numel, threads=entrants.threads, seed=seed)
    )
    if isinstance(worker, Unavailable):
        entrants.rows += [Row(name, words, "DeepSpeed", absent=worker.reason) for name, words in names.items()]
        return
    stack.enter_context(worker)
    entrants.versions |= worker.versions
    steps = ((worker.step, 0.0), (worker.step_with_casts, CASTS_BYTES))
    for (name, words), (step, casts_bytes) in zip(names.items(), steps, strict=True):
        entrants.add(Contender(name, words, step), "DeepSpeed", FP32_STEP_BYTES + casts_bytes)
