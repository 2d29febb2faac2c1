"""One transfer between a swap file and a tensor, cut into requests.

Owns: what a transfer must satisfy, how far each request has come, and what its errors say.
Does not: decide when a request runs (disk/io_queue.py).
Threads: a request is moved by one thread at a time.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch

from offload.concurrency.futures import Future
from offload.disk.layout import Extent
from offload.disk.swap_file import SwapFile
from offload.errors import InternalError, TransferError
from offload.units import DISK_ALIGN_BYTES, round_up

Direction = Literal["read", "write"]


@dataclass(frozen=True, slots=True)
class OsFunctions:
    """The system calls that move bytes: tests inject errors, short transfers and stalls here."""

    preadv: Callable[[int, Sequence[memoryview], int], int] = os.preadv
    pwritev: Callable[[int, Sequence[memoryview], int], int] = os.pwritev


REAL: Final = OsFunctions()


class Transfer:
    """One extent on its way. Keeps the tensor alive until `abandon`."""

    def __init__(
        self, direction: Direction, file: SwapFile, extent: Extent, tensor: torch.Tensor, future: Future[None]
    ) -> None:
        _check(direction, file, extent, tensor, future.name)
        self.direction: Final = direction
        self.file: Final = file
        self.extent: Final = extent
        self.future: Final = future
        self.tensor: torch.Tensor | None = tensor
        self.view = tensor.numpy().data
        self.error: BaseException | None = None
        self.num_requests_left = 0
        self.num_done_bytes = 0
        self.start_s = 0.0

    def split(self, request_bytes: int) -> list["Request"]:
        """Requests of at most `request_bytes` that cover the extent, as equal as pages allow.

        Equal, because a small rest would cost as much as a whole request and the transfer waits for its last one.
        """
        num_bytes = self.extent.num_bytes
        num_requests = -(-num_bytes // request_bytes)
        each_bytes = round_up(-(-num_bytes // max(num_requests, 1)), DISK_ALIGN_BYTES)
        starts = range(0, num_bytes, max(each_bytes, DISK_ALIGN_BYTES))
        requests = [Request(self, start, min(each_bytes, num_bytes - start)) for start in starts]
        self.num_requests_left = len(requests)
        return requests

    def begin(self) -> None:
        """Note the time of the first request."""
        self.start_s = self.start_s or time.perf_counter()

    def abandon(self) -> None:
        """Drop the memory: errors and futures may outlive the region that it belongs to."""
        self.view.release()
        self.tensor = None

    def key(self) -> tuple[str, int, int, int]:
        """The bytes on disk that this transfer touches, for `Lanes.declare`."""
        return ("disk", self.extent.file_index, self.extent.offset, self.extent.num_bytes)

    def describe(self) -> str:
        """For the message of a deadline."""
        return (
            f"{self.direction}: {self.future.name}, {self.file}, offset {self.extent.offset}, "
            f"{self.num_done_bytes} of {self.extent.num_bytes} bytes"
        )


class Request:
    """A part of a transfer that is moved by one system call, or by several where they are short."""

    __slots__ = ("_num_bytes", "_num_done", "_start", "transfer")

    def __init__(self, transfer: Transfer, start: int, num_bytes: int) -> None:
        self.transfer = transfer
        self._start = start
        self._num_bytes = num_bytes
        self._num_done = 0

    @property
    def finished(self) -> bool:
        """Whether all bytes were moved."""
        return self._num_done == self._num_bytes

    @property
    def file_offset(self) -> int:
        """Where the request begins in its file."""
        return self.transfer.extent.offset + self._start

    @property
    def num_bytes(self) -> int:
        """Length of the request."""
        return self._num_bytes

    def follows(self, other: "Request") -> bool:
        """Whether it begins on disk where `other` ends: one system call can move both."""
        return self.transfer.file is other.transfer.file and self.file_offset == other.file_offset + other.num_bytes

    def next_call(self) -> tuple[memoryview, int]:
        """Memory and file offset of the next system call."""
        begin = self._start + self._resume_at()
        return self.transfer.view[begin : self._start + self._num_bytes], self.transfer.extent.offset + begin

    def advance(self, num_moved: int) -> None:
        """Count what the system call of `next_call` moved. Raises TransferError where it did not get further."""
        num_done = self._resume_at() + num_moved
        if num_done <= self._num_done:
            raise self._stuck(num_moved)
        self.transfer.num_done_bytes += num_done - self._num_done
        self._num_done = num_done

    def failed(self, error: OSError) -> TransferError:
        """The error of a system call, with what it was about."""
        reason = f"{error.strerror or error} (errno {error.errno})"
        return self._error(reason, "Look at the disk (dmesg, smartctl)", error.errno)

    def _stuck(self, num_moved: int) -> TransferError:
        reason = f"the system call moved {num_moved} bytes"
        if self.transfer.direction == "read":
            reason += ": the file is shorter than it was made"
        return self._error(reason, "Nothing else may write, truncate or remove swap files during a run", None)

    def _error(self, reason: str, look: str, number: int | None) -> TransferError:
        transfer = self.transfer
        error = TransferError(
            f"{transfer.direction} of {transfer.future.name} ({transfer.file}): wanted {self._num_bytes} bytes "
            f"at offset {self.file_offset}, got {self._num_done}: {reason}. {look}; then resume from the last "
            "checkpoint."
        )
        error.errno = number
        return error

    def _resume_at(self) -> int:
        # After a short transfer a direct one may only go on from a border, so some bytes are moved twice.
        direct = self.transfer.file.mode == "direct"
        return self._num_done - self._num_done % DISK_ALIGN_BYTES if direct else self._num_done


def _check(direction: Direction, file: SwapFile, extent: Extent, tensor: torch.Tensor, name: str) -> None:
    if tensor.dtype != torch.uint8 or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise InternalError(f"{direction} of {name!r}: takes contiguous host bytes (torch.uint8), got {tensor.dtype}.")
    if tensor.numel() != extent.num_bytes:
        raise InternalError(f"{direction} of {name!r}: tensor has {tensor.numel()} bytes, {extent}.")
    if extent.num_bytes and tensor.data_ptr() % DISK_ALIGN_BYTES:
        raise InternalError(f"{direction} of {name!r}: address must be a multiple of {DISK_ALIGN_BYTES}.")
    if extent.offset + extent.num_bytes > file.num_bytes:
        raise InternalError(f"{direction} of {name!r}: {extent} ends behind the {file} ({file.num_bytes} bytes).")
