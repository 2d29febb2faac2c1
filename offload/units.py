"""Units, tiers and the arithmetic of bytes.

Owns: the names of the tiers, alignment constants, parsing and printing of byte counts.
Does not: know the machine (planning/hardware.py).
"""

import re
from enum import StrEnum
from numbers import Real
from typing import Final

from offload.errors import ConfigError

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

PARAMETER_ALIGN_BYTES: Final = 256
"""Each parameter starts at a multiple of this in its flat parameter: vector loads and coalesced access stay aligned."""

DISK_ALIGN_BYTES: Final = 4096
"""Address, offset and length of direct I/O are multiples of this on every file system met so far."""

BLOCK_NUMEL: Final = 65_536
"""Elements in one block of the norm and in one slice of a kernel. Borders of chunks are multiples of it, so that
neither the order of a sum nor the position of a vector tail depends on the plan."""

MAX_CHUNK_NUMEL: Final = 2 * 1024 * 1024
"""Largest chunk, in elements."""

_SUFFIXES: Final = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 1000,
    "m": MIB, "mib": MIB, "mb": 1000**2,
    "g": GIB, "gib": GIB, "gb": 1000**3,
    "t": 1024 * GIB, "tib": 1024 * GIB, "tb": 1000**4,
}  # fmt: skip


class Tier(StrEnum):
    """Where bytes can be stored."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def parse_bytes(value: int | str, *, name: str) -> int:
    """Bytes from a count or a text as "8GiB", "512 MiB", "1.5g".

    "KiB MiB GiB TiB" (and "K M G T") are powers of 1024, "KB MB GB TB" powers of 1000. Raises ConfigError.
    """
    if isinstance(value, Real) and not isinstance(value, bool) and value == value // 1:
        num_bytes = int(value)
    else:
        match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value) if isinstance(value, str) else None
        suffix = match.group(2).lower() if match else ""
        if match is None or suffix not in _SUFFIXES:
            raise ConfigError(f"{name}={value!r} is not a byte count; write it as 8GiB, 512MiB or a number of bytes.")
        num_bytes = int(float(match.group(1)) * _SUFFIXES[suffix])
    if num_bytes <= 0:
        raise ConfigError(f"{name}={value!r} must be more than 0 bytes; leave it out to use what is free.")
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """Bytes for people: "1.50 GiB"."""
    for unit, size in (("TiB", 1024 * GIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{int(num_bytes)} B"
