"""What is stored, as plain tensors: weights in one dtype, moments in fp32, whatever the encodings were.

Owns: which tensors an export has, their dtypes, and reading them by range in bounded memory.
Does not: convert (convert.py) or know a format (export_hf.py, export_dcp.py).
Threads: one.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from offload.checkpoint.format.convert import Converter
from offload.checkpoint.format.errors import CheckpointError
from offload.checkpoint.format.state import (
    MASTER,
    REMAINDER,
    SCALES,
    WEIGHTS,
    Item,
    Kind,
    Run,
    StateReader,
    StateTensor,
)

CHUNK_NUMEL: Final = 1024 * 1024
"""Elements read at once, a multiple of every block of scales."""

EXPORT_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


class PlainTensors:
    """The tensors of a reader for an export.

    `dtype`: that of all floating-point parameters; None keeps for each the dtype that it has outside the session.
    Trained parameters are cast from their masters, to bf16 as training rounds them; buffers keep their dtype.
    """

    def __init__(self, reader: StateReader, dtype: torch.dtype | None) -> None:
        if dtype is not None and dtype not in EXPORT_DTYPES:
            raise CheckpointError(f"dtype={dtype}: expected None or one of {', '.join(map(str, EXPORT_DTYPES))}.")
        self.weights = {name: _exported(item, dtype) for name, item in reader.items.items()}
        """Items with the one state tensor that is exported."""
        self.moments = {name: _moments(item) for name, item in reader.items.items() if item.kind is Kind.TRAINABLE}
        """Names of the moments of each trained parameter."""
        trained = {name: _decoded(reader.items[name], moments) for name, moments in self.moments.items()}
        self._weights = Converter(reader, self.weights)
        self._moments = Converter(reader, trained)
        self._scratch: dict[torch.dtype, Tensor] = {}

    def read(self, name: str, state_tensor: str, start: int, out: Tensor) -> None:
        """Elements from `start` on: of the state tensor WEIGHTS, or of a moment in fp32."""
        source = self._weights if state_tensor == WEIGHTS else self._moments
        for at in range(0, out.numel(), CHUNK_NUMEL):
            part = out[at : at + CHUNK_NUMEL]
            source.read(Run(name, state_tensor, start + at, start + at + part.numel()), part)

    def chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """The weights of an item, from the first to the last: (start, values), valid until the next."""
        item = self.weights[name]
        dtype = item.state_tensors[0].dtype
        if dtype not in self._scratch:
            self._scratch[dtype] = torch.empty(CHUNK_NUMEL, dtype=dtype)
        for start in range(0, item.numel, CHUNK_NUMEL):
            values = self._scratch[dtype][: min(CHUNK_NUMEL, item.numel - start)]
            self.read(name, WEIGHTS, start, values)
            yield start, values


def _exported(item: Item, dtype: torch.dtype | None) -> Item:
    wanted = item.dtype
    if item.kind is not Kind.BUFFER and dtype is not None and item.dtype.is_floating_point:
        wanted = dtype
    kind = Kind.BUFFER if item.kind is Kind.BUFFER else Kind.FROZEN
    return replace(item, kind=kind, dtype=wanted, state_tensors=(StateTensor(WEIGHTS, wanted),))


def _moments(item: Item) -> tuple[str, ...]:
    names = (state_tensor.name for state_tensor in item.state_tensors)
    return tuple(name for name in names if name not in (MASTER, WEIGHTS, REMAINDER) and not name.endswith(SCALES))


def _decoded(item: Item, moments: tuple[str, ...]) -> Item:
    state_tensors = tuple(StateTensor(name, torch.float32) for name in (MASTER, *moments))
    return replace(item, state_tensors=state_tensors)
