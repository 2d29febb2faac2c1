"""Values as options of commands take them: converters for argparse, each with what it takes.

Owns: reading numbers, byte counts and names of dtypes from text.
Does not: know any command's options.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from offload.config import DTYPE_NAMES, MAX_WAIT_S
from offload.errors import ConfigError
from offload.units import parse_bytes

T = TypeVar("T")

MAX_SEED: Final = 2**64 - 1
"""torch takes no greater one."""


def checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A converter for argparse, which shows the words of an ArgumentTypeError alone."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


@checked
def byte_count(text: str) -> int:
    """Bytes, as "8GiB"."""
    return parse_bytes(text, name="the budget")


def at_least_one(text: str) -> int:
    """Whole numbers from 1 on."""
    if not _is_whole(text) or not 1 <= int(text) <= sys.maxsize:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1.")
    return int(text)


def not_negative(text: str) -> int:
    """Whole numbers from 0 on."""
    if not _is_whole(text) or int(text) > sys.maxsize:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0.")
    return int(text)


def seed(text: str) -> int:
    """Seeds that every random generator takes."""
    if not _is_whole(text) or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {MAX_SEED}.")
    return int(text)


def learning_rate(text: str) -> float:
    """Finite numbers from 0 on."""
    rate = _number(text)
    if not (math.isfinite(rate) and rate >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0.")
    return rate


def norm(text: str) -> float:
    """Numbers above 0; infinity for "none"."""
    value = math.inf if text == "none" else _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of more than 0 nor none.")
    return value


def terabytes(text: str) -> float:
    """Finite numbers above 0."""
    rated = _number(text)
    if not (math.isfinite(rated) and rated > 0):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the number of terabytes written that a disk is rated for, as 600 (its data sheet: TBW)."
        )
    return rated


def wait_seconds(text: str) -> float:
    """Seconds above 0, within a year."""
    seconds = _number(text)
    if not 0 < seconds <= MAX_WAIT_S:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds, more than 0 and at most {MAX_WAIT_S:.0f} (a year)."
        )
    return seconds


def path(text: str) -> Path:
    """A path, with `~` replaced by the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty text names no file or folder.")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # "~name" of nobody
        raise argparse.ArgumentTypeError(f"{text!r}: {error}; write it without ~.") from error


def dtype_name(text: str) -> str:
    """The short name of a dtype; any other text as it is, for argparse to compare with the choices."""
    return DTYPE_NAMES.get(text, text)


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_SEED))


def _number(text: str) -> float:
    """NaN, which no converter takes, for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan
