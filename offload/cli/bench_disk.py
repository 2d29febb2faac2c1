"""`offload bench disk`: how fast a folder's disk is through our queue, beside fio and DeepSpeed; the best is kept.

Owns: the options, the grid, which setting of each contender takes part in the rounds, which ratios matter.
Does not: move bytes (disk_contenders.py, disk_peers.py), run rounds (rounds.py) or file the record
(placement/record.py).
Threads: the main thread.

Note [Two parts]: first everybody is tried at every setting of the grid, one after the other at each; then the best of
each meet in interleaved rounds, and only these are compared. The best of many noisy tries is too good to be true, and
would be so for whoever has the more settings.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from offload.cli.bench_options import at_least_one, not_negative
from offload.cli.comparison import Row, describe_run, draw_figures, figures_of, format_figures, format_ratios
from offload.cli.comparison import ratio_figures as figures_of_ratios
from offload.cli.disk_contenders import FIO_ENGINES, KINDS, UNIT_BYTES, DiskFile, Kind, Setting, find_fio
from offload.cli.disk_peers import AIO_DIRECTIONS, AIO_SETTINGS, AioSetting, start_aio
from offload.cli.peers import Unavailable, find_deepspeed
from offload.cli.rounds import Contender, Ratio, Samples, run_rounds
from offload.planning.record import DiskRecord, mount_of, save_record
from offload.report.console import Console, format_table
from offload.report.results import STANDARD_OUTPUT, check_result_path, write_result
from offload.report.round_progress import make_round_progress
from offload.units import KIB, MIB, format_bytes, parse_bytes, round_up

DEFAULT_SIZE: Final = "1GiB"
DEFAULT_ROUNDS: Final = 5
FULL_ROUNDS: Final = 11

GRID: Final = tuple(
    Setting(size * MIB, depth) for size, depth in ((8, 8), (16, 8), (1, 8), (4, 16), (16, 4), (4, 8))
)  # fmt: skip
"""What everybody is tried at, the likely ones first: on a busy machine time may not last for all."""
GRID_S: Final = 30.0
"""Without --full no setting is begun after so long; every contender has then been tried at the same ones."""
FULL_GRID: Final = tuple(
    Setting(size, depth)
    for size in (256 * KIB, 512 * KIB, MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB)
    for depth in (1, 2, 4, 8, 16, 32)
)
FULL_PASSES: Final = 2
FIRST_TRY: Final = Setting(8 * MIB, 8)

TRY_S: Final = 0.25
RUN_S: Final = 0.4
"""What one try of the grid and one run of a round take at the rate met first: long beside the start and the end of the
queue, short enough that all meet the same load."""

OURS: Final = "offload"
DEEPSPEED: Final = "deepspeed"
AnySetting = Setting | AioSetting

NEARLY: Final = 0.93
"""Of the best rate: what sessions may lose for having fewer bytes in flight; less than the spread of single tries."""

RATIOS: Final = {
    f"{kind}_vs_{rival}": Ratio(tuple(f"{kind}/{name}" for name in names), f"{kind}/{OURS}")
    for rival, names in (("fio", FIO_ENGINES), ("deepspeed", (DEEPSPEED,)))
    for kind in (KINDS if rival == "fio" else AIO_DIRECTIONS)
}


@dataclass(frozen=True, slots=True)
class Rival:
    """Somebody that moves bytes."""

    name: str
    words: str
    settings: Sequence[Any]
    kinds: Sequence[Kind]
    run: Callable[[Kind, Any, int], float]


@dataclass
class Entrants:
    """Who takes part, who cannot, and what each did at each setting."""

    rivals: list[Rival] = field(default_factory=list)
    absent: list[Row] = field(default_factory=list)
    tries: dict[tuple[Kind, str, AnySetting], list[float]] = field(default_factory=dict)
    """Bytes a second."""
    versions: dict[str, str] = field(default_factory=dict)

    def best(self, kind: Kind, name: str) -> AnySetting:
        """The setting with the highest median rate."""
        rates = self._rates(kind, name)
        return max(rates, key=lambda setting: rates[setting])

    def frugal(self, kind: Kind) -> Setting:
        """Of our settings that are nearly as quick as the best, the one with the fewest bytes in flight.

        A session has few staging buffers: with requests as large as a staging buffer only few of them would be under way.
        """
        rates = {setting: rate for setting, rate in self._rates(kind, OURS).items() if isinstance(setting, Setting)}
        enough = NEARLY * max(rates.values())
        good = [setting for setting, rate in rates.items() if rate >= enough]
        return min(good, key=lambda setting: (setting.request_bytes * setting.depth, setting.request_bytes))

    def _rates(self, kind: Kind, name: str) -> dict[AnySetting, float]:
        return {key[2]: statistics.median(rates) for key, rates in self.tries.items() if key[:2] == (kind, name)}


def add_command(benchmarks: "argparse._SubParsersAction[Any]") -> None:
    """Add `disk` to `offload bench`."""
    words = "read, write and mixed rates of a disk: our queue, fio, DeepSpeed; keeps the best setting for sessions"
    parser = benchmarks.add_parser("disk", help=words, description=words)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--disk", "--path", type=Path, required=True, metavar="DIR", help="a folder on the disk to measure")
    add("--size", default=DEFAULT_SIZE, metavar="BYTES", help="of the file (default: %(default)s)")
    add("--full", action="store_true", help="a fine grid and more rounds: minutes instead of a minute")
    add("--rounds", type=at_least_one, metavar="N", help=f"(default: {DEFAULT_ROUNDS}, with --full {FULL_ROUNDS})")
    add("--seed", type=not_negative, default=0, metavar="N", help="of the values (default: %(default)s)")
    add("--json", metavar="PATH", help="write the figures there, and a chart beside it (.svg); - is standard output")
    add(
        "--deepspeed-python", type=Path, metavar="PATH",
        help="a Python interpreter that has DeepSpeed (default: this one, where it is installed)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Carry out `offload bench disk`; returns the exit code."""
    console = Console(sys.stderr if options.json == STANDARD_OUTPUT else sys.stdout)
    check_result_path(options.json)
    num_bytes = parse_bytes(options.size, name="--size")
    python = find_deepspeed(options.deepspeed_python)
    grid = FULL_GRID if options.full else GRID
    rounds = options.rounds or (FULL_ROUNDS if options.full else DEFAULT_ROUNDS)
    result = describe_run("disk", arguments_of(options, rounds), {"values": options.seed}, ("torch", "aiofiles"))
    entrants = Entrants()
    with ExitStack() as stack:
        disk = stack.enter_context(DiskFile(options.disk, num_bytes, largest_of(grid), options.seed))
        title = f"{format_bytes(disk.num_bytes)} on {kind_of_disk(options.disk)}, {disk.file.mode} I/O"
        console.line(f"{title}: writing the file once")
        disk.run("write", FIRST_TRY, disk.num_bytes)
        if isinstance(python, Path):
            console.line("starting DeepSpeed; where it was not used before it compiles first, for a minute or more")
        add_rivals(entrants, disk, grid, python, stack)
        sizes = sample_sizes(disk)
        passes, limit_s = (FULL_PASSES, math.inf) if options.full else (1, GRID_S)
        for number in range(passes):
            try_grid(entrants, sizes, console, words=f"grid {number + 1}/{passes}", limit_s=limit_s)
        contenders = contenders_of(entrants, sizes)
        progress = make_round_progress(console, 0, rounds, len(contenders))
        # No warm-up: the grid has met everything.
        samples = run_rounds(contenders, rounds, stack.enter_context(progress), warm_up_rounds=0)

    rows = rows_of(entrants, sizes)
    record = record_of(entrants, sizes, samples)
    show(console, rows, samples, record)
    keep(console, options.disk, record)
    if options.json is not None:
        result["versions"] |= entrants.versions
        result |= {
            "disk": {"file_system": kind_of_disk(options.disk), "mode": disk.file.mode, "file_bytes": disk.num_bytes},
            "warm_up_rounds": 0,
            "rounds": rounds,
            "run_bytes": {kind: size_of_run(size) for kind, size in sizes.items()},
            "grid": figures_of_grid(entrants),
            "best": figures_of_best(entrants),
            "contenders": figures_of(rows, samples),
            **figures_of_ratios(RATIOS, samples),
            "record": record_fields(record),
            "samples": samples,
        }
        notes = [f"{result['machine']['cpu']}", "mixed: reads and writes one to one, their sum"]
        for file in write_result(options.json, result, draw_figures(title, rows, samples, notes)):
            console.line(f"wrote {file}")
    return 0


def arguments_of(options: argparse.Namespace, rounds: int) -> list[str]:
    """The arguments that repeat this run, with the defaults that it took."""
    arguments = [f"--disk={options.disk}", f"--size={options.size}", f"--rounds={rounds}", f"--seed={options.seed}"]
    if options.full:
        arguments.append("--full")
    if options.deepspeed_python is not None:
        arguments.append(f"--deepspeed-python={options.deepspeed_python}")
    if options.json is not None:
        arguments.append(f"--json={options.json}")
    return arguments


def kind_of_disk(folder: Path) -> str:
    """The file system, without the names of devices and folders, which are nobody else's business."""
    return mount_of(folder)[1].split()[0]


def largest_of(grid: Sequence[Setting]) -> Setting:
    """The setting with the most bytes in flight."""
    return max((*grid, FIRST_TRY), key=lambda setting: setting.request_bytes * setting.depth)


# -------------------------------------------------------------------------------------------------- contenders


def add_rivals(
    entrants: Entrants, disk: DiskFile, grid: Sequence[Setting], python: Path | Unavailable, stack: ExitStack
) -> None:
    """Our queue, fio with each engine, DeepSpeed; where one cannot take part, rows that say why."""
    entrants.rivals.append(Rival(OURS, OURS, grid, KINDS, disk.run))
    for engine in FIO_ENGINES:
        fio = find_fio(engine, disk.file)
        if isinstance(fio, Unavailable):
            entrants.absent += [Row(f"{kind}/{engine}", f"fio {engine}", kind, absent=fio.reason) for kind in KINDS]
        else:
            entrants.rivals.append(Rival(engine, f"fio {engine}", grid, KINDS, fio.run))
    aio = python if isinstance(python, Unavailable) else start_aio(python, disk.file)
    if isinstance(aio, Unavailable):
        rows = [Row(f"{kind}/{DEEPSPEED}", "DeepSpeed", kind, absent=aio.reason) for kind in AIO_DIRECTIONS]
        entrants.absent += rows
        return
    stack.enter_context(aio)
    entrants.versions |= {f"{name} of DeepSpeed": version for name, version in aio.versions.items()}
    entrants.rivals.append(Rival(DEEPSPEED, "DeepSpeed", AIO_SETTINGS, AIO_DIRECTIONS, aio.run))


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


def try_grid(entrants: Entrants, sizes: dict[Kind, int], console: Console, *, words: str, limit_s: float) -> None:
    """Everybody at every setting once, in turns; no setting is begun after `limit_s`."""
    start_s = time.perf_counter()
    num_settings = max(len(rival.settings) for rival in entrants.rivals)
    index = 0
    while index < num_settings and (index == 0 or time.perf_counter() - start_s < limit_s):
        for kind in KINDS:
            for rival in entrants.rivals:
                if kind in rival.kinds and index < len(rival.settings):
                    setting = rival.settings[index]
                    seconds = rival.run(kind, setting, sizes[kind])
                    entrants.tries.setdefault((kind, rival.name, setting), []).append(sizes[kind] / seconds)
        index += 1
    console.line(f"{words}  {index} of {num_settings} settings in {time.perf_counter() - start_s:.2f} s")


def contenders_of(entrants: Entrants, sizes: dict[Kind, int]) -> list[Contender]:
    """Each at its best setting, by kind."""
    return [
        Contender(
            f"{kind}/{rival.name}", f"{kind}, {rival.words}",
            partial(rival.run, kind, entrants.best(kind, rival.name), size_of_run(sizes[kind])),
        )
        for kind in KINDS
        for rival in entrants.rivals
        if kind in rival.kinds
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- results


def rows_of(entrants: Entrants, sizes: dict[Kind, int]) -> list[Row]:
    """One for each contender of each kind, with its setting; and those that are absent."""
    rows = []
    for kind in KINDS:
        for rival in entrants.rivals:
            if kind in rival.kinds:
                words = f"{kind}, {rival.words} ({entrants.best(kind, rival.name).words})"
                rows.append(Row(f"{kind}/{rival.name}", words, kind, float(size_of_run(sizes[kind]))))
        rows += [
            Row(row.name, f"{kind}, {row.words}", kind, absent=row.absent)
            for row in entrants.absent
            if row.group == kind
        ]
    return rows


def record_of(entrants: Entrants, sizes: dict[Kind, int], samples: Samples) -> DiskRecord:
    """Settings for sessions, and our rates in the rounds. The depth is that of mixed runs, which sessions make."""
    rates = {kind: size_of_run(sizes[kind]) / statistics.median(samples[f"{kind}/{OURS}"]) for kind in KINDS}
    read, write, mixed = (entrants.frugal(kind) for kind in KINDS)
    return DiskRecord(
        read_request_bytes=read.request_bytes,
        write_request_bytes=write.request_bytes,
        depth=mixed.depth,
        read_rate=rates["read"],
        write_rate=rates["write"],
        mixed_rate=rates["mixed"],
        measured_at=time.time(),
    )


def record_fields(record: DiskRecord) -> dict[str, float]:
    """For the JSON."""
    return {name: getattr(record, name) for name in DiskRecord.__dataclass_fields__}


def show(console: Console, rows: Sequence[Row], samples: Samples, record: DiskRecord) -> None:
    """The tables for people."""
    console.line()
    console.line(format_figures(rows, samples))
    console.line()
    console.line(format_ratios(RATIOS, samples))
    console.line()
    cells = [
        ["read", f"{record.read_rate / 1e9:.2f}", format_bytes(record.read_request_bytes)],
        ["write", f"{record.write_rate / 1e9:.2f}", format_bytes(record.write_request_bytes)],
        ["mixed", f"{record.mixed_rate / 1e9:.2f}", f"depth {record.depth}"],
    ]
    console.line(format_table(["best of offload", "GB/s", "setting"], cells))


def keep(console: Console, folder: Path, record: DiskRecord) -> None:
    """Save the record; a home that cannot be written loses it, and that is said."""
    try:
        path = save_record(folder, record)
    except OSError as error:
        console.line(f"the record could not be kept ({error}); sessions will use safe defaults")
    else:
        console.line(f"kept for sessions on this disk: {path}")


def figures_of_grid(entrants: Entrants) -> list[dict[str, Any]]:
    """Every setting that was tried, with GB/s of each pass."""
    return [
        {"kind": kind, "contender": name, **setting_fields(setting), "gb_per_s": [rate / 1e9 for rate in rates]}
        for (kind, name, setting), rates in entrants.tries.items()
    ]


def figures_of_best(entrants: Entrants) -> dict[str, dict[str, int]]:
    """The setting of each contender of the rounds."""
    return {
        f"{kind}/{rival.name}": setting_fields(entrants.best(kind, rival.name))
        for kind in KINDS
        for rival in entrants.rivals
        if kind in rival.kinds
    }


def setting_fields(setting: AnySetting) -> dict[str, int]:
    """For the JSON."""
    if isinstance(setting, AioSetting):
        return {"block_bytes": setting.block_bytes, "depth": setting.depth, "threads": setting.threads}
    return {"request_bytes": setting.request_bytes, "depth": setting.depth}
