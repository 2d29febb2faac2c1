"""What a run costs a solid-state disk: bytes written, projected against what its maker rates it for.

Owns: the arithmetic and the words.
Does not: count bytes (the timeline does) or show anything (report/).
Threads: any; pure functions.
"""

import math
from dataclasses import dataclass
from typing import Final

from offload.errors import ConfigError

TB: Final = 10**12
"""Makers rate endurance in terabytes written (TBW), of 1000^4 bytes."""

DAY_S: Final = 86_400.0

ALARMING_DAYS: Final = 90.0
"""A disk that would be worn out after three months of such runs is not meant for them."""

ALARMING_SHARE: Final = 0.05
"""Nor is one of which a single run takes a twentieth."""


@dataclass(frozen=True, slots=True)
class Endurance:
    """What to tell about the disk's wear."""

    text: str
    is_alarming: bool


def project_endurance(
    written_bytes: int, elapsed_s: float, *, rated_tbw: float | None, total_s: float | None = None
) -> Endurance:
    """The wear of the disk after `elapsed_s` seconds in which `written_bytes` were written to it.

    `rated_tbw`: what the maker rates the disk for (all disks together where there are several); None: not known.
    `total_s`: how long the whole run takes, where that is known. Raises ConfigError for a rating that is no number > 0.
    """
    if rated_tbw is not None and not (math.isfinite(rated_tbw) and rated_tbw > 0):
        raise ConfigError(
            f"rated_tbw={rated_tbw!r} must be the terabytes written that the disk is rated for, as 600; its data sheet "
            "names them (TBW)."
        )
    rate = written_bytes / elapsed_s if elapsed_s > 0 else 0.0
    text = f"{_bytes(written_bytes)} written to disk"
    if rate:
        text += f", {_bytes(rate)} a second"
    if rated_tbw is None:
        return Endurance(f"{text}; --rated-tbw tells what that is of the disk's endurance", is_alarming=False)
    rated_bytes = rated_tbw * TB
    run_bytes = max(float(written_bytes), rate * total_s) if total_s is not None else float(written_bytes)
    share = run_bytes / rated_bytes
    whose = "the whole run" if total_s is not None else "so far"
    text += f"; {whose} {_percent(share)} of the {rated_tbw:g} TB that the disk is rated for"
    if not rate:
        return Endurance(text, is_alarming=share > ALARMING_SHARE)
    days = rated_bytes / rate / DAY_S
    text += f", which last {_days(days)} at this rate"
    is_alarming = days < ALARMING_DAYS or share > ALARMING_SHARE
    if is_alarming:
        text += ". Raise host_memory so that less goes to disk, or use a disk made for writing"
    return Endurance(text, is_alarming)


def _bytes(num_bytes: float) -> str:
    for unit, size in (("PB", 10**15), ("TB", TB), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def _percent(share: float) -> str:
    return "less than 0.01 %" if 0 < share < 1e-4 else f"{share:.2%}".replace("%", " %")


def _days(days: float) -> str:
    if days < 2:
        return f"{days * 24:.1f} hours"
    return f"{days:.0f} days" if days < 730 else f"{days / 365:.0f} years"
