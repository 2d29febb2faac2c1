"""Loading: what a session wants, out of what is stored, or a clear error before anything is changed.

Owns: the comparison of both sides, the order verify - write - finish, the report of what was not exact.
Does not: read (reader.py) or convert (convert.py).
Threads: one, which also drives the sink.

Resharding needs no step of its own: every rank asks for the runs that it holds now.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from offload.checkpoint.format.convert import Converter, sources_of
from offload.checkpoint.format.errors import CheckpointError
from offload.checkpoint.format.state import MASTER, Item, Kind, Run, StateReader, StateSink, StateTensor

NAMES_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load did."""

    exact: bool
    """Whether training goes on with the bits it was saved with."""
    notes: tuple[str, ...]
    """What was not taken over as it was: one line for each kind of change, naming a few items."""


class Loading:
    """A load of one rank: whatever does not fit raises when this is made, and every byte to be used is
    verified then. `run` changes the sink; an error in it (a disk that fails, a file replaced meanwhile) leaves the sink
    half written: its session has failed."""

    def __init__(self, reader: StateReader, sink: StateSink) -> None:
        self._reader = reader
        self._sink = sink
        self._wanted = {item.name: item for item in sink.items()}
        self._runs = list(sink.runs())
        self._notes = _compare(reader, self._wanted)
        reader.verify(_needed(reader.items, self._wanted, self._runs))

    def run(self) -> Loaded:
        """Write everything that the sink wants."""
        converter = Converter(self._reader, self._wanted)
        scratch: dict[torch.dtype, torch.Tensor] = {}
        for run in self._runs:
            state_tensor = _state_tensor(self._wanted, run)
            held = scratch.get(state_tensor.dtype)
            if held is None or held.numel() < run.numel:
                held = scratch[state_tensor.dtype] = torch.empty(run.numel, dtype=state_tensor.dtype)
            values = held[: run.numel]
            converter.read(run, values)
            self._sink.write(run, values)
        trainable = (name for name, item in self._wanted.items() if item.kind is Kind.TRAINABLE)
        self._sink.finish({name: self._reader.items[name].step for name in trainable})
        return Loaded(exact=not self._notes, notes=tuple(self._notes))


def load(reader: StateReader, sink: StateSink) -> Loaded:
    """Everything a sink wants, from whatever holds it: see Loading."""
    return Loading(reader, sink).run()


def _state_tensor(wanted: Mapping[str, Item], run: Run) -> StateTensor:
    state_tensor = wanted[run.item].state_tensor(run.state_tensor)
    if state_tensor is None:
        raise CheckpointError(f"{run}: the session lists no such state tensor.")
    return state_tensor


def _needed(stored: Mapping[str, Item], wanted: Mapping[str, Item], runs: Sequence[Run]) -> Iterator[Run]:
    """Stored runs that the wanted ones are made of."""
    for run in runs:
        item, state_tensor = stored[run.item], _state_tensor(wanted, run)
        for name in sources_of(item, wanted[run.item], state_tensor)[0]:
            source = item.expect(name)
            start, stop = run.start * state_tensor.block_numel, min(run.stop * state_tensor.block_numel, item.numel)
            yield Run(run.item, name, start // source.block_numel, source.num_entries(stop))


def _compare(reader: StateReader, wanted: Mapping[str, Item]) -> list[str]:
    """Raise where the model is another one; else say what will not be as it was."""
    stored = reader.items
    missing, surplus = wanted.keys() - stored.keys(), stored.keys() - wanted.keys()
    if missing or surplus:
        raise CheckpointError(
            f"{reader.where} is of another model: it lacks {_some(missing)} and has {_some(surplus)} besides."
        )
    changes: dict[str, list[str]] = {}
    for name, item in wanted.items():
        held = stored[name]
        if held.shape != item.shape:
            raise CheckpointError(
                f"{name!r} has shape {list(item.shape)} in the model, {list(held.shape)} in {reader.where}."
            )
        try:
            found = list(_changes(held, item))
        except CheckpointError as error:
            raise CheckpointError(f"{reader.where}: {error}") from error
        for change in found:
            changes.setdefault(change, []).append(name)
    return [f"{change}: {_some(names)}" for change, names in changes.items()]


def _changes(stored: Item, wanted: Item) -> Iterable[str]:
    if stored.kind is not wanted.kind:
        yield f"{stored.kind} in the checkpoint, {wanted.kind} now" + (
            ", with moments of 0" if wanted.kind is Kind.TRAINABLE else ""
        )
    for state_tensor in wanted.state_tensors:
        names, exact = sources_of(stored, wanted, state_tensor)
        if not exact:
            held = stored.state_tensor(names[0])
            stored_as = held.dtype if held else None
            yield f"{state_tensor.name} stored as {stored_as}, kept as {state_tensor.dtype}, so rounded"
    if stored.kind is wanted.kind is Kind.TRAINABLE and (unused := _unused(stored, wanted)):
        yield f"not taken over, because this optimizer does not keep it, {', '.join(unused)}"


def _unused(stored: Item, wanted: Item) -> list[str]:
    used = {name for state_tensor in wanted.state_tensors for name in sources_of(stored, wanted, state_tensor)[0]}
    # working weights are always there, and a master of its own is used by whatever needs weights
    return [
        state_tensor.name
        for state_tensor in stored.state_tensors
        if state_tensor.name not in used and state_tensor.name != MASTER
    ]


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    shown = ", ".join(ordered[:NAMES_SHOWN]) or "nothing"
    return shown + (f" and {len(ordered) - NAMES_SHOWN} more" if len(ordered) > NAMES_SHOWN else "")
