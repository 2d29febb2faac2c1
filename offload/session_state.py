"""A session's values as checkpoints know them: items, planes and runs over the homes.

Owns: which items a session has, which part of which piece each run is, and the order: piece by piece, so that none is
read or written twice.
Does not: read or write homes (fill.py), files (checkpoint/) or anything that is no tensor (persistence.py).
Threads: the training thread, with idle lanes.

Note [One piece open]: the piece that was asked for last stays open, with its slab, until another one is asked for. So
the planes of a piece that lies on disk cost one read or one write of its record, and memory is one slab of state and
one of weights, whatever the size of the model.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor, nn

from offload.checkpoint.state import MASTER, WEIGHTS, Item, Kind, PlaneSpec, Run
from offload.errors import InternalError
from offload.fill import Filler, overlaps
from offload.homes import Piece
from offload.optimizer.planes import Planes, is_split
from offload.optimizer.stored import StoredPiece
from offload.partition import Entry, Partition
from offload.storage import Storage

RESIDENT_NUMEL: Final = 1024 * 1024
"""Elements of a run of what no plan moves, as buffers."""


@dataclass(frozen=True, slots=True)
class _Place:
    """One piece: the number of its partition, and its own among the pieces of its flat."""

    partition_id: int
    trainable: bool
    number: int


@dataclass(frozen=True, slots=True)
class _Part:
    """One run and where it is: elements [start, stop) of a piece, or of a tensor that stays where it is."""

    run: Run
    place: _Place | Tensor
    start: int
    stop: int


class SessionValues:
    """Which items and runs a session has. Made once; tensors are looked up at each use."""

    def __init__(
        self, model: nn.Module, partitions: Sequence[Partition], *, storage: Storage, num_steps: Mapping[int, int]
    ) -> None:
        self._model = model
        self._partitions = partitions
        self._storage = storage
        self._num_steps = num_steps
        self._entries: dict[nn.Parameter, tuple[Partition, Entry]] = {
            entry.parameter: (partition, entry) for partition in partitions for entry in partition.entries()
        }

    def items(self) -> list[Item]:
        """All items, in the order of `model.state_dict()`."""
        names: dict[Tensor, list[str]] = {}
        for name, tensor in named_tensors(self._model):
            names.setdefault(tensor, []).append(name)
        return [self._item(tensor, name, tuple(aliases)) for tensor, (name, *aliases) in names.items()]

    def parts(self) -> list[_Part]:
        """Where every run is: piece by piece, then what stays where it is."""
        parts: list[_Part] = []
        named = {item.name: item for item in self.items()}
        for partition in self._partitions:
            numbers = {True: 0, False: 0}
            for piece, _ in self._storage.weights[partition.id]:
                place = _Place(partition.id, piece.trainable, numbers[piece.trainable])
                numbers[piece.trainable] += 1
                parts += self._of_piece(partition, piece, place, named)
        for tensor in self._resident():
            item = named.pop(self._name_of(tensor))
            step = RESIDENT_NUMEL if tensor.is_contiguous() else max(1, item.numel)
            for start in range(0, item.numel, step):
                stop = min(start + step, item.numel)
                parts.append(_Part(Run(item.name, WEIGHTS, start, stop), tensor, start, stop))
        return parts

    def _item(self, tensor: Tensor, name: str, aliases: tuple[str, ...]) -> Item:
        found = self._entries.get(tensor) if isinstance(tensor, nn.Parameter) else None
        if found is None:
            kind = Kind.FROZEN if isinstance(tensor, nn.Parameter) else Kind.BUFFER
            planes = (PlaneSpec(WEIGHTS, tensor.dtype),)
            return Item(
                name=name, kind=kind, shape=tuple(tensor.shape), dtype=tensor.dtype, planes=planes, aliases=aliases
            )
        partition, entry = found
        trainable = entry.index >= 0
        return Item(
            name=name,
            kind=Kind.TRAINABLE if trainable else Kind.FROZEN,
            shape=tuple(entry.shape),
            dtype=entry.original_dtype,
            planes=self._planes(partition) if trainable else (PlaneSpec(WEIGHTS, self._storage.precision.dtype),),
            step=self._num_steps.get(entry.index, 0),
            aliases=aliases,
        )

    def _planes(self, partition: Partition) -> tuple[PlaneSpec, ...]:
        planes: Planes = self._storage.planes[partition.id]
        kept = tuple(PlaneSpec(plane.name, plane.dtype, plane.block_numel) for plane in planes)
        return (PlaneSpec(WEIGHTS, torch.bfloat16), *kept) if is_split(planes) else kept

    def _of_piece(
        self, partition: Partition, piece: Piece, place: _Place, named: Mapping[str, Item]
    ) -> Iterator[_Part]:
        flat = partition.flats[0 if piece.trainable else 1]
        for entry, in_piece, in_entry in overlaps(flat.entries, piece):
            for plane in named[self._name_of(entry.parameter)].planes:
                start, stop = in_entry.start // plane.block_numel, plane.num_entries(in_entry.stop)
                run = Run(self._name_of(entry.parameter), plane.name, start, stop)
                yield _Part(run, place, in_piece.start, in_piece.stop)
