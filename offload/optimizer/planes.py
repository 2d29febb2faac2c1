"""Planes: the arrays of optimizer state, and where each lies in the record of a piece.

Owns: the table of planes of every optimizer kind; everything else (disk layout, plan, byte counts) derives from it.
Does not: know where records are (homes.py).
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from offload.memory.region import bits, typed
from offload.units import DISK_ALIGN_BYTES, round_up


@dataclass(frozen=True, slots=True)
class Plane:
    """One array of state, one entry per element."""

    name: str
    dtype: torch.dtype


ADAM_PLANES: Final = (
    Plane("master", torch.float32),
    Plane("exp_avg", torch.float32),
    Plane("exp_avg_sq", torch.float32),
)


def record_bytes(planes: tuple[Plane, ...], numel: int) -> int:
    """Bytes of the record of a piece: its planes side by side, each padded for direct I/O."""
    return sum(round_up(numel * plane.dtype.itemsize, DISK_ALIGN_BYTES) for plane in planes)


def plane_views(planes: tuple[Plane, ...], record: Tensor, numel: int) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """The planes of a record (uint8), as numpy arrays of `numel` elements."""
    views, offset = {}, 0
    for plane in planes:
        num_bytes = numel * plane.dtype.itemsize
        views[plane.name] = bits(typed(record[offset : offset + num_bytes], plane.dtype))
        offset += round_up(num_bytes, DISK_ALIGN_BYTES)
    return views
