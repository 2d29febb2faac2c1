"""Planes: the arrays of optimizer state, and where each lies in the record of a piece.

Owns: the layout of a record, and the plane that holds the master; everything else (disk layout, plan, byte counts)
derives from a table of planes.
Does not: know optimizers (kinds.py) or where records are (homes.py).
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
    """One array of state."""

    name: str
    dtype: torch.dtype
    block_numel: int = 1
    """Elements for one entry: more than 1 for scales."""

    def num_entries(self, numel: int) -> int:
        """Entries for so many elements."""
        return -(-numel // self.block_numel)

    @property
    def bytes_per_element(self) -> float:
        """Bytes of the plane for each element."""
        return self.dtype.itemsize / self.block_numel


MASTER: Final = Plane("master", torch.float32)
REMAINDER: Final = Plane("remainder", torch.uint16)
"""What a bf16 weight lacks of its master: together they are the split master (kernels/split.py)."""

Planes = tuple[Plane, ...]


def is_split(planes: Planes) -> bool:
    """Whether the weights are part of the state."""
    return REMAINDER in planes


def record_bytes(planes: Planes, numel: int) -> int:
    """Bytes of the record of a piece: its planes side by side, each padded for direct I/O."""
    return sum(round_up(plane.num_entries(numel) * plane.dtype.itemsize, DISK_ALIGN_BYTES) for plane in planes)


def plane_tensors(planes: Planes, record: Tensor, numel: int) -> dict[str, Tensor]:
    """The planes of a record (uint8) of `numel` elements, wherever it lies."""
    tensors, offset = {}, 0
    for plane in planes:
        num_bytes = plane.num_entries(numel) * plane.dtype.itemsize
        tensors[plane.name] = typed(record[offset : offset + num_bytes], plane.dtype)
        offset += round_up(num_bytes, DISK_ALIGN_BYTES)
    return tensors


def plane_views(planes: Planes, record: Tensor, numel: int) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """The same in host memory, as numpy arrays; 16-bit floats as their bits."""
    return {name: bits(tensor) for name, tensor in plane_tensors(planes, record, numel).items()}
