"""Reads and writes of swap files, many in flight.

Owns: which request runs next, how many run, and their threads.
Does not: order a read after the write of the same extent (callers wait for promises), or make files (swap_file.py).
Threads: `read` and `write` may be called from any thread; promises resolve in the thread of the event loop, so their
callbacks must not block. System calls run on `depth` threads of their own, without the GIL.
Fork: a child has neither the threads nor the loop; every call in a child raises.

Note [Reads first]: somebody waits for a read, nobody for a write until its extent is read again one step later. So
requests of reads go first; after `READS_IN_ROW` of them one request of a write that waits gets its turn, else the slabs
of writes would never come back while reads keep coming.
"""

import asyncio
import itertools
import os
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

import aiofiles.os  # type: ignore[import-untyped]
import torch

from offload.disk.layout import Extent
from offload.disk.swap_file import SwapFiles
from offload.disk.transfer import REAL, Direction, OsFunctions, Request, Transfer
from offload.errors import InternalError, SessionClosedError, WaitTimeoutError
from offload.lanes import POLL_S, Lanes, Promise, Reason, current_lane, set_current_lane
from offload.timeline import Timeline
from offload.units import DISK_ALIGN_BYTES, MIB

REQUEST_BYTES: Final = 8 * MIB
"""Large enough that the cost of a request (some 130 us) is a tenth of its time, small enough to overlap."""

DEPTH: Final = 8
"""Requests in flight at once."""

READS_IN_ROW: Final = 4
"""Requests of reads started while a write waits, before one of the write is."""


class TransferQueue(Protocol):
    """Reads and writes extents of swap files: what the rest of the package sees of a disk."""

    def read(self, extent: Extent, destination: torch.Tensor, name: str) -> Promise[None]:
        """Fill `destination` (torch.uint8, page-aligned, as long as the extent), which is kept alive until done."""

    def write(self, extent: Extent, source: torch.Tensor, name: str) -> Promise[None]:
        """Write `source` (torch.uint8, page-aligned, as long as the extent), which is kept alive until done."""

    def close(self) -> None:
        """Finish everything in flight; later calls raise. A second call does nothing."""


class IoQueue:
    """Positional reads and writes on an event loop in the background. See `TransferQueue`."""

    def __init__(
        self,
        files: SwapFiles,
        *,
        lanes: Lanes,
        timeline: Timeline,
        depth: int = DEPTH,
        request_bytes: int = REQUEST_BYTES,
        os_functions: OsFunctions = REAL,
    ) -> None:
        if depth < 1 or request_bytes < 1 or request_bytes % DISK_ALIGN_BYTES:
            raise InternalError(f"depth {depth} and request_bytes {request_bytes} do not make a queue.")
        self._files = files.files
        self._lanes = lanes
        self._timeline = timeline
        self._request_bytes = request_bytes
        self._preadv = aiofiles.os.wrap(os_functions.preadv)
        self._pwritev = aiofiles.os.wrap(os_functions.pwritev)
        self._drop_cached = aiofiles.os.wrap(os.posix_fadvise)
        self._pid = os.getpid()
        self._lock = threading.Lock()  # orders submissions against close
        self._closed = False  # no more submissions
        self._closing = False  # the loop knows it: all submissions have been enqueued before
        self._numbers = itertools.count()
        self._open: dict[int, Transfer] = {}  # submitted and not yet settled
        self._turns = _Turns(depth)
        self._executor = ThreadPoolExecutor(depth, thread_name_prefix="offload-disk-request")
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._drained: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="offload-disk-loop", daemon=True)
        self._thread.start()
        lanes.in_flight.append(self._describe)

    def read(self, extent: Extent, destination: torch.Tensor, name: str) -> Promise[None]:
        """Fill `destination`; see `TransferQueue.read`."""
        return self._submit("read", extent, destination, name)

    def write(self, extent: Extent, source: torch.Tensor, name: str) -> Promise[None]:
        """Write `source`; see `TransferQueue.write`."""
        return self._submit("write", extent, source, name)

    def close(self) -> None:
        """Finish everything in flight and end the threads.

        Raises WaitTimeoutError where nothing moves any more; then it may be called again, to go on waiting.
        """
        with self._lock:
            if os.getpid() != self._pid or self._describe not in self._lanes.in_flight:
                return
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._begin_close)
        # The kernel still writes into slabs and reads from them: unmapped too early, that would hit other memory.
        self._join()
        self._executor.shutdown()
        self._lanes.in_flight.remove(self._describe)

    # ---------------------------------------------------------------------------------------- calling threads

    def _submit(self, direction: Direction, extent: Extent, tensor: torch.Tensor, name: str) -> Promise[None]:
        transfer = Transfer(direction, self._files[extent.file_index], extent, tensor, self._lanes.promise(name))
        with self._lock:
            if self._closed or os.getpid() != self._pid:
                raise SessionClosedError(
                    f"{direction} of {name!r} was asked of a disk queue that is closed, or in a forked process; swap "
                    "is usable only inside the session and the process that made it."
                )
            number = next(self._numbers)
            self._open[number] = transfer
            self._loop.call_soon_threadsafe(self._enqueue, number, transfer)
        return transfer.promise

    def _join(self) -> None:
        start_s = last_progress_s = time.perf_counter()
        before = self._describe()
        while True:
            self._thread.join(POLL_S)
            if not self._thread.is_alive():
                break
            now_s, now = time.perf_counter(), self._describe()
            if now != before:
                last_progress_s, before = now_s, now
            if now_s - last_progress_s > self._lanes.wait_timeout_s:
                raise WaitTimeoutError(
                    f"closing the disk queue: nothing has moved for {self._lanes.wait_timeout_s:g} s. In flight:\n  "
                    + "\n  ".join(now)
                    + "\nThe disk has stalled (look at dmesg); raise wait_timeout_s if it is only slow."
                )
        self._timeline.add_wait(current_lane(), Reason.DRAIN, start_s, time.perf_counter())

    def _describe(self) -> list[str]:
        return [transfer.describe() for transfer in list(self._open.values())]

    # ------------------------------------------------------------------------------------------- loop's thread

    def _run(self) -> None:
        self._loop.run_until_complete(self._drained)
        self._loop.close()

    def _enqueue(self, number: int, transfer: Transfer) -> None:
        requests = transfer.split(self._request_bytes)
        if not requests:
            self._settle(number, transfer)
        self._turns.add(transfer.direction, [(number, request) for request in requests])
        self._start_requests()

    def _start_requests(self) -> None:
        while (turn := self._turns.take()) is not None:
            number, request = turn
            if self._may_run(request.transfer):
                task = self._loop.create_task(self._carry_out(number, request))
                self._tasks.add(task)  # the loop itself holds tasks weakly
                task.add_done_callback(self._tasks.discard)
            else:
                self._finish(number, request)

    def _may_run(self, transfer: Transfer) -> bool:
        """Begin the transfer with its first request. After a failure, its own or another's, nothing is begun."""
        if transfer.error is None and not transfer.start_s:
            transfer.begin()
            set_current_lane(transfer.direction)
            try:
                self._lanes.check()
            except Exception as error:
                self._fail(transfer, error)
        return transfer.error is None

    async def _carry_out(self, number: int, request: Request) -> None:
        try:
            await self._move(request)
        except Exception as error:
            self._fail(request.transfer, error)
        self._lanes.progress()
        self._finish(number, request)
        self._start_requests()

    async def _move(self, request: Request) -> None:
        file = request.transfer.file
        call = self._preadv if request.transfer.direction == "read" else self._pwritev
        while not request.finished:
            view, offset = request.next_call()
            with view:  # released at once: a stored error must not keep the memory alive through its frames
                try:
                    num_moved = await call(file.descriptor, [view], offset, executor=self._executor)
                except InterruptedError:  # a signal; nothing was moved
                    continue
                except OSError as error:
                    raise request.failed(error) from error
            request.advance(num_moved)
        if file.mode == "buffered":
            # Without this, swap fills the page cache and pushes out what the host budget has promised to others.
            await self._drop_cached(
                file.descriptor, request.file_offset, request.num_bytes, os.POSIX_FADV_DONTNEED, executor=self._executor
            )

    def _fail(self, transfer: Transfer, error: BaseException) -> None:
        transfer.error = transfer.error or error
        set_current_lane(transfer.direction)
        self._lanes.fail(error)

    def _finish(self, number: int, request: Request) -> None:
        """Count a request. The promise waits for the last one even after an error: until then the tensor is in use."""
        self._turns.give_back()
        transfer = request.transfer
        transfer.num_requests_left -= 1
        if not transfer.num_requests_left:
            self._settle(number, transfer)

    def _settle(self, number: int, transfer: Transfer) -> None:
        del self._open[number]
        transfer.let_go()
        set_current_lane(transfer.direction)
        try:
            if transfer.error is not None:
                transfer.promise.fail(transfer.error)
            else:
                stop_s = time.perf_counter()
                num_bytes = transfer.extent.num_bytes
                start_s = transfer.start_s or stop_s
                self._timeline.add_work(transfer.direction, transfer.promise.name, start_s, stop_s, num_bytes)
                transfer.promise.resolve()
        except Exception as error:  # of a callback: it must fail the session, not this loop
            self._lanes.fail(error)
        self._end_if_idle()

    def _begin_close(self) -> None:
        self._closing = True
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._closing and not self._open and not self._drained.done():
            self._drained.set_result(None)


class _Turns:
    """Which request is next, and whether one more may run. Used by the loop's thread alone. See Note [Reads first]."""

    def __init__(self, depth: int) -> None:
        self._num_free = depth
        self._waiting: dict[Direction, deque[tuple[int, Request]]] = {"read": deque(), "write": deque()}
        self._reads_in_row = 0

    def add(self, direction: Direction, requests: list[tuple[int, Request]]) -> None:
        """Append requests of one transfer."""
        self._waiting[direction].extend(requests)

    def take(self) -> tuple[int, Request] | None:
        """The next request, which then runs; None where none waits or `depth` of them run."""
        reads, writes = self._waiting["read"], self._waiting["write"]
        if not self._num_free or not (reads or writes):
            return None
        self._num_free -= 1
        if reads and not (writes and self._reads_in_row >= READS_IN_ROW):
            self._reads_in_row = self._reads_in_row + 1 if writes else 0
            return reads.popleft()
        self._reads_in_row = 0
        return writes.popleft()

    def give_back(self) -> None:
        """One request less runs."""
        self._num_free += 1
