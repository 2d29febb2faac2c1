"""An open checkpoint: checked against its manifest, read by range.

Owns: the check of headers and checksums, user data on the way back.
Does not: convert (convert.py), drive a load (load.py) or keep files open (open_files.py).
Threads: one.

Note [Verified first]: `verify` reads every byte that a load will use and compares checksums; only then values are
given, so that a damaged file is found while the session still has its own values. The price is that everything
is read twice, the second time from the page cache where it fits; and a file that was replaced or rewritten in between
is refused.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor

from offload.checkpoint.format import folder as folders
from offload.checkpoint.format.dtypes import bytes_of
from offload.checkpoint.format.errors import CheckpointError, CorruptCheckpointError
from offload.checkpoint.format.intervals import Overlap, overlaps
from offload.checkpoint.format.manifest import StoredFile, StoredRange, read_manifest
from offload.checkpoint.format.open_files import OpenFiles
from offload.checkpoint.format.save import EXTRA_PREFIX
from offload.checkpoint.format.state import WEIGHTS, Item, Kind, Run
from offload.checkpoint.format.tensor_file import TensorPlace, parse_header
from offload.checkpoint.format.user_data import decode
from offload.errors import InternalError
from offload.units import MIB

BUFFER_BYTES: Final = 4 * MIB


class Checkpoint:
    """One complete checkpoint, open for reading. A context manager.

    `path`: the checkpoint's folder, or the folder of a run, whose latest one is taken.
    """

    def __init__(self, path: str | Path) -> None:
        with folders.with_remedy(Path(path)):
            self.folder = folders.find(Path(path))
            self._manifest = read_manifest(self.folder / folders.MANIFEST)
        self._files = OpenFiles(self.folder)
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._verified: set[Run] = set()
        self._ranges: dict[tuple[str, str], list[StoredRange]] = {}
        for stored in sorted(self._manifest.ranges, key=lambda stored: stored.run.start):
            self._ranges.setdefault((stored.run.item, stored.run.state_tensor), []).append(stored)
        self._starts = {key: [stored.run.start for stored in row] for key, row in self._ranges.items()}
        self._stops = {key: [stored.run.stop for stored in row] for key, row in self._ranges.items()}
        self._places: dict[Run, TensorPlace] = {}
        of_file: dict[str, list[StoredRange]] = {file.name: [] for file in self._manifest.files}
        for stored in self._manifest.ranges:
            of_file[stored.file].append(stored)
        try:
            with folders.with_remedy(self.folder):
                for file in self._manifest.files:
                    self._check_header(file, of_file[file.name])
        except BaseException:
            self.close()
            raise

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was saved."""
        return self._manifest.step

    @property
    def world_size(self) -> int:
        """Ranks that saved it."""
        return self._manifest.world_size

    @property
    def where(self) -> str:
        """The folder, for errors."""
        return str(self.folder)

    @property
    def items(self) -> Mapping[str, Item]:
        """What is stored, without user data, by name, in the order of `model.state_dict()`."""
        return {name: item for name, item in self._manifest.items.items() if item.kind is not Kind.EXTRA}

    def extra(self) -> dict[str, Any]:
        """The user's dictionary."""
        with folders.with_remedy(self.folder):
            return self._user_data(self._manifest.extra, "user")

    def rank_extra(self, rank: int) -> dict[str, Any]:
        """What rank `rank` of `world_size` had of its own."""
        if not 0 <= rank < self.world_size:
            raise CheckpointError(f"{self.folder} was saved by ranks 0 to {self.world_size - 1}; rank {rank} is none.")
        with folders.with_remedy(self.folder):
            return self._user_data(self._manifest.rank_extra[rank], str(rank))

    def verify(self, runs: Iterable[Run] | None = None) -> None:
        """Compare the checksums of all that these runs are made of (None: of everything). Each only once."""
        with folders.with_remedy(self.folder):
            self._verify(runs)

    def _verify(self, runs: Iterable[Run] | None) -> None:
        chosen = self._manifest.ranges if runs is None else [stored for run in runs for stored, _ in self._parts(run)]
        for stored in dict.fromkeys(chosen):
            if stored.run in self._verified:
                continue
            place = self._places[stored.run]
            found = self._files.get(stored.file).checksum(place.offset, place.num_bytes, self._buffer)
            if found != stored.checksum:
                raise CorruptCheckpointError(
                    f"{self.folder / stored.file}: {stored.run} has checksum {found}, expected {stored.checksum}: the "
                    "file is damaged."
                )
            self._verified.add(stored.run)

    def read(self, run: Run, out: Tensor) -> None:
        """Entries of a stored state tensor, verified, into `out`: contiguous, on the host, of its dtype."""
        state_tensor = self._manifest.items[run.item].state_tensor(run.state_tensor)
        if state_tensor is None or out.dtype is not state_tensor.dtype or out.numel() != run.numel:
            raise InternalError(
                f"{run} was asked for as {out.numel()} entries of {out.dtype}; stored is {state_tensor}."
            )
        parts = list(self._parts(run))
        self._verify(stored.run for stored, _ in parts)
        target, size = bytes_of(out), out.dtype.itemsize
        for stored, part in parts:
            place = self._places[stored.run]
            into = target[part.start_in_wanted * size : (part.start_in_wanted + part.numel) * size]
            self._files.get(stored.file).read(into, place.offset + part.start_in_stored * size)

    def close(self) -> None:
        """Close the files. Idempotent."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --------------------------------------------------------------------------------------------------- files

    def _parts(self, run: Run) -> Iterator[tuple[StoredRange, Overlap]]:
        key = (run.item, run.state_tensor)
        row = self._ranges.get(key, [])
        for part in overlaps(self._starts.get(key, ()), self._stops.get(key, ()), run.start, run.stop):
            yield row[part.index], part

    def _check_header(self, file: StoredFile, ranges: Iterable[StoredRange]) -> None:
        opened = self._files.get(file.name)
        if opened.num_bytes != file.num_bytes:
            raise CorruptCheckpointError(f"{opened.path} has {opened.num_bytes} bytes, expected {file.num_bytes}.")
        header = opened.header()
        found = zlib.crc32(header)
        if found != file.header_checksum:
            raise CorruptCheckpointError(
                f"{opened.path}: its header has checksum {found}, expected {file.header_checksum}: it is damaged."
            )
        places = parse_header(header, opened.path, opened.num_bytes)
        for stored in ranges:
            place = places.pop(str(stored.run), None)
            if place is None or (place.dtype, place.shape) != (stored.dtype, (stored.run.numel,)):
                raise CorruptCheckpointError(f"{opened.path}: expected {stored.run} of {stored.dtype}, found {place}.")
            self._places[stored.run] = place
        if places:
            raise CorruptCheckpointError(f"{opened.path}: it holds {min(places)!r}, which the manifest does not list.")

    # ----------------------------------------------------------------------------------------------- user data

    def _user_data(self, coded: Any, prefix: str) -> dict[str, Any]:
        def tensor(number: int) -> Tensor:
            item = self._manifest.items[f"{EXTRA_PREFIX}{prefix}.{number}"]
            values = torch.empty(item.shape, dtype=item.dtype)
            if item.numel:
                self.read(Run(item.name, WEIGHTS, 0, item.numel), values.view(-1))
            return values

        try:
            value = decode(coded, tensor)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{self.folder / folders.MANIFEST}: {error}") from error
        if not isinstance(value, dict):
            raise CorruptCheckpointError(f"{self.folder / folders.MANIFEST}: the user data is no dictionary.")
        return value
