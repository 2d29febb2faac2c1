"""`offload bench disk` in a checkout: a folder's disk through our queue, beside fio and DeepSpeed; the best is kept.

Owns: who takes part, at which setting each takes part in the rounds, which ratios matter.
Does not: move bytes (offload/cli/disk_file.py, fio.py, disk_peers.py), run rounds (measure/rounds.py) or choose what
sessions use (offload/cli/bench_disk.py).
Threads: the main thread.

Note [Two parts]: first everybody is tried at every setting of the grid, one after the other at each; then the best of
each meet in interleaved rounds, and only these are compared. The best of many noisy tries is too good to be true, and
would be so for whoever has the more settings.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.commands.disk_peers import AIO_DIRECTIONS, AIO_SETTINGS, AioSetting, start_aio
from benchmarks.commands.fio import FIO_ENGINES, find_fio
from benchmarks.commands.peers import Unavailable, find_deepspeed
from benchmarks.measure.comparison import Row, describe_run, draw_figures, figures_of, format_figures, format_ratios
from benchmarks.measure.comparison import ratio_figures as figures_of_ratios
from benchmarks.measure.progress import make_round_progress
from benchmarks.measure.result import check_result_path, write_result
from benchmarks.measure.rounds import Contender, Ratio, run_rounds
from offload.cli.bench_disk import (
    Effort,
    Rates,
    add_options,
    disk_facts,
    effort_of,
    format_record,
    keep,
    record_of,
    sample_sizes,
    size_of_run,
    title_of,
    write_once,
)
from offload.cli.disk_file import KINDS, DiskFile, Kind, Setting
from offload.report.console import Console
from offload.report.results import STANDARD_OUTPUT
from offload.units import parse_bytes

OURS: Final = "offload"
DEEPSPEED: Final = "deepspeed"
AnySetting = Setting | AioSetting

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

    @property
    def our_rates(self) -> Rates:
        """Of our queue alone: what the record is made of."""
        return {
            (kind, setting): rates
            for (kind, name, setting), rates in self.tries.items()
            if name == OURS and isinstance(setting, Setting)
        }

    def _rates(self, kind: Kind, name: str) -> dict[AnySetting, float]:
        return {key[2]: statistics.median(rates) for key, rates in self.tries.items() if key[:2] == (kind, name)}


def add_command(benchmarks: "argparse._SubParsersAction[Any]") -> None:
    """Add `disk` to `offload bench`."""
    words = "read, write and mixed rates of a disk: our queue, fio, DeepSpeed; keeps the best setting for sessions"
    parser = benchmarks.add_parser("disk", help=words, description=words)
    parser.set_defaults(run=run)
    add_options(parser)
    parser.add_argument(
        "--deepspeed-python", type=Path, metavar="PATH",
        help="a Python interpreter that has DeepSpeed (default: this one, where it is installed)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Carry out `offload bench disk`; returns the exit code."""
    console = Console(sys.stderr if options.json == STANDARD_OUTPUT else sys.stdout)
    check_result_path(options.json)
    num_bytes = parse_bytes(options.size, name="--size")
    python = find_deepspeed(options.deepspeed_python)
    effort = effort_of(options)
    result = describe_run("disk", arguments_of(options, effort.rounds), {"values": options.seed}, ("torch", "aiofiles"))
    entrants = Entrants()
    with ExitStack() as stack:
        disk = stack.enter_context(DiskFile(options.disk, num_bytes, effort.largest, options.seed))
        title = title_of(disk, options.disk)
        write_once(disk, title, console)
        if isinstance(python, Path):
            console.line("starting DeepSpeed; where it was not used before it compiles first, for a minute or more")
        add_rivals(entrants, disk, effort.grid, python, stack)
        sizes = sample_sizes(disk)
        try_grid(entrants, effort, sizes, console)
        contenders = contenders_of(entrants, sizes)
        progress = make_round_progress(console, 0, effort.rounds, len(contenders))
        # No warm-up: the grid has met everything.
        samples = run_rounds(contenders, effort.rounds, stack.enter_context(progress), warm_up_rounds=0)
        result["disk"] = disk_facts(disk, options.disk)

    rows = rows_of(entrants, sizes)
    record = record_of(entrants.our_rates, {kind: samples[f"{kind}/{OURS}"] for kind in KINDS}, sizes)
    for table in (format_figures(rows, samples), format_ratios(RATIOS, samples), format_record(record)):
        console.line()
        console.line(table)
    keep(console, options.disk, record)
    if options.json is not None:
        result["versions"] |= entrants.versions
        result |= {
            "warm_up_rounds": 0,
            "rounds": effort.rounds,
            "run_bytes": {kind: size_of_run(size) for kind, size in sizes.items()},
            "grid": figures_of_grid(entrants),
            "best": figures_of_best(entrants),
            "contenders": figures_of(rows, samples),
            **figures_of_ratios(RATIOS, samples),
            "record": dataclasses.asdict(record),
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


def try_grid(entrants: Entrants, effort: Effort, sizes: Mapping[Kind, int], console: Console) -> None:
    """Everybody at every setting once in each pass, in turns."""
    num_settings = max(len(rival.settings) for rival in entrants.rivals)
    for number in range(effort.passes):
        start_s, index = time.perf_counter(), 0
        while index < num_settings and (index == 0 or time.perf_counter() - start_s < effort.limit_s):
            for kind in KINDS:
                for rival in entrants.rivals:
                    if kind in rival.kinds and index < len(rival.settings):
                        try_setting(entrants, rival, kind, rival.settings[index], sizes[kind])
            index += 1
        told_s = time.perf_counter() - start_s
        console.line(f"grid {number + 1}/{effort.passes}  {index} of {num_settings} settings in {told_s:.2f} s")


def try_setting(entrants: Entrants, rival: Rival, kind: Kind, setting: AnySetting, num_bytes: int) -> None:
    """One run of one rival."""
    seconds = rival.run(kind, setting, num_bytes)
    entrants.tries.setdefault((kind, rival.name, setting), []).append(num_bytes / seconds)


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
