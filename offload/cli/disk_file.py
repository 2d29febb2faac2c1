"""The file that `offload bench disk` moves, by the product's own queue.

Owns: one file on the disk that is measured, and one timed run over it.
Does not: choose settings, order the runs or keep a record (bench_disk.py).
Threads: the main thread, and those of the queue.
"""

import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import numpy as np

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Lanes, Reason
from offload.concurrency.timeline import Timeline
from offload.disk.io_queue import IoQueue, QueueOptions
from offload.disk.layout import Extent
from offload.disk.probe import free_bytes
from offload.disk.swap_file import SwapFile, SwapFiles
from offload.errors import DiskFullError
from offload.memory.ledger import Ledger
from offload.memory.region import Region
from offload.units import MIB, format_bytes, round_up

Kind = Literal["read", "write", "mixed"]
KINDS: Final[tuple[Kind, ...]] = ("read", "write", "mixed")

TRANSFER_BYTES: Final = 16 * MIB
"""Of one transfer of the product: about a chunk of optimizer state."""
UNIT_BYTES: Final = 4 * TRANSFER_BYTES
"""The file is a multiple of it, so that both halves hold whole transfers and whole requests of every size."""
SPARE_BUFFERS: Final = 4
"""More than the requests in flight need: the next transfers are already there when the first ones end."""
MAX_QUEUES: Final = 3
"""As many as the kinds of runs, each of which may have a best setting of its own."""

FREE_SHARE: Final = 0.95
"""Of the free space that the file may take: a disk filled to the brim slows down, and breaks others."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Bytes of a request, and how many are in flight."""

    request_bytes: int
    depth: int

    @property
    def words(self) -> str:
        """For people."""
        return f"{format_bytes(self.request_bytes)} x {self.depth}"


class DiskFile:
    """The file, and the product's way to move it. A context manager."""

    def __init__(self, folder: Path, num_bytes: int, largest: Setting, seed: int) -> None:
        self.num_bytes = round_up(num_bytes, UNIT_BYTES)
        check_free_disk(folder, self.num_bytes)
        self._queues: dict[Setting, IoQueue] = {}
        num_buffers = _num_buffers(largest)
        with ExitStack() as stack:
            self._lanes = Lanes(Timeline(), wait_timeout_s=60.0)
            stack.callback(self._lanes.close)
            self._files = stack.enter_context(
                SwapFiles.create(
                    [folder], run_id=f"bench-{uuid.uuid4().hex[:8]}", rank=0, bytes_by_file=[self.num_bytes]
                )
            )
            region = Region(num_buffers * TRANSFER_BYTES, owner="bench disk", ledger=Ledger({}))
            # Random, so that no disk compresses it or stores equal blocks once.
            block = np.random.default_rng(seed).integers(0, 256, TRANSFER_BYTES, np.uint8)
            self._buffers = [region.tensor[i * TRANSFER_BYTES : (i + 1) * TRANSFER_BYTES] for i in range(num_buffers)]
            for buffer in self._buffers:
                buffer.numpy()[:] = block
            self._undo = stack.pop_all()

    @property
    def file(self) -> SwapFile:
        """Where it lies and how it is opened."""
        return self._files.files[0]

    def run(self, kind: Kind, setting: Setting, num_bytes: int) -> float:
        """Move `num_bytes` with the product's queue; seconds."""
        lanes, buffers = self._lanes, self._buffers[: _num_buffers(setting)]
        in_flight: list[Future[None] | None] = [None] * len(buffers)
        queue = self._queue(setting)
        start_s = time.perf_counter()
        for number in range(num_bytes // TRANSFER_BYTES):
            at = number % len(buffers)
            before = in_flight[at]
            if before is not None:
                lanes.wait(before, Reason.BUFFER_FREE)  # else two transfers would use one staging buffer
            writes = kind == "write" or (kind == "mixed" and number % 2 == 1)
            extent = Extent(0, self._offset(kind, number), TRANSFER_BYTES)
            in_flight[at] = (queue.write if writes else queue.read)(extent, buffers[at], kind)
        for future in in_flight:
            if future is not None:
                lanes.wait(future, Reason.DRAIN)  # the time of a run ends with its last byte
        return time.perf_counter() - start_s

    def close(self) -> None:
        """Remove the file and release the memory; a second call does nothing."""
        while self._queues:
            self._queues.popitem()[1].close()
        self._buffers.clear()
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _queue(self, setting: Setting) -> IoQueue:
        """Kept for the next run, as a session keeps its own; only the newest, because each has threads."""
        queue = self._queues.pop(setting, None)
        if queue is None:
            while len(self._queues) >= MAX_QUEUES:
                self._queues.pop(next(iter(self._queues))).close()
            lanes = self._lanes
            queue = IoQueue(
                self._files, lanes=lanes,
                options=QueueOptions(depth=setting.depth, request_bytes=setting.request_bytes),
            )  # fmt: skip
        self._queues[setting] = queue
        return queue

    def _offset(self, kind: Kind, number: int) -> int:
        if kind != "mixed":
            return number * TRANSFER_BYTES % self.num_bytes
        half = self.num_bytes // 2
        return number // 2 * TRANSFER_BYTES % half + (half if number % 2 else 0)


def check_free_disk(folder: Path, num_bytes: int) -> None:
    """Raises DiskFullError where the file would fill the disk."""
    if not folder.is_dir():
        return  # told by the one who makes the file
    free = free_bytes(folder)
    if num_bytes > free * FREE_SHARE:
        raise DiskFullError(
            f"{folder}: the benchmark's file needs {format_bytes(num_bytes)}, free are {format_bytes(free)}; ask for "
            "less with --size, free some space (`offload doctor` lists what dead runs have left), or name another "
            "--disk."
        )


def _num_buffers(setting: Setting) -> int:
    in_flight_bytes = setting.request_bytes * setting.depth
    return 2 * -(-in_flight_bytes // TRANSFER_BYTES) + SPARE_BUFFERS
