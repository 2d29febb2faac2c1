"""A disk queue whose transfers are units of lanes, so that doubles decide when they run.

Owns: two lanes for reads and two for writes, taken in turn: only futures order two transfers.
Does not: reimplement a transfer: the requests, their checks and errors are those of offload/disk/transfer.py.
"""

import contextlib
import itertools
import os
from functools import partial
from typing import Any

import torch

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Lanes, Reason
from offload.disk.checksums import Checksums
from offload.disk.io_queue import DEFAULTS, QueueOptions
from offload.disk.layout import Extent
from offload.disk.swap_file import SwapFiles
from offload.disk.transfer import REAL, Direction, OsFunctions, Transfer
from offload.errors import OffloadError, SessionClosedError
from offload.units import MIB

REQUEST_BYTES = 8 * MIB


class LaneQueue:
    """See `offload.disk.io_queue.TransferQueue`."""

    def __init__(
        self,
        files: SwapFiles,
        *,
        lanes: Lanes,
        options: QueueOptions = DEFAULTS,
        checksums: Checksums | None = None,
        os_functions: OsFunctions = REAL,
    ) -> None:
        """`options` are for disks that take time."""
        assert checksums is None, "the doubles verify nothing"
        self._files = files.files
        self._lanes = lanes
        self._timeline = lanes.timeline
        self._os_functions = os_functions
        self._lanes_of = {
            direction: itertools.cycle([lanes.lane(direction), lanes.lane(f"{direction} 2")])
            for direction in ("read", "write")
        }
        self._open: dict[int, Future[None]] = {}
        self._numbers = itertools.count()
        self._closed = False

    def read(self, extent: Extent, destination: torch.Tensor, name: str) -> Future[None]:
        return self._submit("read", extent, destination, name)

    def write(self, extent: Extent, source: torch.Tensor, name: str) -> Future[None]:
        return self._submit("write", extent, source, name)

    def close(self) -> None:
        """Wait for everything in flight. After a failure units not begun never run, and `Lanes.close` ends the rest."""
        self._closed = True
        for future in list(self._open.values()):
            with contextlib.suppress(OffloadError):  # whoever waits for the future sees it, and so does the session
                self._lanes.wait(future, Reason.DRAIN)

    def _submit(self, direction: Direction, extent: Extent, tensor: torch.Tensor, name: str) -> Future[None]:
        if self._closed:
            raise SessionClosedError(f"{direction} of {name!r} was asked of a disk queue that is closed.")
        transfer = Transfer(direction, self._files[extent.file_index], extent, tensor, Future(name))
        number = next(self._numbers)
        lane = next(self._lanes_of[direction])
        future: Future[Any] = lane.submit(partial(self._carry_out, transfer), name)
        self._open[number] = future
        future.when_done(partial(self._open.pop, number))
        return future

    def _carry_out(self, transfer: Transfer) -> None:
        try:
            if transfer.direction == "read":
                self._lanes.declare(reads=[transfer.key()], writes=[transfer.tensor])
            else:
                self._lanes.declare(reads=[transfer.tensor], writes=[transfer.key()])
            with self._timeline.work(transfer.direction, transfer.future.name, transfer.extent.num_bytes):
                self._move(transfer)
        finally:
            transfer.abandon()

    def _move(self, transfer: Transfer) -> None:
        call = self._os_functions.preadv if transfer.direction == "read" else self._os_functions.pwritev
        for request in transfer.split(REQUEST_BYTES):
            while not request.finished:
                view, offset = request.next_call()
                with view:
                    try:
                        num_moved = call(transfer.file.descriptor, [view], offset)
                    except InterruptedError:
                        continue
                    except OSError as error:
                        raise request.failed(error) from error
                request.advance(num_moved)
            if transfer.file.mode == "buffered":
                os.posix_fadvise(
                    transfer.file.descriptor, request.file_offset, request.num_bytes, os.POSIX_FADV_DONTNEED
                )
            self._lanes.progress()
