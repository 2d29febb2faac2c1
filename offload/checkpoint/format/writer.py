"""One rank's part of a checkpoint: its runs into files of tensors, with a checksum for each tensor.

Owns: how runs become tensors and tensors become files; streaming them.
Does not: make or publish the folder (folder.py), agree with other ranks or write the manifest (save.py).
Threads: one, which also drives the source.

Memory: what the source lends, and nothing else: tensors have their place in a file before the first value is read.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from offload.checkpoint.format.dtypes import bytes_of, name_of
from offload.checkpoint.format.errors import CheckpointError
from offload.checkpoint.format.manifest import StoredFile, StoredRange, state_tensor_flaw
from offload.checkpoint.format.state import Item, Run, StateSource, StateTensor
from offload.checkpoint.format.tensor_file import FileLayout, FileOut, lay_out
from offload.errors import InternalError
from offload.units import GIB

CUT_NUMEL: Final = 16 * 1024 * 1024
"""A tensor in a file ends at multiples of this many entries: what one checksum covers stays small."""

FILE_BYTES: Final = GIB
"""A file is full when it has this many bytes of tensors."""

METADATA: Final = {"format": "offload-checkpoint"}


@dataclass(slots=True, eq=False)
class _Target:
    """One tensor of a file, being filled from its start to its end."""

    run: Run
    state_tensor: StateTensor
    file: int
    offset: int = -1
    """In its file; set when all tensors have their places."""
    filled: int = 0
    checksum: int = 0


class PartWriter:
    """Writes one rank's runs into `folder`."""

    def __init__(self, folder: Path, source: StateSource, *, rank: int, file_bytes: int = FILE_BYTES) -> None:
        self._folder = folder
        self._source = source
        self._rank = rank
        self._items = {item.name: item for item in source.items()}
        self._runs = source.runs()
        self._targets = self._cut()
        self._layouts = self._pack(file_bytes)
        self._unfinished: dict[int, FileOut] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of the files."""
        return sum(layout.num_bytes for layout in self._layouts)

    def write(self) -> tuple[list[StoredFile], list[StoredRange]]:
        """Make, fill and sync the files. All space is allocated before the first value is asked for."""
        try:
            for index, layout in enumerate(self._layouts):
                self._unfinished[index] = FileOut(self._folder / self._file_name(index), layout)
            for run, values in zip(self._runs, self._source.values(), strict=True):
                self._put(run, values)
            if self._unfinished:
                raise InternalError(f"{len(self._unfinished)} files of a checkpoint were not filled: runs are missing.")
        finally:
            for file in self._unfinished.values():
                file.close()
        files = [
            StoredFile(self._file_name(index), layout.num_bytes, layout.header_checksum)
            for index, layout in enumerate(self._layouts)
        ]
        ranges = [
            StoredRange(target.run, target.state_tensor.dtype, self._file_name(target.file), target.checksum)
            for targets in self._targets.values()
            for target in targets
        ]
        return files, ranges

    # ------------------------------------------------------------------------------------------------- layout

    def _cut(self) -> dict[tuple[str, str], list[_Target]]:
        """Join runs that follow each other and cut at multiples of CUT_NUMEL."""
        targets: dict[tuple[str, str], list[_Target]] = {}
        for run in self._runs:
            state_tensor = self._state_tensor(run)
            row = targets.setdefault((run.item, run.state_tensor), [])
            if row and run.start < row[-1].run.stop:
                raise InternalError(f"run {run} comes after {row[-1].run}: runs of a state tensor must rise.")
            for start, stop in cuts(run.start, run.stop):
                if row and row[-1].run.stop == start and start % CUT_NUMEL:
                    row[-1].run = Run(run.item, run.state_tensor, row[-1].run.start, stop)
                else:
                    row.append(_Target(Run(run.item, run.state_tensor, start, stop), state_tensor, file=-1))
        return targets

    def _state_tensor(self, run: Run) -> StateTensor:
        item = self._items[run.item]
        state_tensor = item.state_tensor(run.state_tensor)
        if state_tensor is None or not 0 <= run.start <= run.stop <= state_tensor.num_entries(item.numel):
            raise InternalError(f"run {run} is not in item {item.name!r} of shape {item.shape}, {item.state_tensors}.")
        return state_tensor

    def _pack(self, file_bytes: int) -> list[FileLayout]:
        """Give every tensor a file and a place in it, in the order in which the runs reach them."""
        by_file: list[list[_Target]] = []
        room_bytes = 0
        for targets in self._targets.values():
            for target in targets:
                num_bytes = target.run.numel * target.state_tensor.dtype.itemsize
                if not by_file or num_bytes > room_bytes:
                    by_file.append([])
                    room_bytes = file_bytes
                room_bytes -= num_bytes
                target.file = len(by_file) - 1
                by_file[-1].append(target)
        layouts = []
        for targets in by_file:
            tensors = [(str(target.run), target.state_tensor.dtype, (target.run.numel,)) for target in targets]
            layout = lay_out(tensors, METADATA)
            places = {place.key: place.offset for place in layout.places}
            for target in targets:
                target.offset = places[str(target.run)]
            layouts.append(layout)
        return layouts

    def _file_name(self, index: int) -> str:
        return f"rank-{self._rank:05d}-{index + 1:05d}.safetensors"

    # -------------------------------------------------------------------------------------------------- values

    def _put(self, run: Run, values: Tensor) -> None:
        state_tensor = self._state_tensor(run)
        if values.dtype is not state_tensor.dtype or values.numel() != run.numel:
            raise InternalError(
                f"run {run} of {state_tensor.dtype} was given {values.numel()} entries of {values.dtype}."
            )
        raw, size = bytes_of(values), state_tensor.dtype.itemsize
        row = self._targets[run.item, run.state_tensor]
        for start, stop in cuts(run.start, run.stop):
            target = next(t for t in reversed(row) if t.run.start <= start)
            part = raw[(start - run.start) * size : (stop - run.start) * size]
            if target.run.start + target.filled != start:
                raise InternalError(f"run {run} was given before what precedes it.")
            file = self._unfinished[target.file]
            file.write(part, target.offset + target.filled * size)
            target.checksum = zlib.crc32(part, target.checksum)
            target.filled += stop - start
            if file.is_complete:
                del self._unfinished[target.file]
                self._finish(file)

    def _finish(self, file: FileOut) -> None:
        try:
            file.finish()
        finally:
            file.close()


def cuts(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """[start, stop) cut at multiples of CUT_NUMEL."""
    while start < stop:
        border = min(stop, (start // CUT_NUMEL + 1) * CUT_NUMEL)
        yield start, border
        start = border


def check_items(items: Sequence[Item]) -> None:
    """Raise where items cannot be stored."""
    for item in items:
        for state_tensor in item.state_tensors:
            name_of(state_tensor.dtype, of=f"state tensor {state_tensor.name!r} of {item.name!r}")
        name_of(item.dtype, of=f"{item.name!r}")
        flaw = state_tensor_flaw(item)
        if flaw is not None:
            raise CheckpointError(f"item {item.name!r} cannot be stored: {flaw}.")
