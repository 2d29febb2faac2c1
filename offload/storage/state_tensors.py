"""State tensors: the arrays of optimizer state, and where each lies in the record of a chunk.

Owns: the layout of a record, and the state tensor that holds the master; everything else (disk layout, plan, byte
counts, checkpoints) derives from a table of state tensors.
Does not: know optimizers (optimizer/kinds.py) or where records are (homes.py).
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from offload.memory.region import bits, typed
from offload.units import DISK_ALIGN_BYTES, round_up


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One array of what is stored of parameters: one entry for each element, or for each block of them."""

    name: str
    dtype: torch.dtype
    block_numel: int = 1
    """Elements for one entry: more than 1 for scales."""

    def num_entries(self, numel: int) -> int:
        """Entries for so many elements."""
        return -(-numel // self.block_numel)

    @property
    def bytes_per_element(self) -> float:
        """Bytes of the state tensor for each element."""
        return self.dtype.itemsize / self.block_numel


MASTER: Final = StateTensor("master", torch.float32)
REMAINDER: Final = StateTensor("remainder", torch.uint16)
"""What a bf16 weight lacks of its master: together they are the split master (kernels/split.py)."""

WEIGHTS: Final = "weights"
"""The name of working weights, where they are listed with state tensors."""

SCALE: Final = "_scale"
"""What follows a moment's name in that of the state tensor of its scales."""

StateTensors = tuple[StateTensor, ...]


def is_split(state_tensors: StateTensors) -> bool:
    """Whether the weights are part of the state."""
    return REMAINDER in state_tensors


def weights_tensor(dtype: torch.dtype) -> StateTensor:
    """Working weights as one more array."""
    return StateTensor(WEIGHTS, dtype)


def record_bytes(state_tensors: StateTensors, numel: int) -> int:
    """Bytes of the record of a chunk: its state tensors side by side, each padded for direct I/O."""
    return sum(
        round_up(state_tensor.num_entries(numel) * state_tensor.dtype.itemsize, DISK_ALIGN_BYTES)
        for state_tensor in state_tensors
    )


def state_tensors_in(state_tensors: StateTensors, record: Tensor, numel: int) -> dict[str, Tensor]:
    """The state tensors of a record (uint8) of `numel` elements, wherever it lies."""
    tensors, offset = {}, 0
    for state_tensor in state_tensors:
        num_bytes = state_tensor.num_entries(numel) * state_tensor.dtype.itemsize
        tensors[state_tensor.name] = typed(record[offset : offset + num_bytes], state_tensor.dtype)
        offset += round_up(num_bytes, DISK_ALIGN_BYTES)
    return tensors


def state_views(state_tensors: StateTensors, record: Tensor, numel: int) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """The same in host memory, as numpy arrays; 16-bit floats as their bits."""
    return {name: bits(tensor) for name, tensor in state_tensors_in(state_tensors, record, numel).items()}
