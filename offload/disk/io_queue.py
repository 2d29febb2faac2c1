"""Reads and writes of swap files, many in flight.

Owns: which request runs next, how many run, and their threads.
Does not: order a read after the write of the same extent (callers wait for futures), or make files (swap_file.py).
Threads: `read` and `write` may be called from any thread; futures resolve in the thread of the event loop, so their
callbacks must not block. System calls run on `depth` threads of their own, without the GIL.
Fork: a child has neither the threads nor the loop; every call in a child raises.

Note [Reads first]: somebody waits for a read, nobody for a write until its extent is read again one step later. So
requests of reads go first; after `READS_IN_ROW` of them one request of a write that waits gets its turn, else the staging buffers
of writes would never come back while reads keep coming.

Note [Joined requests]: small requests that wait and lie one behind the other on disk are moved by one system call, up
to the size of a request: the cost of a call is the same for a page and for megabytes. What such a call leaves, for an
error or because it was short, is moved request by request, so that an error names what it belongs to.
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

from offload.concurrency.futures import Future
from offload.concurrency.lanes import POLL_S, Lanes, Reason, current_lane, set_current_lane
from offload.concurrency.timeline import Timeline
from offload.disk.checksums import Checksums, checksum_of
from offload.disk.layout import Extent
from offload.disk.swap_file import SwapFiles
from offload.disk.transfer import REAL, Direction, OsFunctions, Request, Transfer
from offload.errors import InternalError, SessionClosedError, WaitTimeoutError
from offload.units import DISK_ALIGN_BYTES, MIB

REQUEST_BYTES: Final = 8 * MIB
"""Large enough that the cost of a request (some 130 us) is a tenth of its time, small enough to overlap."""

DEPTH: Final = 8
"""Requests in flight at once."""

READS_IN_ROW: Final = 4
"""Requests of reads started while a write waits, before one of the write is."""

READY_SHARE: Final = 4
"""For so many threads one system call is chosen ahead when all work, so that one that ends finds the next without the
loop's help: where cores are busy the loop comes late, and the disk would stand still (measured: 5 to 10 % of its
rate)."""

MAX_JOINED: Final = 64
"""Requests moved by one system call; the kernel takes up to 1024 stretches of memory."""


class TransferQueue(Protocol):
    """Reads and writes extents of swap files: what the rest of the package sees of a disk."""

    def read(self, extent: Extent, destination: torch.Tensor, name: str) -> Future[None]:
        """Fill `destination` (torch.uint8, page-aligned, as long as the extent), which is kept alive until done."""

    def write(self, extent: Extent, source: torch.Tensor, name: str) -> Future[None]:
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
        write_request_bytes: int | None = None,
        checksums: Checksums | None = None,
        os_functions: OsFunctions = REAL,
    ) -> None:
        """`write_request_bytes` where writes want another size; with `checksums` every extent read is verified."""
        sizes: dict[Direction, int] = {"read": request_bytes, "write": write_request_bytes or request_bytes}
        if depth < 1 or any(size < 1 or size % DISK_ALIGN_BYTES for size in sizes.values()):
            raise InternalError(f"depth {depth} and request sizes {sizes} do not make a queue.")
        self._files = files.files
        self._lanes = lanes
        self._timeline = timeline
        self._request_bytes = sizes
        self._checksums = checksums
        self._calls = {
            "read": aiofiles.os.wrap(os_functions.preadv),
            "write": aiofiles.os.wrap(os_functions.pwritev),
        }
        self._drop_cached = aiofiles.os.wrap(os.posix_fadvise)
        self._pid = os.getpid()
        self._lock = threading.Lock()  # orders submissions against close
        self._closed = False  # no more submissions
        self._closing = False  # the loop knows it: all submissions have been enqueued before
        self._numbers = itertools.count()
        self._open: dict[int, Transfer] = {}  # submitted and not yet settled
        self._turns = _Turns(depth + depth // READY_SHARE, sizes)
        self._executor = ThreadPoolExecutor(depth, thread_name_prefix="offload-disk-request")
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._drained: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="offload-disk-loop", daemon=True)
        self._thread.start()
        lanes.in_flight.append(self._describe)

    def read(self, extent: Extent, destination: torch.Tensor, name: str) -> Future[None]:
        """Fill `destination`; see `TransferQueue.read`."""
        return self._submit("read", extent, destination, name)

    def write(self, extent: Extent, source: torch.Tensor, name: str) -> Future[None]:
        """Write `source`; see `TransferQueue.write`."""
        return self._submit("write", extent, source, name)

    def close(self) -> None:
        """Finish everything in flight and end the threads.

        Raises WaitTimeoutError where nothing moves any more; then it may be called again, to go on waiting.
        """
        if os.getpid() != self._pid:  # asked first: in a child the lock may be held by a thread that is not there
            return
        with self._lock:
            if self._describe not in self._lanes.in_flight:
                return
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._begin_close)
        # The kernel still writes into staging buffers and reads from them: unmapped too early, that would hit other memory.
        self._join()
        self._executor.shutdown()
        self._lanes.in_flight.remove(self._describe)

    # ---------------------------------------------------------------------------------------- calling threads

    def _submit(self, direction: Direction, extent: Extent, tensor: torch.Tensor, name: str) -> Future[None]:
        if os.getpid() != self._pid:  # asked first: in a child the lock may be held by a thread that is not there
            raise SessionClosedError(
                f"{direction} of {name!r} was asked in a forked process; swap is usable only in the process that made "
                "it. Use the session in the training process alone."
            )
        transfer = Transfer(direction, self._files[extent.file_index], extent, tensor, self._lanes.future(name))
        with self._lock:
            if self._closed:
                raise SessionClosedError(
                    f"{direction} of {name!r} was asked of a disk queue that is closed; swap is usable only inside "
                    "the session that made it."
                )
            number = next(self._numbers)
            self._open[number] = transfer
            self._loop.call_soon_threadsafe(self._enqueue, number, transfer)
        return transfer.future

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
        requests = transfer.split(self._request_bytes[transfer.direction])
        if not requests:
            self._settle(number, transfer)
        self._turns.add(transfer.direction, [(number, request) for request in requests])
        self._start_requests()

    def _start_requests(self) -> None:
        while turn := self._turns.take():
            task = self._loop.create_task(self._carry_out(turn))
            self._tasks.add(task)  # the loop itself holds tasks weakly
            task.add_done_callback(self._tasks.discard)

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

    async def _carry_out(self, turn: list["_Numbered"]) -> None:
        may_run = [request for _, request in turn if self._may_run(request.transfer)]
        if len(may_run) > 1 and len(may_run) == len(turn):
            await self._move_joined(may_run)
        for number, request in turn:
            if self._may_run(request.transfer):
                try:
                    await self._move(request)
                    await self._check_sum(request)
                except Exception as error:
                    self._fail(request.transfer, error)
                self._lanes.progress()
            self._finish(number, request)
        self._turns.give_back()
        self._start_requests()

    async def _move_joined(self, requests: list[Request]) -> None:
        """See Note [Joined requests]."""
        first = requests[0].transfer
        views = [request.next_call()[0] for request in requests]
        call = self._calls[first.direction]
        try:
            num_moved = await call(first.file.descriptor, views, requests[0].file_offset, executor=self._executor)
        except Exception:  # whatever it was comes again below, of the request it belongs to
            return
        finally:
            for view in views:
                view.release()
        for request in requests:
            num_own = min(num_moved, request.num_bytes)
            if num_own > 0:
                request.advance(num_own)
            num_moved -= num_own

    async def _move(self, request: Request) -> None:
        file = request.transfer.file
        call = self._calls[request.transfer.direction]
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

    async def _check_sum(self, request: Request) -> None:
        """With the last request of a transfer: note what was written, or raise where what was read is not that."""
        transfer = request.transfer
        tensor = transfer.tensor
        if self._checksums is None or tensor is None or transfer.num_requests_left > 1 or transfer.error is not None:
            return
        got = await self._loop.run_in_executor(self._executor, checksum_of, tensor)
        del tensor  # a stored error must not keep the memory alive through its frames
        if transfer.direction == "write":
            self._checksums.note(transfer.extent, got)
        else:
            self._checksums.compare(transfer.extent, got)

    def _fail(self, transfer: Transfer, error: BaseException) -> None:
        transfer.error = transfer.error or error
        set_current_lane(transfer.direction)
        self._lanes.fail(error)

    def _finish(self, number: int, request: Request) -> None:
        """Count a request. The future waits for the last one even after an error: until then the tensor is in use."""
        transfer = request.transfer
        transfer.num_requests_left -= 1
        if not transfer.num_requests_left:
            self._settle(number, transfer)

    def _settle(self, number: int, transfer: Transfer) -> None:
        del self._open[number]
        transfer.abandon()
        set_current_lane(transfer.direction)
        try:
            if transfer.error is not None:
                transfer.future.fail(transfer.error)
            else:
                stop_s = time.perf_counter()
                num_bytes = transfer.extent.num_bytes
                start_s = transfer.start_s or stop_s
                self._timeline.add_work(transfer.direction, transfer.future.name, start_s, stop_s, num_bytes)
                transfer.future.resolve()
        except Exception as error:  # of a callback: it must fail the session, not this loop
            self._lanes.fail(error)
        self._end_if_idle()

    def _begin_close(self) -> None:
        self._closing = True
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._closing and not self._open and not self._drained.done():
            self._drained.set_result(None)


_Numbered = tuple[int, Request]
"""A request with the number of its transfer."""


class _Turns:
    """Which requests are next, and whether one more system call may be chosen. Used by the loop's thread alone.

    See Note [Reads first] and Note [Joined requests].
    """

    def __init__(self, num_calls: int, request_bytes: dict[Direction, int]) -> None:
        self._num_free = num_calls
        self._request_bytes = request_bytes
        self._waiting: dict[Direction, deque[_Numbered]] = {"read": deque(), "write": deque()}
        self._reads_in_row = 0

    def add(self, direction: Direction, requests: list[_Numbered]) -> None:
        """Append requests of one transfer."""
        self._waiting[direction].extend(requests)

    def take(self) -> list[_Numbered]:
        """The next requests for one system call, which then runs; empty where none waits or enough are chosen."""
        reads, writes = self._waiting["read"], self._waiting["write"]
        if not self._num_free or not (reads or writes):
            return []
        self._num_free -= 1
        if reads and not (writes and self._reads_in_row >= READS_IN_ROW):
            self._reads_in_row = self._reads_in_row + 1 if writes else 0
            return _joined(reads, self._request_bytes["read"])
        self._reads_in_row = 0
        return _joined(writes, self._request_bytes["write"])

    def give_back(self) -> None:
        """One system call less runs."""
        self._num_free += 1


def _joined(waiting: deque[_Numbered], most_bytes: int) -> list[_Numbered]:
    """The first request, with those behind it that one system call moves too."""
    turn = [waiting.popleft()]
    num_bytes = turn[0][1].num_bytes
    while waiting and len(turn) < MAX_JOINED and waiting[0][1].follows(turn[-1][1]):
        num_bytes += waiting[0][1].num_bytes
        if num_bytes > most_bytes:
            break
        turn.append(waiting.popleft())
    return turn
