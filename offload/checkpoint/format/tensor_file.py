"""Files in the safetensors format: 8 bytes of header length, a JSON header, the tensors back to back.

Owns: laying out a header whose sizes are known ahead, so that the tensors can be written in any order; writing and
reading at offsets; the checksum.
Does not: know what the tensors are (writer.py, reader.py), or names of folders (folder.py).
Threads: a file is used by one thread at a time.
"""

import contextlib
import errno
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch

from offload.checkpoint.format.dtypes import DTYPE_OF, NAME_OF
from offload.checkpoint.format.errors import CorruptCheckpointError
from offload.errors import DiskFullError, TransferError
from offload.units import MIB, format_bytes

FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")
"""What a file may be called: no separators, nothing hidden, so that no name leads out of its folder."""

LENGTH_BYTES: Final = 8
MAX_HEADER_BYTES: Final = 100_000_000
"""The bound of the format's own library."""

FLUSH_BYTES: Final = 32 * MIB
"""Written data goes to the disk this often, so that dirty pages do not take the memory that training needs."""

TRANSFER_BYTES: Final = 8 * MIB

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor in a file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A header and where the tensors go."""

    header: bytes
    """With its length in front and padding behind."""
    places: tuple[TensorPlace, ...]
    num_bytes: int
    """Of the whole file."""

    @property
    def header_checksum(self) -> int:
        """Of everything before the first tensor."""
        return zlib.crc32(self.header)


def lay_out(
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> FileLayout:
    """The layout of a file of (key, dtype, shape). Wide dtypes come first, so that every tensor is aligned."""
    ordered = sorted(tensors, key=lambda tensor: -tensor[1].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at, relative = 0, []
    for key, dtype, shape in ordered:
        num_bytes = math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": NAME_OF[dtype], "shape": list(shape), "data_offsets": [at, at + num_bytes]}
        relative.append(TensorPlace(key, dtype, shape, at, num_bytes))
        at += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    packed = len(text).to_bytes(LENGTH_BYTES, "little") + text
    places = tuple(TensorPlace(p.key, p.dtype, p.shape, p.offset + len(packed), p.num_bytes) for p in relative)
    return FileLayout(packed, places, len(packed) + at)


# ---------------------------------------------------------------------------------------------------------- out


class FileOut:
    """A file being written: allocated whole at once, then filled in any order, then on the disk.

    It is open from the first write of a tensor to `finish` only: a large checkpoint has more files than a process may
    have open.
    """

    def __init__(self, path: Path, layout: FileLayout) -> None:
        self.path = path
        self._left_bytes = layout.num_bytes
        self._unflushed_bytes = 0
        self._descriptor = -1
        try:
            self._open(os.O_CREAT | os.O_EXCL)
            with failing(path, f"allocate {format_bytes(layout.num_bytes)} for it"):
                os.posix_fallocate(self._descriptor, 0, layout.num_bytes)
            self.write(memoryview(layout.header), 0)
        finally:
            self.close()

    @property
    def is_complete(self) -> bool:
        """Whether as many bytes were written as it holds."""
        return self._left_bytes == 0

    def write(self, data: memoryview, offset: int) -> None:
        """All of `data` at `offset`."""
        if self._descriptor < 0:
            self._open(0)
        with failing(self.path, f"write {data.nbytes} bytes at {offset}"):
            done = 0
            while done < data.nbytes:
                done += os.pwrite(self._descriptor, data[done : done + TRANSFER_BYTES], offset + done)
            self._left_bytes -= done
            self._unflushed_bytes += done
            if self._unflushed_bytes >= FLUSH_BYTES:
                self._flush()

    def finish(self) -> None:
        """Onto the disk, and closed."""
        if self._descriptor < 0:
            self._open(0)  # of tensors without elements nothing was written
        with failing(self.path, "sync it"):
            self._flush()
            os.fsync(self._descriptor)
        self.close()

    def close(self) -> None:
        """Closed as it is. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self, flags: int) -> None:
        with failing(self.path, "open it for writing"):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o666)

    def _flush(self) -> None:
        os.fdatasync(self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._unflushed_bytes = 0


@contextlib.contextmanager
def failing(path: Path, what: str) -> Iterator[None]:
    """Failures of the system as errors of ours that name the file."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise DiskFullError(
                f"{path}: no room to {what} ({error.strerror}). What was saved before is untouched; free space or save "
                "elsewhere."
            ) from error
        raise TransferError(f"{path}: could not {what}: {error.strerror or error}.") from error


# ----------------------------------------------------------------------------------------------------------- in


class FileIn:
    """An open file: regular and, but where `follow_links`, not a link."""

    def __init__(self, path: Path, *, follow_links: bool = False) -> None:
        self.path = path
        # O_NONBLOCK: opening a pipe would otherwise wait for its writer.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
        try:
            self._descriptor = os.open(path, flags)
        except OSError as error:
            reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
            raise CorruptCheckpointError(f"{path} cannot be opened: {reason}.") from error
        self.identity = self.identity_now()
        """Of the file as it was opened."""
        self.num_bytes = self.identity[2]
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            self.close()
            raise CorruptCheckpointError(f"{path} is not a regular file.")

    def identity_now(self) -> tuple[int, ...]:
        """Changes when somebody rewrites the file; another file has another one."""
        status = os.fstat(self._descriptor)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def content(self, limit_bytes: int) -> bytes:
        """All of a file that is not meant to be long."""
        if self.num_bytes > limit_bytes:
            raise CorruptCheckpointError(
                f"{self.path} has {self.num_bytes} bytes; at most {limit_bytes} were expected."
            )
        content = bytearray(self.num_bytes)
        self.read(memoryview(content), 0)
        return bytes(content)

    def read(self, into: memoryview, offset: int) -> None:
        """Fill `into` from `offset`."""
        done = 0
        while done < into.nbytes:
            try:
                num_read = os.preadv(self._descriptor, [into[done : done + TRANSFER_BYTES]], offset + done)
            except OSError as error:
                raise TransferError(f"{self.path}: reading at {offset + done} failed: {error.strerror}.") from error
            if num_read == 0:
                raise CorruptCheckpointError(
                    f"{self.path} ends at byte {offset + done}, {into.nbytes - done} bytes too early."
                )
            done += num_read

    def checksum(self, offset: int, num_bytes: int, buffer: memoryview) -> int:
        """Of a range, read through `buffer`."""
        value = 0
        for at in range(0, num_bytes, buffer.nbytes):
            part = buffer[: min(buffer.nbytes, num_bytes - at)]
            self.read(part, offset + at)
            value = zlib.crc32(part, value)
        return value

    def header(self) -> bytes:
        """Length, JSON and padding."""
        if self.num_bytes < LENGTH_BYTES:
            raise CorruptCheckpointError(f"{self.path} has {self.num_bytes} bytes: no header of a safetensors file.")
        length = bytearray(LENGTH_BYTES)
        self.read(memoryview(length), 0)
        header_bytes = LENGTH_BYTES + int.from_bytes(length, "little")
        if header_bytes > min(self.num_bytes, MAX_HEADER_BYTES):
            raise CorruptCheckpointError(
                f"{self.path}: its header claims {header_bytes} bytes of a file of {self.num_bytes}."
            )
        header = bytearray(header_bytes)
        self.read(memoryview(header), 0)
        return bytes(header)

    def close(self) -> None:
        """Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def parse_header(header: bytes, path: Path, num_bytes: int) -> dict[str, TensorPlace]:
    """The tensors of a header by key; raises where they do not fill the file exactly, as the format demands."""
    try:
        fields = unique_json(header[LENGTH_BYTES:])
        places = {key: _place(key, at, len(header)) for key, at in fields.items() if key != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path}: its header is not that of a safetensors file: {error}.") from error
    at = len(header)
    for place in sorted(places.values(), key=lambda place: (place.offset, place.num_bytes)):
        if place.offset != at:
            raise CorruptCheckpointError(f"{path}: tensor {place.key!r} starts at {place.offset}, expected {at}.")
        at += place.num_bytes
    if at != num_bytes:
        raise CorruptCheckpointError(f"{path}: its header describes {at} bytes, the file has {num_bytes}.")
    return places


def _place(key: str, fields: Any, header_bytes: int) -> TensorPlace:
    dtype = DTYPE_OF[fields["dtype"]]
    shape, (start, stop) = tuple(fields["shape"]), fields["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"tensor {key!r} has sizes that are no counts")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {key!r} of shape {list(shape)} has {stop - start} bytes")
    return TensorPlace(key, dtype, shape, header_bytes + start, stop - start)


def unique_json(text: bytes) -> dict[str, Any]:
    """A JSON object in which no key comes twice, and no NaN or Infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ValueError("a key comes twice")
        return fields

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    if not isinstance(value, dict):
        raise ValueError("it is not an object")  # noqa: TRY004 - of JSON, not of Python
    return value


def is_file_name(name: object) -> bool:
    """Whether it is a plain file name that a checkpoint may use."""
    return isinstance(name, str) and FILE_NAME.fullmatch(name) is not None
