"""Options that several benchmarks have.

Owns: their names, their conversion, what they mean.
Does not: know any benchmark's own options (bench_adam.py and its neighbours).
Threads: the main thread.
"""

import argparse
import os
from typing import Final

from offload.cli.rounds import WARM_UP_ROUNDS
from offload.errors import ConfigError

DEFAULT_ROUNDS: Final = 7


def at_least_one(text: str) -> int:
    """A converter for argparse: whole numbers from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1.")
    return int(text)


def not_negative(text: str) -> int:
    """A converter for argparse: whole numbers from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0.")
    return int(text)


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
