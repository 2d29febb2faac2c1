"""A session's values as checkpoints know them: items, state tensors and runs over the homes.

Owns: which items a session has, which part of which chunk each run is, and the order: chunk by chunk, so that none is
read or written twice.
Does not: open homes (storage/walk.py), write files (format/) or know anything that is no tensor (run_state.py).
Threads: the training thread, with idle lanes.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from offload.checkpoint.format.state import WEIGHTS, Item, Kind, Run
from offload.model.partitions import Entry, Partition
from offload.storage.homes import Chunk
from offload.storage.state_tensors import StateTensors, weights_tensor
from offload.storage.walk import Access, OpenChunk, Walk

RESIDENT_NUMEL: Final = 1024 * 1024
"""Elements of a run of what no plan moves, as buffers."""


@dataclass(frozen=True, slots=True, eq=False)
class PlacedRun:
    """One run and where it is: elements [start, stop) of a chunk, or of a tensor that stays where it is."""

    run: Run
    place: Chunk | Tensor
    start: int
    stop: int

    def entries(self, opened: OpenChunk) -> Tensor:
        """As they are stored, on the host: valid until another chunk is asked for."""
        if isinstance(self.place, Tensor):
            return self.place.detach().reshape(-1)[self.start : self.stop].to("cpu").contiguous()
        return opened.at(self.place).entries(self.run.state_tensor, self.start, self.stop)

    def store(self, opened: OpenChunk, entries: Tensor) -> None:
        """New entries; with a plain master, the weights that follow from it."""
        if isinstance(self.place, Tensor):
            target = self.place.detach()
            target = target.view(-1)[self.start : self.stop] if target.is_contiguous() else target
            target.copy_(entries.view(target.shape))
        else:
            opened.at(self.place).store(self.run.state_tensor, self.start, self.stop, entries)


class SessionValues:
    """Which items and runs a session has: buffers are looked up at each use, modules may replace them."""

    def __init__(
        self,
        model: nn.Module,
        partitions: Sequence[Partition],
        *,
        walk: Walk,
        num_steps: dict[int, int],
    ) -> None:
        self._model = model
        self._partitions = partitions
        self.walk = walk
        self.num_steps = num_steps
        self._entries: dict[Tensor, tuple[Partition, Entry]] = {
            entry.parameter: (partition, entry) for partition in partitions for entry in partition.entries()
        }

    def items(self) -> list[Item]:
        """All items, in the order of `model.state_dict()`."""
        return [self._item(tensor, names) for tensor, names in names_by_tensor(self._model).items()]

    def runs(self, *, resident: bool = True) -> list[PlacedRun]:
        """Where every run of this rank is: chunk by chunk, then, where `resident`, what stays where it is.

        Every rank has whole what stays where it is: all of them load it, one of them saves it.
        """
        runs: list[PlacedRun] = []
        names = {tensor: first for tensor, (first, *_) in names_by_tensor(self._model).items()}
        for partition in self._partitions:
            for part in self.walk.parts(partition):
                for state_tensor in self.walk.state_tensors(partition, part.entry):
                    start = part.in_entry.start // state_tensor.block_numel
                    stop = state_tensor.num_entries(part.in_entry.stop)
                    run = Run(names[part.entry.parameter], state_tensor.name, start, stop)
                    runs.append(PlacedRun(run, part.chunk, part.in_chunk.start, part.in_chunk.stop))
        for tensor, name in names.items() if resident else ():
            if tensor not in self._entries:
                step = RESIDENT_NUMEL if tensor.is_contiguous() else max(1, tensor.numel())
                for start in range(0, tensor.numel(), step):
                    stop = min(start + step, tensor.numel())
                    runs.append(PlacedRun(Run(name, WEIGHTS, start, stop), tensor, start, stop))
        return runs

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
            state_tensors: StateTensors = (weights_tensor(tensor.dtype),)
            shape, dtype, step = tensor.shape, tensor.dtype, 0
        else:
            partition, entry = self._entries[tensor]
            kind = Kind.TRAINABLE if entry.index >= 0 else Kind.FROZEN
            state_tensors = self.walk.state_tensors(partition, entry)
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


class SessionSource:
    """See StateSource. Close it after a save, also after one that failed: it may hold staging buffers."""

    def __init__(self, values: SessionValues, *, resident: bool = True) -> None:
        self._items = values.items()
        self._runs = values.runs(resident=resident)
        self._chunk = values.walk.open(Access.READ)

    def items(self) -> Sequence[Item]:
        """See StateSource."""
        return self._items

    def runs(self) -> Sequence[Run]:
        """See StateSource."""
        return [placed.run for placed in self._runs]

    def values(self) -> Iterator[Tensor]:
        """See StateSource."""
        for placed in self._runs:
            yield placed.entries(self._chunk)
        self.close()

    def close(self) -> None:
        """Release the staging buffers. Idempotent."""
        self._chunk.close()


class SessionReader:
    """See StateReader: a session of one rank as if it were a checkpoint, for exports.

    Close it: it may hold staging buffers.
    """

    where = "the session"

    def __init__(self, values: SessionValues) -> None:
        self.items: Mapping[str, Item] = {item.name: item for item in values.items()}
        self._chunk = values.walk.open(Access.READ)
        self._runs: dict[tuple[str, str], list[PlacedRun]] = {}
        for placed in values.runs():
            self._runs.setdefault((placed.run.item, placed.run.state_tensor), []).append(placed)

    def verify(self, runs: Iterable[Run]) -> None:
        """Nothing: homes are verified when they are read, where checksums were asked for."""

    def read(self, run: Run, out: Tensor) -> None:
        """See StateReader."""
        row = self._runs[run.item, run.state_tensor]
        at = bisect_right([placed.run.start for placed in row], run.start) - 1
        start = run.start
        while start < run.stop:
            held = row[at].run
            stop = min(run.stop, held.stop)
            values = row[at].entries(self._chunk)
            out[start - run.start : stop - run.start].copy_(values[start - held.start : stop - held.start])
            start, at = stop, at + 1

    def close(self) -> None:
        """Release the staging buffers. Idempotent."""
        self._chunk.close()


class SessionSink:
    """See StateSink. Close it, also after a load that failed: it may hold staging buffers."""

    def __init__(self, values: SessionValues) -> None:
        self._values = values
        self._items = values.items()
        self._runs = {placed.run: placed for placed in values.runs()}
        self._chunk = values.walk.open(Access.OVERWRITE)
        self.has_begun = False
        """Something of the session was overwritten."""

    def items(self) -> Sequence[Item]:
        """See StateSink."""
        return self._items

    def runs(self) -> Sequence[Run]:
        """See StateSink."""
        return list(self._runs)

    def write(self, run: Run, values: Tensor) -> None:
        """See StateSink."""
        self.has_begun = True
        self._runs[run].store(self._chunk, values)

    def finish(self, steps: Mapping[str, int]) -> None:
        """See StateSink."""
        self.close()
        for name, entry in self._values.trainable():
            # Optimizers that make their state before the first step are listed with 0, the others not at all.
            if steps[name] or entry.index in self._values.num_steps:
                self._values.num_steps[entry.index] = steps[name]

    def close(self) -> None:
        """Write back, and release the staging buffers. Idempotent."""
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
