"""An open checkpoint: checked against its manifest, read by range.

Owns: the check of headers and checksums, user data on the way back.
Does not: convert (convert.py), drive a load (load.py) or keep files open (open_files.py).
Threads: one.

Note [Verified first]: `verify` reads every byte that a load will use and compares checksums; only then values are
handed out, so that a damaged file is found while the session still has its own values. The price is that everything
is read twice, the second time from the page cache where it fits; and a file that was replaced or rewritten in between
is refused.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor

from offload.checkpoint import folder as folders
from offload.checkpoint.dtypes import bytes_of
from offload.checkpoint.errors import CheckpointError, CorruptCheckpointError
from offload.checkpoint.intervals import Overlap, overlaps
from offload.checkpoint.manifest import StoredFile, StoredPiece, read_manifest
from offload.checkpoint.open_files import OpenFiles
from offload.checkpoint.save import EXTRA_PREFIX
from offload.checkpoint.state import WEIGHTS, Item, Kind, Run
from offload.checkpoint.tensor_file import TensorPlace, parse_header
from offload.checkpoint.user_data import decode
from offload.errors import InternalError
from offload.units import MIB

BUFFER_BYTES: Final = 4 * MIB


class Checkpoint:
    """One complete checkpoint, open for reading. A context manager.

    `path`: the checkpoint's folder, or the folder of a run, whose latest one is taken.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = folders.find(Path(path))
        self._manifest = read_manifest(self.folder / folders.MANIFEST)
        self._files = OpenFiles(self.folder)
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._verified: set[Run] = set()
        self._pieces: dict[tuple[str, str], list[StoredPiece]] = {}
        for piece in sorted(self._manifest.pieces, key=lambda piece: piece.run.start):
            self._pieces.setdefault((piece.run.item, piece.run.plane), []).append(piece)
        self._starts = {key: [piece.run.start for piece in row] for key, row in self._pieces.items()}
        self._stops = {key: [piece.run.stop for piece in row] for key, row in self._pieces.items()}
        self._places: dict[Run, TensorPlace] = {}
        of_file: dict[str, list[StoredPiece]] = {file.name: [] for file in self._manifest.files}
        for piece in self._manifest.pieces:
            of_file[piece.file].append(piece)
        try:
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
        return self._user_data(self._manifest.extra, "user")

    def rank_extra(self, rank: int) -> dict[str, Any]:
        """What rank `rank` of `world_size` had of its own."""
        if not 0 <= rank < self.world_size:
            raise CheckpointError(f"{self.folder} was saved by ranks 0 to {self.world_size - 1}; rank {rank} is none.")
        return self._user_data(self._manifest.rank_extra[rank], str(rank))

    def verify(self, runs: Iterable[Run] | None = None) -> None:
        """Compare the checksums of all that these runs are made of (None: of everything). Each only once."""
        chosen = self._manifest.pieces if runs is None else [piece for run in runs for piece, _ in self._parts(run)]
        for piece in dict.fromkeys(chosen):
            if piece.run in self._verified:
                continue
            place = self._places[piece.run]
            found = self._files.get(piece.file).checksum(place.offset, place.num_bytes, self._buffer)
            if found != piece.checksum:
                raise CorruptCheckpointError(
                    f"{self.folder / piece.file}: {piece.run} has checksum {found}, expected {piece.checksum}: the "
                    "file is damaged. Load another checkpoint."
                )
            self._verified.add(piece.run)

    def read(self, run: Run, out: Tensor) -> None:
        """Entries of a stored plane, verified, into `out`: contiguous, on the host, of the plane's dtype."""
        plane = self._manifest.items[run.item].plane(run.plane)
        if plane is None or out.dtype is not plane.dtype or out.numel() != run.numel:
            raise InternalError(f"{run} was asked for as {out.numel()} entries of {out.dtype}; stored is {plane}.")
        parts = list(self._parts(run))
        self.verify(piece.run for piece, _ in parts)
        target, size = bytes_of(out), out.dtype.itemsize
        for piece, part in parts:
            place = self._places[piece.run]
            into = target[part.start_in_wanted * size : (part.start_in_wanted + part.numel) * size]
            self._files.get(piece.file).read(into, place.offset + part.start_in_stored * size)

    def close(self) -> None:
        """Close the files. Idempotent."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --------------------------------------------------------------------------------------------------- files

    def _parts(self, run: Run) -> Iterator[tuple[StoredPiece, Overlap]]:
        key = (run.item, run.plane)
        row = self._pieces.get(key, [])
        for part in overlaps(self._starts.get(key, ()), self._stops.get(key, ()), run.start, run.stop):
            yield row[part.index], part

    def _check_header(self, file: StoredFile, pieces: Iterable[StoredPiece]) -> None:
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
        for piece in pieces:
            place = places.pop(str(piece.run), None)
            if place is None or (place.dtype, place.shape) != (piece.dtype, (piece.run.numel,)):
                raise CorruptCheckpointError(f"{opened.path}: expected {piece.run} of {piece.dtype}, found {place}.")
            self._places[piece.run] = place
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
