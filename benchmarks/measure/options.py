"""Options that several benchmarks have.

Owns: their names, their conversion, what they mean.
Does not: know any benchmark's own options (benchmarks/commands/).
Threads: the main thread.
"""

import argparse
import os
from typing import Final

from benchmarks.measure.rounds import WARM_UP_ROUNDS
from offload.cli.numbers import at_least_one, not_negative
from offload.errors import ConfigError

DEFAULT_ROUNDS: Final = 7


def add_round_options(parser: argparse.ArgumentParser) -> None:
    """--rounds, --seed and --json."""
    rounds_help = f"measured rounds, after {WARM_UP_ROUNDS} of warm-up (default: %(default)s)"
    parser.add_argument("--rounds", type=at_least_one, default=DEFAULT_ROUNDS, metavar="N", help=rounds_help)
    parser.add_argument(
        "--seed", type=not_negative, default=0, metavar="N", help="of the values (default: %(default)s)"
    )
    parser.add_argument(
        "--json", metavar="PATH", help="write the figures there, and a chart beside it (.svg); - is standard output"
    )


def cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def checked_threads(threads: int | None) -> int:
    """All cores where none are asked for. Raises ConfigError for more: they would take turns, and measure that."""
    allowed = cores()
    if threads is None:
        return allowed
    if threads > allowed:
        raise ConfigError(f"--threads {threads}: this process may use {allowed} cores; ask for at most as many.")
    return threads
