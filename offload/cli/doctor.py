"""`offload doctor`: what this machine has, which swap files are open, what dead runs have left on its disks.

Owns: the options, what is looked at and how it is told.
Does not: find open files (disk/nameless.py), know what a leftover is or remove it (disk/named_folder.py), or measure
anything (`offload bench`).
Threads: the main thread.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import psutil

from offload.checkpoint.format.folder import leftovers as unfinished
from offload.cli.exit_codes import FAILED
from offload.cli.numbers import path as a_path
from offload.disk.named_folder import leftovers, owner_of, remove_leftovers
from offload.disk.nameless import OpenFile, open_files
from offload.disk.probe import free_bytes, takes_direct_io
from offload.errors import ConfigError
from offload.planning.hardware import default_host_budget, free_host_bytes, training_threads
from offload.planning.record import load_record, mount_of
from offload.report.console import Console
from offload.report.results import STANDARD_OUTPUT, check_result_path, machine_facts, write_result
from offload.units import format_bytes

WANTED_FEATURES: Final = {
    "f16c": "fp16 casts take several times longer",
    "avx2": "kernels take several times longer",
    "avx512f": "nothing where memory is the limit, as it mostly is",
}
"""Of x86-64, with what is lost without each."""

LABEL_WIDTH: Final = 18


def add_command(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add `doctor` to the command line."""
    words = "what this machine has, which swap files are open, and what dead runs have left on its disks"
    parser = commands.add_parser("doctor", help=words, description=words)
    parser.set_defaults(run=run)
    folders: dict[str, Any] = {"type": a_path, "action": "append", "default": [], "metavar": "DIR"}
    parser.add_argument("--disk", **folders, help="look at this folder, too; may be given several times")
    parser.add_argument("--clean", **folders, help="remove what dead runs have left there")
    parser.add_argument(
        "--json", nargs="?", const=STANDARD_OUTPUT, metavar="PATH",
        help="write all of it there, too; - or no path: to standard output, and nothing else",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Carry out `offload doctor`; FAILED where something could not be removed."""
    console = Console(sys.stderr if options.json == STANDARD_OUTPUT else sys.stdout)
    check_result_path(options.json)
    looked_at = list(dict.fromkeys(options.disk))
    for folder in (*looked_at, *options.clean):
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder; name one that exists.")
    opened = open_files()
    result: dict[str, Any] = {
        "machine": machine_facts(),
        "open_swap_files": [asdict(file) for file in opened],
        "folders": [facts_of(folder) for folder in looked_at],
        "cleaned": [],
    }
    tell_machine(console)
    tell_open(console, opened)
    for folder in looked_at:
        console.line()
        tell_folder(console, folder)
        if folder not in options.clean:
            tell_leftovers(console, folder)
    for folder in dict.fromkeys(options.clean):
        console.line()
        result["cleaned"].append({"folder": str(folder), "all_gone": clean(console, folder)})
    if options.json:
        write_result(options.json, result)
    return 0 if all(cleaned["all_gone"] for cleaned in result["cleaned"]) else FAILED


def facts_of(folder: Path) -> dict[str, Any]:
    """What the JSON has of a folder."""
    point, source = mount_of(folder)
    return {
        "folder": str(folder),
        "file_system": source,
        "mounted_on": str(point),
        "free_bytes": free_bytes(folder),
        "direct_io": direct_io(folder),
        "leftovers": [str(path) for path in (*leftovers(folder), *unfinished(folder))],
    }


# ----------------------------------------------------------------------------------------------------- telling


def tell_machine(console: Console) -> None:
    """Processor and memory."""
    facts = machine_facts()
    tell(console, "processor", f"{facts['cpu']}, {facts['cores_allowed']} of {facts['cores']} cores for this process")
    if facts["architecture"] == "x86_64":
        for feature, loss in WANTED_FEATURES.items():
            has = feature in facts["vector_features"]
            tell(console, feature.upper(), "yes" if has else f"no: {loss}")
    tell(console, "kernel threads", f"{training_threads()} while training")
    total, free = psutil.virtual_memory().total, free_host_bytes()
    budget = format_bytes(default_host_budget())
    tell(console, "memory", f"{format_bytes(total)}, free {format_bytes(free)}; host_memory would be {budget}")
    tell(console, "huge pages", facts["huge_pages"] or "unknown")


def tell_open(console: Console, opened: Sequence[OpenFile]) -> None:
    """The swap files that runs have open: they have no name, so no listing of a folder shows what takes its room."""
    tell(console, "open swap files", str(len(opened)) if opened else "none that this user may see")
    for file in opened:
        size = format_bytes(file.num_bytes)
        console.line(f"    {file.kind} in {file.folder}, {size}: rank {file.rank}, pid {file.pid}: {file.command}")


def tell_folder(console: Console, folder: Path) -> None:
    """What its disk is and can do."""
    point, source = mount_of(folder)
    console.line(str(folder))
    tell(console, "  file system", f"{source}, mounted on {point}")
    tell(console, "  free", format_bytes(free_bytes(folder)))
    tell(console, "  direct I/O", direct_io(folder))
    record = load_record(folder)
    missing = f"none, sessions use safe defaults; offload bench disk --disk {folder}"
    tell(console, "  record", record.describe() if record is not None else missing)


def direct_io(folder: Path) -> str:
    """Whether swap there would go past the page cache."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return "unknown: this user may not write there, and no session could"
    try:
        taken = takes_direct_io(folder)
    except OSError as error:
        return f"unknown: {error}"
    return "yes" if taken else "no: swap would go through the page cache, slower; name a folder on a local disk"


def tell_leftovers(console: Console, folder: Path) -> None:
    """What dead runs have left, and how to remove it."""
    found = [*leftovers(folder), *unfinished(folder)]
    tell(console, "  leftovers", f"{len(found)} of dead runs" if found else "none")
    for path in found:
        console.line(f"    {describe(path)}")
    if found:
        console.line(f"    offload doctor --clean {folder} removes them")


def clean(console: Console, folder: Path) -> bool:
    """Remove them; whether nothing is left."""
    told = {path: describe(path) for path in (*leftovers(folder), *unfinished(folder))}
    remove_leftovers(folder)
    left = [*leftovers(folder), *unfinished(folder, remove=True)]
    removed = [words for path, words in told.items() if not path.exists()]
    console.line(f"{folder}: removed {len(removed)} leftovers of dead runs")
    for words in removed:
        console.line(f"    {words}")
    for path in left:
        console.line(f"    {path.name} could not be removed; look at its permissions")
    return not left


def describe(path: Path) -> str:
    """One leftover: its name, what it takes, whose it was."""
    try:
        taken = format_bytes(taken_bytes([path, *path.glob("*")]))
    except FileNotFoundError:  # another doctor has been faster
        taken = "gone"
    return f"{path.name}  {taken}  ({owner_of(path) or 'unfinished'})"


def taken_bytes(paths: Sequence[Path]) -> int:
    """On the disk, not as the files' lengths say."""
    return sum(path.lstat().st_blocks * 512 for path in paths)


def tell(console: Console, label: str, words: str) -> None:
    """One line."""
    console.line(f"{label.ljust(LABEL_WIDTH)}{words}")
