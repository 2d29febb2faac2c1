"""A session's values as checkpoints know them: items, state tensors and runs over the homes.

Owns: which items a session has, which part of which chunk each run is, and the order: chunk by chunk, so that none is
read or written twice.
Does not: read or write homes (fill.py), files (checkpoint/) or anything that is no tensor (persistence.py).
Threads: the training thread, with idle lanes.

Note [One chunk open]: the chunk that was asked for last stays open, with its staging buffer, until another one is asked for. So
the state tensors of a chunk that lies on disk cost one read or one write of its record, and memory is one staging buffer of state and
one of weights, whatever the size of the model.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from offload.checkpoint.format.state import MASTER, WEIGHTS, Item, Kind, Run, TensorSpec
from offload.model.partitions import Entry, Partition
from offload.storage.allocation import Storage
from offload.storage.chunk_state import ChunkState
from offload.storage.homes import Chunk
from offload.storage.state_tensors import is_split
from offload.storage.values import Filler, overlaps

RESIDENT_NUMEL: Final = 1024 * 1024
"""Elements of a run of what no plan moves, as buffers."""


@dataclass(frozen=True, slots=True)
class _Place:
    """One chunk, and its number among those of its flat."""

    chunk: Chunk
    number: int


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One run and where it is: elements [start, stop) of a chunk, or of a tensor that stays where it is."""

    run: Run
    place: _Place | Tensor
    start: int
    stop: int


class SessionValues:
    """Which items and runs a session has: buffers are looked up at each use, modules may replace them."""

    def __init__(
        self,
        model: nn.Module,
        partitions: Sequence[Partition],
        *,
        storage: Storage,
        dtype: torch.dtype,
        num_steps: dict[int, int],
    ) -> None:
        self._model = model
        self._partitions = partitions
        self._storage = storage
        self._dtype = dtype
        self.num_steps = num_steps
        self._entries: dict[Tensor, tuple[Partition, Entry]] = {
            entry.parameter: (partition, entry) for partition in partitions for entry in partition.entries()
        }

    def items(self) -> list[Item]:
        """All items, in the order of `model.state_dict()`."""
        return [self._item(tensor, names) for tensor, names in names_by_tensor(self._model).items()]

    def parts(self, *, resident: bool = True) -> list[Part]:
        """Where every run of this rank is: chunk by chunk, then, where `resident`, what stays where it is.

        Every rank has whole what stays where it is: all of them load it, one of them saves it.
        """
        parts: list[Part] = []
        names = {tensor: first for tensor, (first, *_) in names_by_tensor(self._model).items()}
        for partition in self._partitions:
            numbers = {True: 0, False: 0}
            for home in self._storage.weights[partition.id]:
                chunk = home.chunk
                place = _Place(chunk, numbers[chunk.trainable])
                numbers[chunk.trainable] += 1
                for entry, in_chunk, in_entry in overlaps(
                    partition.flat_parameters[0 if chunk.trainable else 1].entries, chunk
                ):
                    for state_tensor in self._state_tensors(partition, entry):
                        start, stop = (
                            in_entry.start // state_tensor.block_numel,
                            state_tensor.num_entries(in_entry.stop),
                        )
                        run = Run(names[entry.parameter], state_tensor.name, start, stop)
                        parts.append(Part(run, place, in_chunk.start, in_chunk.stop))
        for tensor, name in names.items() if resident else ():
            if tensor not in self._entries:
                step = RESIDENT_NUMEL if tensor.is_contiguous() else max(1, tensor.numel())
                for start in range(0, tensor.numel(), step):
                    stop = min(start + step, tensor.numel())
                    parts.append(Part(Run(name, WEIGHTS, start, stop), tensor, start, stop))
        return parts

    def trainable(self) -> list[tuple[str, Entry]]:
        """The parameters that are stepped, by their items' names."""
        found = [
            (names[0], self._entries[tensor][1])
            for tensor, names in names_by_tensor(self._model).items()
            if tensor in self._entries
        ]
        return [(name, entry) for name, entry in found if entry.index >= 0]

    def _item(self, tensor: Tensor, names: Sequence[str]) -> Item:
        first, *aliases = names
        if tensor not in self._entries:
            kind = Kind.FROZEN if isinstance(tensor, nn.Parameter) else Kind.BUFFER
            state_tensors: tuple[TensorSpec, ...] = (TensorSpec(WEIGHTS, tensor.dtype),)
            shape, dtype, step = tensor.shape, tensor.dtype, 0
        else:
            partition, entry = self._entries[tensor]
            kind = Kind.TRAINABLE if entry.index >= 0 else Kind.FROZEN
            state_tensors = self._state_tensors(partition, entry)
            shape, dtype, step = entry.shape, entry.original_dtype, self.num_steps.get(entry.index, 0)
        return Item(
            name=first,
            kind=kind,
            shape=tuple(shape),
            dtype=dtype,
            state_tensors=state_tensors,
            step=step,
            aliases=tuple(aliases),
        )

    def _state_tensors(self, partition: Partition, entry: Entry) -> tuple[TensorSpec, ...]:
        if entry.index < 0:
            return (TensorSpec(WEIGHTS, self._dtype),)
        state_tensors = self._storage.state_tensors[partition.id]
        kept = tuple(
            TensorSpec(state_tensor.name, state_tensor.dtype, state_tensor.block_numel)
            for state_tensor in state_tensors
        )
        return (TensorSpec(WEIGHTS, self._dtype), *kept) if is_split(state_tensors) else kept


class _OpenChunk:
    """See Note [One chunk open]."""

    def __init__(self, filler: Filler, storage: Storage, *, write: bool) -> None:
        self._filler = filler
        self._storage = storage
        self._write = write
        self._open = ExitStack()
        self._place: _Place | None = None
        self._stored: ChunkState | None = None
        self._weights: Tensor | None = None

    def values(self, part: Part) -> Tensor:
        """The entries of a run, where they lie: valid until another chunk is asked for, or `close`."""
        if isinstance(part.place, Tensor):
            return part.place.detach().reshape(-1)[part.start : part.stop].to("cpu").contiguous()
        self._go(part.place)
        if self._weights is not None:
            return self._weights[part.start : part.stop]
        assert self._stored is not None
        if part.run.state_tensor == WEIGHTS:
            return torch.from_numpy(self._stored.weights[part.start : part.stop]).view(torch.bfloat16)
        array = self._stored.part(part.run.state_tensor, part.start, part.stop)
        return torch.from_numpy(array).view(self._stored.state_tensors[part.run.state_tensor].dtype)

    def write(self, part: Part, values: Tensor) -> None:
        """New entries of a run; with a plain master, the weights that follow from it."""
        if isinstance(part.place, Tensor):
            target = part.place.detach()
            target = target.view(-1)[part.start : part.stop] if target.is_contiguous() else target
            target.copy_(values.view(target.shape))
        elif part.run.state_tensor == MASTER:
            self._go(part.place)
            assert self._stored is not None
            self._stored.write(MASTER, part.start, part.stop, values.numpy())
        else:
            self.values(part).copy_(values)

    def close(self) -> None:
        """Write back and let go of what is open. Idempotent."""
        self._place = self._stored = self._weights = None
        self._open.close()

    def _go(self, place: _Place) -> None:
        if place == self._place:
            return
        self.close()
        chunk = place.chunk
        if not chunk.trainable:
            home = next(h for h in self._storage.weights[chunk.partition_id] if h.chunk is chunk)
            self._weights = self._open.enter_context(self._filler.weights(home, write=self._write))
            filled = [self._weights]
        else:
            opened = self._filler.stored(chunk.partition_id, place.number, read=not self._write, write=self._write)
            self._stored = self._open.enter_context(opened)
            filled = list(map(torch.from_numpy, self._stored.arrays.values()))
            filled += [torch.from_numpy(self._stored.weights)] if self._write else []
        for array in filled if self._write else ():
            array.zero_()  # between parameters there is padding, and every staging buffer has held something else
        self._place = place


class SessionSource:
    """See StateSource. Close it after a save, also after one that failed: it may hold a staging buffer."""

    def __init__(self, values: SessionValues, filler: Filler, storage: Storage, *, resident: bool = True) -> None:
        self._items = values.items()
        self._parts = values.parts(resident=resident)
        self._chunk = _OpenChunk(filler, storage, write=False)

    def items(self) -> Sequence[Item]:
        """See StateSource."""
        return self._items

    def runs(self) -> Sequence[Run]:
        """See StateSource."""
        return [part.run for part in self._parts]

    def values(self) -> Iterator[Tensor]:
        """See StateSource."""
        for part in self._parts:
            yield self._chunk.values(part)
        self.close()

    def close(self) -> None:
        """Let go of the staging buffer. Idempotent."""
        self._chunk.close()


class SessionReader:
    """See StateReader: a session of one rank as if it were a checkpoint, for exports. Close it: it may hold a staging buffer."""

    where = "the session"

    def __init__(self, values: SessionValues, filler: Filler, storage: Storage) -> None:
        self.items: Mapping[str, Item] = {item.name: item for item in values.items()}
        self._chunk = _OpenChunk(filler, storage, write=False)
        self._parts: dict[tuple[str, str], list[Part]] = {}
        for part in values.parts():
            self._parts.setdefault((part.run.item, part.run.state_tensor), []).append(part)

    def verify(self, runs: Iterable[Run]) -> None:
        """Nothing: homes are verified when they are read, where checksums were asked for."""

    def read(self, run: Run, out: Tensor) -> None:
        """See StateReader."""
        row = self._parts[run.item, run.state_tensor]
        at = bisect_right([part.run.start for part in row], run.start) - 1
        start = run.start
        while start < run.stop:
            held = row[at].run
            stop = min(run.stop, held.stop)
            values = self._chunk.values(row[at])
            out[start - run.start : stop - run.start].copy_(values[start - held.start : stop - held.start])
            start, at = stop, at + 1

    def close(self) -> None:
        """Let go of the staging buffer. Idempotent."""
        self._chunk.close()


class SessionSink:
    """See StateSink. Close it, also after a load that failed: it may hold a staging buffer."""

    def __init__(self, values: SessionValues, filler: Filler, storage: Storage, *, num_steps: dict[int, int]) -> None:
        self._values = values
        self._items = values.items()
        self._parts = {part.run: part for part in values.parts()}
        self._chunk = _OpenChunk(filler, storage, write=True)
        self._num_steps = num_steps
        self.has_begun = False
        """Something of the session was overwritten."""

    def items(self) -> Sequence[Item]:
        """See StateSink."""
        return self._items

    def runs(self) -> Sequence[Run]:
        """See StateSink."""
        return list(self._parts)

    def write(self, run: Run, values: Tensor) -> None:
        """See StateSink."""
        self.has_begun = True
        self._chunk.write(self._parts[run], values)

    def finish(self, steps: Mapping[str, int]) -> None:
        """See StateSink."""
        self.close()
        for name, entry in self._values.trainable():
            # Optimizers that make their state before the first step are listed with 0, the others not at all.
            if steps[name] or entry.index in self._num_steps:
                self._num_steps[entry.index] = steps[name]

    def close(self) -> None:
        """Write back and let go of the staging buffer. Idempotent."""
        self._chunk.close()


def names_by_tensor(model: nn.Module) -> dict[Tensor, list[str]]:
    """Parameters and persistent buffers with all their names, in the order of `model.state_dict()`.

    Not by calling that, which would copy everything that is offloaded.
    """
    names: dict[Tensor, list[str]] = {}

    def walk(module: nn.Module, prefix: str) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(parameter, []).append(prefix + name)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                names.setdefault(buffer, []).append(prefix + name)
        for name, child in module._modules.items():
            if child is not None:
                walk(child, f"{prefix}{name}.")

    walk(model, "")
    return names
