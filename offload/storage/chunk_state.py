"""State and weights of one chunk in memory: what a step works on, and what is read and written as fp32.

Owns: the forms in which masters and moments are stored, for whoever wants or gives plain fp32.
Does not: know where the chunk is stored (homes.py), open it (walk.py) or step it (optimizer/).
Threads: used by one thread at a time.
"""

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from offload.config import Precision
from offload.errors import InternalError
from offload.kernels import cast, master_copy, moments, split
from offload.memory.region import bits, typed
from offload.storage.state_tensors import (
    MASTER,
    REMAINDER,
    SCALE,
    WEIGHTS,
    StateTensor,
    StateTensors,
    is_split,
    record_bytes,
    state_views,
)

Array = np.ndarray[Any, np.dtype[Any]]

MAP_OF: Final = {"exp_avg": "signed", "exp_avg_sq": "unsigned"}
"""The 8-bit maps (kernels/dynamic_map.py) of the moments that can be stored by them."""


def prepare(state_tensors: StateTensors, precision: Precision) -> None:
    """Compile what reading and writing these state tensors will need."""
    if is_split(state_tensors):
        split.split_kernel()
        split.join_kernel()
    else:
        master_copy.copy_kernel(precision.value)
    names = {state_tensor.name for state_tensor in state_tensors}
    for state_tensor in state_tensors:
        if state_tensor.name + SCALE in names:
            moments.encode_kernel(MAP_OF[state_tensor.name])
            moments.decode_kernel(MAP_OF[state_tensor.name])
        elif state_tensor.dtype is Precision.BF16.dtype:
            cast.cast_kernel("bf16", "fp32")
            cast.cast_kernel("fp32", "bf16")


class ChunkState:
    """The state tensors of one chunk (none of a frozen one), and its weights where they are in memory, too."""

    def __init__(
        self, state_tensors: StateTensors, record: Tensor, weights: Tensor | None, *, numel: int, precision: Precision
    ) -> None:
        self.state_tensors = {state_tensor.name: state_tensor for state_tensor in state_tensors}
        self.is_split = is_split(state_tensors)
        self.arrays = state_views(state_tensors, record, numel)
        """By name; 16-bit floats as their bits."""
        self.precision = precision
        self._numel = numel
        self._written: set[str] = set()
        self._weights: Array | None = None
        if weights is not None:
            self._weights = bits(typed(weights[: numel * precision.dtype.itemsize], precision.dtype))

    @property
    def weights(self) -> Array:
        """Working weights (numel,); 16-bit floats as their bits."""
        if self._weights is None:
            raise InternalError("weights were asked for of a chunk that was opened without them.")
        return self._weights

    @property
    def array0(self) -> str:
        """The state tensor that every kernel takes first."""
        return REMAINDER.name if self.is_split else MASTER.name

    def part(self, name: str, start: int, stop: int) -> Array:
        """Entries of a state tensor for elements [start, stop); `start` begins a block."""
        state_tensor = self.state_tensors[name]
        return self.arrays[name][start // state_tensor.block_numel : state_tensor.num_entries(stop)]

    def round_weights(self) -> None:
        """All weights from a plain master."""
        master_copy.copy_weights(self.arrays[MASTER.name], self.weights, self.precision.value)

    @property
    def zeros_from(self) -> int | None:
        """Of a record that was cleared: the byte from which all is zeros, where only the first tensor was written."""
        tensors = tuple(self.state_tensors.values())
        if len(tensors) < 2 or not self._written.isdisjoint(tensor.name for tensor in tensors[1:]):
            return None
        return record_bytes(tensors[:1], self._numel)

    def clear(self) -> None:
        """Zeros everywhere."""
        for array in (*self.arrays.values(), self.weights):
            array.fill(0)

    # ------------------------------------------------------------------------------------------- as it is stored

    def entries(self, name: str, start: int, stop: int) -> Tensor:
        """Entries of a state tensor, or of the WEIGHTS, for elements [start, stop): a view."""
        if name == WEIGHTS:
            return torch.from_numpy(self.weights[start:stop]).view(self.precision.dtype)
        return torch.from_numpy(self.part(name, start, stop)).view(self.state_tensors[name].dtype)

    def store(self, name: str, start: int, stop: int, entries: Tensor) -> None:
        """New entries, as `entries` gives them; with a plain master, the weights that follow from it."""
        if name == MASTER.name:
            self.write(name, start, stop, entries.numpy())
        else:
            self.entries(name, start, stop).copy_(entries)
            self._written.add(name)

    # --------------------------------------------------------------------------------------------------- as fp32

    def get(self, name: str, at: slice) -> Tensor:
        """Elements of the master or of a moment in fp32; of a frozen chunk, of its weights as they are."""
        if not self.state_tensors:
            return self.entries(WEIGHTS, at.start, at.stop)
        values = np.empty(at.stop - at.start, np.float32)
        self.read(name, at.start, at.stop, values)
        return torch.from_numpy(values)

    def put(self, name: str, at: slice, values: Tensor) -> None:
        """New values, of any dtype and anywhere: of the master (with the weights) or a moment, or of frozen weights."""
        if not self.state_tensors:
            self.entries(WEIGHTS, at.start, at.stop).copy_(values)
        else:
            self.write(name, at.start, at.stop, values.to("cpu", torch.float32).contiguous().numpy())

    def read(self, name: str, start: int, stop: int, out: Array) -> None:
        """Elements [start, stop) of the master or of a moment into `out` fp32."""
        if name == MASTER.name and self.is_split:
            split.join_kernel()(self.weights[start:stop], self.arrays[REMAINDER.name][start:stop], out)
        elif name + SCALE in self.state_tensors:
            decode = moments.decode_kernel(MAP_OF[name])
            decode(self.part(name, start, stop), self.part(name + SCALE, start, stop), out)
        elif self._is_bf16(self.state_tensors[name]):
            cast.cast_kernel("bf16", "fp32")(self.arrays[name][start:stop], out)
        else:
            out[:] = self.arrays[name][start:stop]

    def write(self, name: str, start: int, stop: int, values: Array) -> None:
        """fp32 `values` as elements [start, stop) of a moment, or of the master and with it the weights."""
        self._written.add(name)
        if name == MASTER.name and self.is_split:
            split.split_kernel()(values, self.weights[start:stop], self.arrays[REMAINDER.name][start:stop])
        elif name == MASTER.name:
            self.arrays[name][start:stop] = values
            master_copy.copy_weights(values, self.weights[start:stop], self.precision.value)
        elif name + SCALE in self.state_tensors:
            encode = moments.encode_kernel(MAP_OF[name])
            encode(values, self.part(name, start, stop), self.part(name + SCALE, start, stop))
        elif self._is_bf16(self.state_tensors[name]):
            cast.cast_kernel("fp32", "bf16")(values, self.arrays[name][start:stop])
        else:
            self.arrays[name][start:stop] = values

    def _is_bf16(self, state_tensor: StateTensor) -> bool:
        return state_tensor.dtype is Precision.BF16.dtype
