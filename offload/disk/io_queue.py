"""Reads and writes of swap files, many in flight.

Owns: which request runs next, how many run, and their threads.
Does not: order a read after the write of the same extent (storage/homes.py does), or make files (swap_file.py).
Threads: `read` and `write` may be called from any thread; futures resolve in the thread of the event loop, so their
callbacks must not block. System calls run on `depth` threads of their own, without the GIL.
Fork: a child has neither the threads nor the loop; every call in a child raises.

Note [Reads first]: somebody waits for a read, nobody for a write until its extent is read again one step later. So
requests of reads go first; after `READS_IN_ROW` of them one request of a write that waits is next, else the staging
buffers of writes would never be released while reads keep coming.

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
from dataclasses import dataclass
from typing import Final, Protocol

import aiofiles.os  # type: ignore[import-untyped]
import torch

from offload.concurrency.futures import Future
from offload.concurrency.lanes import POLL_S, Lanes, Reason, current_lane, set_current_lane
from offload.disk.checksums import Checksums, checksum_of
from offload.disk.layout import Extent
from offload.disk.swap_file import SwapFiles
from offload.disk.transfer import REAL, Direction, OsFunctions, Request, Transfer
from offload.errors import InternalError, SessionClosedError, WaitTimeoutError
from offload.units import DISK_ALIGN_BYTES, MIB

DIRECTIONS: Final[tuple[Direction, ...]] = ("read", "write")

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


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueOptions:
    """How a queue uses a disk."""

    depth: int = DEPTH
    """Requests in flight at once."""
    request_bytes: int = REQUEST_BYTES
    write_request_bytes: int | None = None
    """Where writes want another size."""

    def __post_init__(self) -> None:
        sizes = {direction: self.bytes_of(direction) for direction in DIRECTIONS}
        if self.depth < 1 or any(size < 1 or size % DISK_ALIGN_BYTES for size in sizes.values()):
            raise InternalError(f"depth {self.depth} and request sizes {sizes} do not make a queue.")

    def bytes_of(self, direction: Direction) -> int:
        """Of the requests in one direction."""
        written = self.write_request_bytes if direction == "write" else None
        return written if written is not None else self.request_bytes


DEFAULTS: Final = QueueOptions()


class IoQueue:
    """Positional reads and writes on an event loop in the background. See `TransferQueue`."""

    def __init__(
        self,
        files: SwapFiles,
        *,
        lanes: Lanes,
        options: QueueOptions = DEFAULTS,
        checksums: Checksums | None = None,
        os_functions: OsFunctions = REAL,
    ) -> None:
        """With `checksums` every extent read is verified."""
        self._files = files.files
        self._lanes = lanes
        self._checksums = checksums
        self._system = _SystemCalls(options.depth, os_functions)
        self._requests = _WaitingRequests(options)
        self._pid = os.getpid()
        self._lock = threading.Lock()  # orders submissions against close
        self._closed = False  # no more submissions
        self._closing = False  # the loop knows it: all submissions have been enqueued before
        self._numbers = itertools.count()
        self._open: dict[int, Transfer] = {}  # submitted and not yet settled
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
        # The kernel still uses staging buffers: unmapped too early, that would hit other memory.
        self._join()
        self._system.close()
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
        self._lanes.timeline.add_wait(current_lane(), Reason.DRAIN, start_s, time.perf_counter())

    def _describe(self) -> list[str]:
        return [transfer.describe() for transfer in list(self._open.values())]

    # ------------------------------------------------------------------------------------------- loop's thread

    def _run(self) -> None:
        self._loop.run_until_complete(self._drained)
        self._loop.close()

    def _enqueue(self, number: int, transfer: Transfer) -> None:
        if not self._requests.add(number, transfer):
            self._settle(number, transfer)
        self._start_requests()

    def _start_requests(self) -> None:
        while joined := self._requests.take():
            task = self._loop.create_task(self._carry_out(joined))
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

    async def _carry_out(self, joined: list["_Numbered"]) -> None:
        may_run = [request for _, request in joined if self._may_run(request.transfer)]
        if len(may_run) > 1 and len(may_run) == len(joined):
            await self._move_joined(may_run)
        for number, request in joined:
            if self._may_run(request.transfer):
                try:
                    await self._move(request)
                    await self._check_sum(request)
                except Exception as error:
                    self._fail(request.transfer, error)
                self._lanes.progress()
            self._finish(number, request)
        self._requests.call_ended()
        self._start_requests()

    async def _move_joined(self, requests: list[Request]) -> None:
        """See Note [Joined requests]."""
        first = requests[0].transfer
        views = [request.next_call()[0] for request in requests]
        try:
            num_moved = await self._system.move(first, views, requests[0].file_offset)
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
        while not request.finished:
            view, offset = request.next_call()
            with view:  # released at once: a stored error must not keep the memory alive through its frames
                try:
                    num_moved = await self._system.move(request.transfer, [view], offset)
                except InterruptedError:  # a signal; nothing was moved
                    continue
                except OSError as error:
                    raise request.failed(error) from error
            request.advance(num_moved)
        if file.mode == "buffered":
            # Without this, swap fills the page cache and pushes out what the host budget has assigned to others.
            await self._system.drop_cached(request)

    async def _check_sum(self, request: Request) -> None:
        """With the last request of a transfer: note what was written, or raise where what was read is not that."""
        transfer = request.transfer
        tensor = transfer.tensor
        if self._checksums is None or tensor is None or transfer.num_requests_left > 1 or transfer.error is not None:
            return
        got = await self._system.checksum(tensor)
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
                self._lanes.timeline.add_work(transfer.direction, transfer.future.name, start_s, stop_s, num_bytes)
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


class _SystemCalls:
    """Calls that move bytes, each on one of `depth` threads."""

    def __init__(self, depth: int, os_functions: OsFunctions) -> None:
        self._calls = {
            "read": aiofiles.os.wrap(os_functions.preadv),
            "write": aiofiles.os.wrap(os_functions.pwritev),
        }
        self._advise = aiofiles.os.wrap(os.posix_fadvise)
        self._executor = ThreadPoolExecutor(depth, thread_name_prefix="offload-disk-request")

    async def move(self, transfer: Transfer, views: list[memoryview], offset: int) -> int:
        """Read or write from `offset` of the transfer's file on; returns how many bytes were moved."""
        call = self._calls[transfer.direction]
        num_moved: int = await call(transfer.file.descriptor, views, offset, executor=self._executor)
        return num_moved

    async def drop_cached(self, request: Request) -> None:
        """Ask the page cache to forget what was moved."""
        await self._advise(
            request.transfer.file.descriptor, request.file_offset, request.num_bytes, os.POSIX_FADV_DONTNEED,
            executor=self._executor,
        )  # fmt: skip

    async def checksum(self, tensor: torch.Tensor) -> int:
        """See checksum_of."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, checksum_of, tensor)

    def close(self) -> None:
        """End the threads."""
        self._executor.shutdown()


class _WaitingRequests:
    """Which requests are next, and whether one more system call may be chosen. Used by the loop's thread alone.

    See Note [Reads first] and Note [Joined requests].
    """

    def __init__(self, options: QueueOptions) -> None:
        self._num_free = options.depth + options.depth // READY_SHARE
        self._options = options
        self._waiting: dict[Direction, deque[_Numbered]] = {"read": deque(), "write": deque()}
        self._reads_in_row = 0

    def add(self, number: int, transfer: Transfer) -> bool:
        """Append the requests of one transfer; False where it has none."""
        requests = transfer.split(self._options.bytes_of(transfer.direction))
        self._waiting[transfer.direction].extend((number, request) for request in requests)
        return bool(requests)

    def take(self) -> list[_Numbered]:
        """The next requests for one system call, which then runs; empty where none waits or enough are chosen."""
        reads, writes = self._waiting["read"], self._waiting["write"]
        if not self._num_free or not (reads or writes):
            return []
        self._num_free -= 1
        if reads and not (writes and self._reads_in_row >= READS_IN_ROW):
            self._reads_in_row = self._reads_in_row + 1 if writes else 0
            return _joined(reads, self._options.bytes_of("read"))
        self._reads_in_row = 0
        return _joined(writes, self._options.bytes_of("write"))

    def call_ended(self) -> None:
        """One system call less runs."""
        self._num_free += 1


def _joined(waiting: deque[_Numbered], most_bytes: int) -> list[_Numbered]:
    """The first request, with those behind it that one system call moves too."""
    joined = [waiting.popleft()]
    num_bytes = joined[0][1].num_bytes
    while waiting and len(joined) < MAX_JOINED and waiting[0][1].follows(joined[-1][1]):
        num_bytes += waiting[0][1].num_bytes
        if num_bytes > most_bytes:
            break
        joined.append(waiting.popleft())
    return joined
