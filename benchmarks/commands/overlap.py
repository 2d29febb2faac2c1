"""`offload bench overlap`: what of a step hides behind compute, on an emulated device.

Owns: the options, the rows, what the result says.
Does not: run rounds (rounds.py), emulate or train (overlap_rig.py), measure hooks (hook_costs.py).
Threads: the main thread.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from benchmarks.commands.hook_costs import hook_costs, medians
from benchmarks.commands.overlap_rig import ITEMSIZE, MAX_GRAD_NORM, OverlapRig, Setting, StepParts
from benchmarks.commands.timed_model import PARAMETERS_PER_BLOCK
from benchmarks.measure.chart import Bar, bar_chart
from benchmarks.measure.comparison import describe_run
from benchmarks.measure.options import add_round_options
from benchmarks.measure.progress import make_round_progress
from benchmarks.measure.result import check_result_path, write_result
from benchmarks.measure.rounds import WARM_UP_ROUNDS, quartiles_of, run_rounds
from offload.cli.numbers import at_least_one
from offload.device.paced import EMULATED
from offload.errors import BudgetError
from offload.planning.hardware import free_host_bytes, training_threads
from offload.report.console import Console, format_table
from offload.report.results import STANDARD_OUTPUT
from offload.units import format_bytes

DEFAULT_NUMEL: Final = PARAMETERS_PER_BLOCK * 5 * 2**17
"""Four chunks a block: so many that what Python costs a block is small beside its bytes, as it is in a real model."""
DEFAULT_BLOCKS: Final = 12
DEFAULT_PARTITIONS: Final = (10, 100, 1000)

SHARES: Final = (0.3, 0.6, 0.9)
"""Of the link in compute, and of the optimizer in forward."""

BYTES_PER_PARAMETER: Final = 28
"""Of the host: weights of the plain model, its gradients and their copies 6, the model before it is offloaded 4; of the
session weights and gradients 4, state 10; the rest for what autograd makes on its way."""

NOTES: Final = (
    EMULATED,
    "bound: the longest of compute, transfers and optimizer, and the first and last block of what cannot overlap",
    "rings, staging buffers, copies, kernels and hooks are those of training",
)


@dataclass(frozen=True, slots=True)
class RowNames:
    """One combination of shares."""

    transfer_share: float
    optimizer_share: float

    @property
    def step(self) -> str:
        """The contender with the session."""
        return f"step_{self.transfer_share}_{self.optimizer_share}"

    @property
    def compute(self) -> str:
        """The contender without."""
        return f"compute_{self.optimizer_share}"

    @property
    def words(self) -> str:
        """For people."""
        return f"transfers {self.transfer_share:.0%}, optimizer {self.optimizer_share:.0%}"


ROWS: Final = tuple(RowNames(transfers, optimizer) for transfers in SHARES for optimizer in SHARES)


def add_command(benchmarks: "argparse._SubParsersAction[Any]") -> None:
    """Add `overlap` to `offload bench`."""
    words = "what of a step hides behind compute, on an emulated device; what hooks cost the training thread"
    parser = benchmarks.add_parser("overlap", help=words, description=words)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--numel", type=_numel, default=DEFAULT_NUMEL, metavar="N", help="parameters of a block (default: %(default)s)")
    add("--blocks", type=at_least_one, default=DEFAULT_BLOCKS, metavar="N", help="of the model (default: %(default)s)")
    add(
        "--partitions", type=at_least_one, nargs="+", default=list(DEFAULT_PARTITIONS), metavar="N",
        help="numbers of partitions for the cost of hooks (default: 10 100 1000)",
    )  # fmt: skip
    add_round_options(parser)


def run(options: argparse.Namespace) -> int:
    """Carry out `offload bench overlap`; returns the exit code."""
    console = Console(sys.stderr if options.json == STANDARD_OUTPUT else sys.stdout)
    check_result_path(options.json)
    check_memory(options.numel * options.blocks)
    result = describe_run("overlap", arguments_of(options), {"torch": options.seed}, ("torch", "numpy", "numba"))
    title = f"Steps of {options.blocks} blocks of {options.numel:,} parameters, emulated"
    console.line(f"{title}, {WARM_UP_ROUNDS} + {options.rounds} rounds")
    with one_torch_thread():
        rows, figures = measure_rows(options, console)
        costs = measure_costs(options, console)
    console.line()
    console.line(format_rows(rows))
    console.line()
    console.line(format_costs(costs))
    if options.json is not None:
        result |= {
            "emulated": EMULATED,
            "blocks": options.blocks,
            "numel": options.numel,
            "parameters_per_block": PARAMETERS_PER_BLOCK,
            "precision": "bf16",
            "max_grad_norm": MAX_GRAD_NORM,
            "kernel_threads": training_threads(),
            "rounds": options.rounds,
            "rows": rows,
            "per_partition_us": {count: medians(samples) for count, samples in costs.items()},
            **figures,
            "per_partition_samples_us": costs,
        }
        for file in write_result(options.json, result, draw(title, rows, result["machine"]["cpu"])):
            console.line(f"wrote {file}")
    return 0


# ----------------------------------------------------------------------------------------------------- measuring


def measure_rows(options: argparse.Namespace, console: Console) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows, and the samples that they are made of."""
    with closing(OverlapRig(options.blocks, options.numel, options.seed)) as rig:
        optimizer_s = rig.calibrate()
        forward_s = {share: optimizer_s / share / options.blocks for share in SHARES}
        contenders = [
            rig.compute_contender(f"compute_{share}", f"compute, optimizer {share:.0%}", forward_s[share])
            for share in SHARES
        ]
        for row in ROWS:
            setting = Setting(forward_s[row.optimizer_share], row.transfer_share)
            contenders.append(rig.step_contender(row.step, row.words, setting))
        with make_round_progress(console, WARM_UP_ROUNDS, options.rounds, len(contenders)) as progress:
            samples = run_rounds(contenders, options.rounds, progress)
        rows = [
            row_figures(row, samples[row.compute], rig.parts[row.step][-options.rounds :])
            | {"lanes": {lane: asdict(share) for lane, share in rig.shares[row.step].items()}}
            for row in ROWS
        ]
    return rows, {"calibrated_optimizer_s": optimizer_s, "forward_s": forward_s, "samples": samples}


def row_figures(row: RowNames, compute_s: Sequence[float], parts: Sequence[StepParts]) -> dict[str, Any]:
    """overlap_rig.py, Note [Bound]. Ratios are medians of those of each round (rounds.py, Note [Ratios])."""
    rounds = list(zip(parts, compute_s, strict=True))
    step_ratios = [part.step_s / part.bound_s(compute) for part, compute in rounds]
    serial_ratios = [part.serial_s(compute) / part.bound_s(compute) for part, compute in rounds]
    spread = quartiles_of(step_ratios)
    return {
        "transfer_share": row.transfer_share,
        "optimizer_share": row.optimizer_share,
        "step_vs_max": spread.median,
        "step_vs_max_lower_quartile": spread.lower,
        "step_vs_max_upper_quartile": spread.upper,
        "serial_vs_max": statistics.median(serial_ratios),
        "compute_s": statistics.median(compute_s),
        "bound_s": statistics.median(part.bound_s(compute) for part, compute in rounds),
        "serial_s": statistics.median(part.serial_s(compute) for part, compute in rounds),
        **{name: statistics.median(asdict(part)[name] for part in parts) for name in asdict(parts[0])},
        "measured_transfer_share": statistics.median(max(p.h2d_s, p.d2h_s) / compute for p, compute in rounds),
        "measured_optimizer_share": statistics.median(p.optimizer_s / (compute / 2) for p, compute in rounds),
        "step_vs_max_samples": step_ratios,
        "serial_vs_max_samples": serial_ratios,
    }


def measure_costs(options: argparse.Namespace, console: Console) -> dict[str, dict[str, list[float]]]:
    """Samples of hook_costs.py by number of partitions."""
    costs = {}
    for count in options.partitions:
        with make_round_progress(console, WARM_UP_ROUNDS, options.rounds, 1) as progress:
            costs[str(count)] = hook_costs(count, options.rounds, progress)
    return costs


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch's own threads would take the cores of the lanes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------- results


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for people."""
    cells = [
        [
            f"{row['transfer_share']:.0%}",
            f"{row['optimizer_share']:.0%}",
            f"{row['step_s'] * 1e3:.1f}",
            f"{row['bound_s'] * 1e3:.1f}",
            f"{row['step_vs_max']:.3f}",
            f"{row['serial_vs_max']:.3f}",
        ]
        for row in rows
    ]
    return format_table(["transfers", "optimizer", "step ms", "bound ms", "step / bound", "serial / bound"], cells)


def format_costs(costs: Mapping[str, dict[str, list[float]]]) -> str:
    """The table for people: medians."""
    names = list(next(iter(costs.values())))
    cells = [[count, *(f"{medians(samples)[name]:.1f}" for name in names)] for count, samples in costs.items()]
    return format_table(["partitions", *(f"{name} us" for name in names)], cells)


def draw(title: str, rows: Sequence[Mapping[str, Any]], cpu: str) -> str:
    """An SVG of the steps and of their parts in a row, both by the bound."""
    bars = []
    for row in rows:
        words = f"transfers {row['transfer_share']:.0%}, optimizer {row['optimizer_share']:.0%}"
        for group, key in (("overlapped", "step_vs_max"), ("serial", "serial_vs_max")):
            spread = quartiles_of(row[f"{key}_samples"])
            bars.append(Bar(words, spread.median, spread.lower, spread.upper, group))
    axis = "time of a step by its bound, lower is better (median; whiskers: quartiles)"
    return bar_chart(title, bars, axis=axis, notes=[*NOTES, cpu])


def arguments_of(options: argparse.Namespace) -> list[str]:
    """The arguments that repeat this run, with the defaults that it took."""
    arguments = [f"--numel={options.numel}", f"--blocks={options.blocks}", "--partitions"]
    arguments += [str(count) for count in options.partitions]
    arguments += [f"--rounds={options.rounds}", f"--seed={options.seed}"]
    if options.json is not None:
        arguments.append(f"--json={options.json}")
    return arguments


def check_memory(numel: int) -> None:
    """Raises BudgetError where the model would not fit: a machine that swaps measures its disk, if it survives."""
    needed, free = numel * BYTES_PER_PARAMETER, free_host_bytes()
    if needed > free:
        raise BudgetError(
            f"--blocks and --numel need {format_bytes(needed)} of memory, {format_bytes(free)} are free; ask for fewer."
        )


def _numel(text: str) -> int:
    """A converter for argparse: parameters of a block, the same in each parameter."""
    number = at_least_one(text)
    if number % PARAMETERS_PER_BLOCK or number // PARAMETERS_PER_BLOCK * ITEMSIZE % 256:
        raise argparse.ArgumentTypeError(
            f"{text} is no multiple of {PARAMETERS_PER_BLOCK * 128}: a block has {PARAMETERS_PER_BLOCK} equal "
            "parameters, each a multiple of 256 bytes."
        )
    return number
