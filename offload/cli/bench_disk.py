"""`offload bench disk`: how fast a folder's disk is through our queue; sessions use the best setting.

Owns: the options, the grid of settings, which of them the record names.
Does not: move bytes (disk_file.py), file the record (planning/record.py) or compare with other programs (the
repository's benchmarks/commands/disk.py, which a checkout runs instead).
Threads: the main thread.

Note [Two parts]: first each setting of the grid is tried; then the best of each kind run in interleaved rounds, and
only the rates of these are recorded. The best of many noisy tries is too good to be true.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from offload.cli.disk_file import KINDS, UNIT_BYTES, DiskFile, Kind, Setting
from offload.cli.numbers import at_least_one, not_negative
from offload.planning.record import DiskRecord, mount_of, save_record
from offload.report.console import Console, format_table
from offload.report.results import STANDARD_OUTPUT, check_result_path, machine_facts, write_result
from offload.units import KIB, MIB, format_bytes, parse_bytes, round_up

DEFAULT_SIZE: Final = "1GiB"
DEFAULT_ROUNDS: Final = 5
FULL_ROUNDS: Final = 11

GRID: Final = tuple(
    Setting(size * MIB, depth) for size, depth in ((8, 8), (16, 8), (1, 8), (4, 16), (16, 4), (4, 8))
)  # fmt: skip
"""The likely ones first: on a busy machine time may not last for all."""
GRID_S: Final = 30.0
"""Without --full no setting is begun after so long."""
FULL_GRID: Final = tuple(
    Setting(size, depth)
    for size in (256 * KIB, 512 * KIB, MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB)
    for depth in (1, 2, 4, 8, 16, 32)
)
FULL_PASSES: Final = 2
FIRST_TRY: Final = Setting(8 * MIB, 8)

TRY_S: Final = 0.25
RUN_S: Final = 0.4
"""What one try of the grid and one run of a round take at the rate met first: long against the start and the end of
the queue, short enough that all meet the same load."""

NEARLY: Final = 0.93
"""Of the best rate: what sessions may lose for having fewer bytes in flight; less than the spread of single tries."""

Rates = dict[tuple[Kind, Setting], list[float]]
"""Bytes a second of every try."""


@dataclasses.dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    grid: Sequence[Setting]
    rounds: int
    passes: int
    limit_s: float
    """No setting of a pass is begun later."""

    @property
    def largest(self) -> Setting:
        """The setting with the most bytes in flight."""
        return max((*self.grid, FIRST_TRY), key=lambda setting: setting.request_bytes * setting.depth)


def add_command(benchmarks: "argparse._SubParsersAction[Any]") -> None:
    """Add `disk` to `offload bench`."""
    words = "read, write and mixed rates of a disk; saves the best setting for sessions"
    parser = benchmarks.add_parser("disk", help=words, description=words)
    parser.set_defaults(run=run)
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that the probe has in a checkout, too."""
    add = parser.add_argument
    add("--disk", "--path", type=Path, required=True, metavar="DIR", help="a folder on the disk to measure")
    add("--size", default=DEFAULT_SIZE, metavar="BYTES", help="of the file (default: %(default)s)")
    add("--full", action="store_true", help="a fine grid and more rounds: minutes instead of a minute")
    add("--rounds", type=at_least_one, metavar="N", help=f"(default: {DEFAULT_ROUNDS}, with --full {FULL_ROUNDS})")
    add("--seed", type=not_negative, default=0, metavar="N", help="of the values (default: %(default)s)")
    add("--json", metavar="PATH", help="write the figures there; - is standard output")


def run(options: argparse.Namespace) -> int:
    """Carry out `offload bench disk`; returns the exit code."""
    console = Console(sys.stderr if options.json == STANDARD_OUTPUT else sys.stdout)
    check_result_path(options.json)
    effort = effort_of(options)
    machine = machine_facts()
    with DiskFile(options.disk, parse_bytes(options.size, name="--size"), effort.largest, options.seed) as disk:
        write_once(disk, title_of(disk, options.disk), console)
        sizes = sample_sizes(disk)
        rates = try_grid(disk, effort, sizes, console)
        samples = run_rounds(disk, {kind: best(rates, kind) for kind in KINDS}, effort.rounds, sizes)
        facts = disk_facts(disk, options.disk)
    record = record_of(rates, samples, sizes)
    console.line()
    console.line(format_record(record))
    keep(console, options.disk, record)
    console.line("in a checkout of the repository this command also measures fio and DeepSpeed")
    if options.json is not None:
        result = {
            "benchmark": "disk",
            "machine": machine,
            "disk": facts,
            "rounds": effort.rounds,
            "run_bytes": {kind: size_of_run(size) for kind, size in sizes.items()},
            "grid": [
                {"kind": kind, **dataclasses.asdict(setting), "gb_per_s": [rate / 1e9 for rate in tried]}
                for (kind, setting), tried in rates.items()
            ],
            "record": dataclasses.asdict(record),
            "samples": samples,
        }
        for file in write_result(options.json, result):
            console.line(f"wrote {file}")
    return 0


def effort_of(options: argparse.Namespace) -> Effort:
    """What the options ask for."""
    if options.full:
        return Effort(FULL_GRID, options.rounds or FULL_ROUNDS, FULL_PASSES, math.inf)
    return Effort(GRID, options.rounds or DEFAULT_ROUNDS, 1, GRID_S)


# ----------------------------------------------------------------------------------------------------- measuring


def write_once(disk: DiskFile, title: str, console: Console) -> None:
    """What was never written may be read without the disk."""
    console.line(f"{title}: writing the file once")
    disk.run("write", FIRST_TRY, disk.num_bytes)


def sample_sizes(disk: DiskFile) -> dict[Kind, int]:
    """Bytes of one try, by kind: what our queue moves in `TRY_S`."""
    sizes: dict[Kind, int] = {}
    for kind in KINDS:
        seconds = disk.run(kind, FIRST_TRY, UNIT_BYTES * 4)
        sizes[kind] = round_up(int(UNIT_BYTES * 4 / seconds * TRY_S), UNIT_BYTES)
    return sizes


def size_of_run(try_bytes: int) -> int:
    """Bytes of one run in the rounds."""
    return round_up(int(try_bytes * RUN_S / TRY_S), UNIT_BYTES)


def try_grid(disk: DiskFile, effort: Effort, sizes: Mapping[Kind, int], console: Console) -> Rates:
    """Every setting of the grid for every kind, once in each pass."""
    rates: Rates = {}
    for number in range(effort.passes):
        start_s, num_tried = time.perf_counter(), 0
        for setting in effort.grid:
            if num_tried and time.perf_counter() - start_s >= effort.limit_s:
                break
            for kind in KINDS:
                rates.setdefault((kind, setting), []).append(sizes[kind] / disk.run(kind, setting, sizes[kind]))
            num_tried += 1
        told_s = time.perf_counter() - start_s
        console.line(f"grid {number + 1}/{effort.passes}  {num_tried} of {len(effort.grid)} settings in {told_s:.2f} s")
    return rates


def run_rounds(
    disk: DiskFile, settings: Mapping[Kind, Setting], rounds: int, sizes: Mapping[Kind, int]
) -> dict[Kind, list[float]]:
    """Seconds of each round by kind. No warm-up: the grid has met everything."""
    samples: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            samples[kind].append(disk.run(kind, settings[kind], size_of_run(sizes[kind])))
    return samples


# ----------------------------------------------------------------------------------------------------- the record


def best(rates: Rates, kind: Kind) -> Setting:
    """The setting with the highest median rate."""
    medians = _medians(rates, kind)
    return max(medians, key=lambda setting: medians[setting])


def frugal(rates: Rates, kind: Kind) -> Setting:
    """Of the settings that are nearly as quick as the best, the one with the fewest bytes in flight.

    A session has few staging buffers: with requests as large as a staging buffer only few would be under way.
    """
    medians = _medians(rates, kind)
    enough = NEARLY * max(medians.values())
    good = [setting for setting, rate in medians.items() if rate >= enough]
    return min(good, key=lambda setting: (setting.request_bytes * setting.depth, setting.request_bytes))


def record_of(rates: Rates, samples: Mapping[Kind, Sequence[float]], sizes: Mapping[Kind, int]) -> DiskRecord:
    """Settings for sessions, and the rates of the rounds. The depth is that of mixed runs, which sessions make."""
    of_rounds = {kind: size_of_run(sizes[kind]) / statistics.median(samples[kind]) for kind in KINDS}
    read, write, mixed = (frugal(rates, kind) for kind in KINDS)
    return DiskRecord(
        read_request_bytes=read.request_bytes,
        write_request_bytes=write.request_bytes,
        depth=mixed.depth,
        read_rate=of_rounds["read"],
        write_rate=of_rounds["write"],
        mixed_rate=of_rounds["mixed"],
        measured_at=time.time(),
    )


def keep(console: Console, folder: Path, record: DiskRecord) -> None:
    """Save the record; a home that cannot be written loses it, and that is said."""
    try:
        path = save_record(folder, record)
    except OSError as error:
        console.line(f"the record could not be saved ({error}); sessions will use safe defaults")
    else:
        console.line(f"saved for sessions on this disk: {path}")


def _medians(rates: Rates, kind: Kind) -> dict[Setting, float]:
    return {setting: statistics.median(tried) for (of, setting), tried in rates.items() if of == kind}


# ----------------------------------------------------------------------------------------------------- telling


def format_record(record: DiskRecord) -> str:
    """The table for people."""
    cells = [
        ["read", f"{record.read_rate / 1e9:.2f}", format_bytes(record.read_request_bytes)],
        ["write", f"{record.write_rate / 1e9:.2f}", format_bytes(record.write_request_bytes)],
        ["mixed", f"{record.mixed_rate / 1e9:.2f}", f"depth {record.depth}"],
    ]
    return format_table(["best of offload", "GB/s", "setting"], cells)


def title_of(disk: DiskFile, folder: Path) -> str:
    """What is measured."""
    return f"{format_bytes(disk.num_bytes)} on {kind_of_disk(folder)}, {disk.file.mode} I/O"


def disk_facts(disk: DiskFile, folder: Path) -> dict[str, Any]:
    """For the JSON."""
    return {"file_system": kind_of_disk(folder), "mode": disk.file.mode, "file_bytes": disk.num_bytes}


def kind_of_disk(folder: Path) -> str:
    """The file system, without the names of devices and folders, which are nobody else's business."""
    return mount_of(folder)[1].split()[0]
