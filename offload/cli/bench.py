"""`offload bench`: the disk's probe, and the benchmarks of a checkout.

Owns: finding the benchmarks, which a checkout has and an installed wheel does not, and what is said without them.
Does not: know any benchmark's options or work (bench_disk.py; `benchmarks/commands/` in the repository).
Threads: the main thread.
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any, Final

from offload.cli import bench_disk
from offload.errors import ConfigError

BESIDE_PACKAGE: Final = Path(__file__).resolve().parents[2]
"""A checkout's root where the package is imported from one."""
COMMANDS: Final = Path("benchmarks", "commands", "__init__.py")
"""Within a checkout."""
OF_CHECKOUT: Final = {
    "adam": "one AdamW step on the CPU",
    "step": "the optimizer step of a session alone",
    "overlap": "what of a step hides behind compute",
}


def add_command(commands: "argparse._SubParsersAction[Any]", *, is_asked_for: bool) -> None:
    """Add `bench` to the command line; with each benchmark below it where one `is_asked_for`.

    Other commands must not depend on a checkout that happens to be the current directory.
    """
    parser = commands.add_parser("bench", help="measure this machine against its limits and against other libraries")
    benchmarks = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    if not is_asked_for:
        return
    checkout = find_checkout()
    if checkout is not None:
        if str(checkout) not in sys.path:
            sys.path.insert(0, str(checkout))
        for benchmark in importlib.import_module("benchmarks.commands").COMMANDS:
            benchmark.add_command(benchmarks)
        return
    bench_disk.add_command(benchmarks)
    for name, words in OF_CHECKOUT.items():
        # Nothing is an option here: any arguments are accepted, so that the message is about the checkout.
        absent = benchmarks.add_parser(name, help=f"{words} (needs a checkout)", prefix_chars="\0", add_help=False)
        absent.add_argument("arguments", nargs="*")
        absent.set_defaults(run=run_without_checkout, benchmark=name)


def find_checkout() -> Path | None:
    """The root of the repository: where this package lies in it, else the current directory if it is one."""
    return next((root for root in (BESIDE_PACKAGE, Path.cwd()) if (root / COMMANDS).is_file()), None)


def run_without_checkout(options: argparse.Namespace) -> int:
    """Say what is needed."""
    raise ConfigError(
        f"`offload bench {options.benchmark}` needs a checkout of the repository: neither {BESIDE_PACKAGE} nor the "
        f"current directory {Path.cwd()} has {COMMANDS}. Run it in a checkout's root, or `pip install -e` the checkout."
    )
