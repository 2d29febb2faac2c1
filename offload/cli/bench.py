"""`offload bench`: the group of the benchmarks.

Owns: the subcommand that holds them.
Does not: know any benchmark's options or work (one file each).
Threads: the main thread.
"""

import argparse
from typing import Any, Final

from offload.cli import bench_adam, bench_disk, bench_overlap, bench_step

BENCHMARKS: Final = (bench_adam, bench_disk, bench_step, bench_overlap)
"""In the order of `offload bench --help`."""


def add_command(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add `bench` to the command line, with each benchmark below it."""
    parser = commands.add_parser("bench", help="measure this machine against its limits and against other libraries")
    benchmarks = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    for benchmark in BENCHMARKS:
        benchmark.add_command(benchmarks)
