"""Both queues move exactly the bytes asked for, say what went wrong, and let go of memory only when it is safe."""

import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Lanes, Reason
from offload.concurrency.timeline import Timeline
from offload.disk import swap_file as swap_file_module
from offload.disk.io_queue import READS_IN_ROW, QueueOptions, TransferQueue
from offload.disk.layout import Extent, Layout
from offload.disk.probe import takes_direct_io
from offload.disk.swap_file import SwapFiles
from offload.disk.transfer import REAL, OsFunctions
from offload.errors import InternalError, SessionClosedError, SessionFailedError, TransferError, WaitTimeoutError
from offload.memory.ledger import Ledger
from offload.memory.region import Region
from offload.units import KIB, MIB, Tier
from tests.disk.children import start_python

QUEUES = pytest.mark.parametrize("kind", ["io", "lanes"])

MakeQueue = Callable[..., TransferQueue]
MakeSwap = Callable[..., SwapFiles]
MakeTensor = Callable[[int], torch.Tensor]
SystemCall = Callable[[int, Sequence[memoryview], int], int]


def raw_bytes(files: SwapFiles, extent: Extent) -> bytes:
    """What lies on disk, read without the queue."""
    with files.files[extent.file_index].path.open("rb") as file:
        file.seek(extent.offset)
        return file.read(extent.num_bytes)


def contents(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def fill(tensor: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    tensor.numpy()[:] = rng.integers(0, 256, tensor.numel(), dtype=np.uint8)
    return tensor


class Gate:
    """A system call that notes its offsets and does not go on before it is opened."""

    def __init__(self, call: SystemCall) -> None:
        self._call = call
        self._opened = threading.Event()
        self.entered = threading.Semaphore(0)
        self.offsets: list[int] = []

    def __call__(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        self.offsets.append(offset)
        self.entered.release()
        if not self._opened.wait(20):
            raise TimeoutError("the test never opened the gate")
        return self._call(descriptor, views, offset)

    def open(self) -> None:
        self._opened.set()


# ------------------------------------------------------------------------------------------------- round trips


@QUEUES
@pytest.mark.parametrize("num_bytes", [4 * KIB, 60 * KIB, 64 * KIB, 68 * KIB, MIB + 4 * KIB])
@pytest.mark.parametrize("depth", [1, 3])
def test_what_was_written_is_read_back(
    kind: str, num_bytes: int, depth: int, folder: Path, swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor,
    lanes: Lanes, timeline: Timeline, rng: np.random.Generator,
) -> None:  # fmt: skip
    layout = Layout(2)
    extents = [layout.allocate(num_bytes) for _ in range(5)]
    files = swap(*layout.bytes_by_file, root=folder)
    queue = queues(files, kind, depth=depth)
    sources = [fill(tensors(num_bytes), rng) for _ in extents]
    destinations = [tensors(num_bytes) for _ in extents]
    for future in [queue.write(e, s, f"chunk {e}") for e, s in zip(extents, sources, strict=True)]:
        lanes.wait(future, Reason.EXTENT_WRITTEN)
    assert [raw_bytes(files, extent) for extent in extents] == [contents(source) for source in sources]
    for future in [queue.read(e, d, f"chunk {e}") for e, d in zip(extents, destinations, strict=True)]:
        lanes.wait(future, Reason.READ)
    assert [contents(d) for d in destinations] == [contents(s) for s in sources]
    for lane in ("read", "write"):
        assert timeline.totals()[lane].num_bytes == 5 * num_bytes
        assert {span.name for span in timeline.spans(lane)} == {f"chunk {extent}" for extent in extents}
        assert all(span.stop_s >= span.start_s > 0 for span in timeline.spans(lane))


@QUEUES
def test_an_empty_extent_is_done_at_once(kind: str, swap: MakeSwap, queues: MakeQueue, lanes: Lanes) -> None:
    queue = queues(swap(0), kind)
    nothing = torch.empty(0, dtype=torch.uint8)
    lanes.wait(queue.write(Extent(0, 0, 0), nothing, "nothing"), Reason.EXTENT_WRITTEN)
    lanes.wait(queue.read(Extent(0, 0, 0), nothing, "nothing"), Reason.READ)


@QUEUES
def test_reads_and_writes_mixed_from_many_threads_keep_their_bytes(
    kind: str, swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes, rng: np.random.Generator
) -> None:
    num_threads, num_rounds, num_bytes = 4, 12, 132 * KIB
    queue = queues(swap(num_threads * num_bytes), kind)
    memory = [(fill(tensors(num_bytes), rng), tensors(num_bytes)) for _ in range(num_threads)]
    wrong: list[str] = []

    def work(index: int) -> None:
        extent, (source, destination) = Extent(0, index * num_bytes, num_bytes), memory[index]
        for number in range(num_rounds):
            source[number] += 1
            lanes.wait(queue.write(extent, source, f"{index}.{number}"), Reason.EXTENT_WRITTEN)
            lanes.wait(queue.read(extent, destination, f"{index}.{number}"), Reason.READ)
            if not torch.equal(source, destination):
                wrong.append(f"{index}.{number}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_buffered_fallback_moves_the_same_bytes_and_drops_them_from_the_cache(
    swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes, monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    dropped = []
    original = os.posix_fadvise

    def record(descriptor: int, offset: int, num_bytes: int, advice: int) -> None:
        dropped.append((offset, num_bytes, advice))
        original(descriptor, offset, num_bytes, advice)

    monkeypatch.setattr(swap_file_module, "takes_direct_io", lambda path: False)
    monkeypatch.setattr(os, "posix_fadvise", record)
    extent = Extent(0, 4 * KIB, 100 * KIB)
    for kind in ("io", "lanes"):
        queue = queues(swap(MIB), kind, request_bytes=64 * KIB, depth=1)
        source, destination = fill(tensors(100 * KIB), rng), tensors(100 * KIB)
        lanes.wait(queue.write(extent, source, "chunk"), Reason.EXTENT_WRITTEN)
        lanes.wait(queue.read(extent, destination, "chunk"), Reason.READ)
        assert torch.equal(source, destination)
        assert {advice for *_, advice in dropped} == {os.POSIX_FADV_DONTNEED}
        assert sum(num_bytes for _, num_bytes, _ in dropped) == 2 * 100 * KIB
        dropped.clear()


# ------------------------------------------------------------------------------------------- short and failing


@QUEUES
@pytest.mark.parametrize("mode", ["direct", "buffered"])
@pytest.mark.parametrize("limit", [4 * KIB, 5000, 20 * KIB])
def test_short_transfers_are_continued(
    kind: str, mode: str, limit: int, swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes,
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator,
) -> None:  # fmt: skip
    """Scenario: every call moves less than asked, also up to the middle of a page, from where direct I/O cannot go on;
    and every third call is interrupted by a signal."""
    calls = iter(range(10**6))
    monkeypatch.setattr(swap_file_module, "takes_direct_io", lambda path: mode == "direct" and takes_direct_io(path))
    files = swap(MIB)
    # A direct call cannot really stop in the middle of a page. It moves less than it tells of, so that the bytes after
    # the border are right only where they are moved again.
    unmoved = limit % 4096 if files.mode == "direct" else 0

    def short(call: SystemCall) -> SystemCall:
        def limited(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            if next(calls) % 3 == 0:
                raise InterruptedError(errno.EINTR, "Interrupted system call")
            if len(views[0]) <= limit:
                return call(descriptor, views, offset)
            return call(descriptor, [views[0][: limit - unmoved]], offset) + unmoved

        return limited

    queue = queues(files, kind, OsFunctions(preadv=short(os.preadv), pwritev=short(os.pwritev)))
    extent = Extent(0, 8 * KIB, 300 * KIB)
    source, destination = fill(tensors(extent.num_bytes), rng), tensors(extent.num_bytes)
    lanes.wait(queue.write(extent, source, "chunk"), Reason.EXTENT_WRITTEN)
    assert raw_bytes(files, extent) == contents(source)
    lanes.wait(queue.read(extent, destination, "chunk"), Reason.READ)
    assert torch.equal(source, destination)


@QUEUES
@pytest.mark.parametrize("direction", ["read", "write"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_an_error_of_the_system_names_everything_and_fails_the_session(
    kind: str, direction: str, number: int, swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes
) -> None:
    def fail(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        raise OSError(number, os.strerror(number))

    files = swap(MIB)
    queue = queues(files, kind, OsFunctions(preadv=fail, pwritev=fail))
    future = getattr(queue, direction)(Extent(0, 64 * KIB, 4 * KIB), tensors(4 * KIB), "state of chunk 7")
    with pytest.raises(TransferError) as caught:
        settle(future)
    message = str(caught.value)
    for part in (
        f"{direction} of state of chunk 7", str(files.files[0]), "wanted 4096 bytes at offset 65536", "got 0",
        os.strerror(number), f"errno {number}", "resume from the last checkpoint",
    ):  # fmt: skip
        assert part in message
    assert caught.value.errno == number
    assert lanes.failure is caught.value
    after = queue.read(Extent(0, 0, 4 * KIB), tensors(4 * KIB), "next")
    with pytest.raises(SessionFailedError, match="state of chunk 7"):
        settle(after)


@QUEUES
def test_a_truncated_file_is_told_from_its_offset(
    kind: str, swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor
) -> None:
    files = swap(MIB)
    os.truncate(files.files[0].path, 64 * KIB + 100)
    queue = queues(files, kind)
    with pytest.raises(TransferError, match=r"offset 65536, got 100: .*shorter than it was made.*truncate"):
        settle(queue.read(Extent(0, 64 * KIB, 64 * KIB), tensors(64 * KIB), "chunk"))


@QUEUES
def test_a_call_that_moves_nothing_raises_instead_of_looping(
    kind: str, swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor
) -> None:
    queue = queues(swap(MIB), kind, OsFunctions(pwritev=lambda *_: 0))
    with pytest.raises(TransferError, match="moved 0 bytes"):
        settle(queue.write(Extent(0, 0, 4 * KIB), tensors(4 * KIB), "chunk"))


def test_a_failed_transfer_settles_only_when_none_of_its_requests_runs(
    swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes
) -> None:
    """Scenario: the second of two running requests fails; the first still writes into the staging buffer."""
    gate = Gate(os.preadv)

    def read(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        if offset:
            raise OSError(errno.EIO, "Input/output error")
        return gate(descriptor, views, offset)

    queue = queues(swap(MIB), os_functions=OsFunctions(preadv=read), depth=2)
    future = queue.read(Extent(0, 0, 512 * KIB), tensors(512 * KIB), "chunk")
    gate.entered.acquire()
    while lanes.failure is None:  # told at once, though the future must wait
        assert not future.done()
    assert not future.done()
    gate.open()
    with pytest.raises(TransferError):
        settle(future)
    assert gate.offsets == [0]  # and no further request was begun


@QUEUES
def test_neither_future_nor_error_keeps_memory_alive(
    kind: str, swap: MakeSwap, queues: MakeQueue, lanes: Lanes
) -> None:
    """Scenario: the session has failed; its regions must still be unmapped while the error is being shown."""

    def fail(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    ledger = Ledger({})
    queue = queues(swap(MIB), kind, OsFunctions(preadv=fail))
    region = Region(256 * KIB, owner="buffers", ledger=ledger)
    done = queue.write(Extent(0, 0, 256 * KIB), region.tensor, "good")
    lanes.wait(done, Reason.EXTENT_WRITTEN)
    failed = queue.read(Extent(0, 0, 256 * KIB), region.tensor, "bad")
    with pytest.raises(TransferError):
        settle(failed)
    assert lanes.failure is not None
    region.close()  # raises where a view is alive
    assert ledger.held(Tier.HOST) == 0


# --------------------------------------------------------------------------------------------------- refusing


@QUEUES
def test_what_cannot_be_a_transfer_raises_before_it_starts(
    kind: str, swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor
) -> None:
    queue = queues(swap(64 * KIB), kind)
    extent, tensor = Extent(0, 0, 8 * KIB), tensors(16 * KIB)
    for wrong, reason in (
        (tensor, "tensor has 16384 bytes"),
        (tensor[: 4 * KIB], "tensor has 4096 bytes"),
        (tensor[512 : 512 + 8 * KIB], "address must be a multiple"),
        (tensor[: 8 * KIB].view(torch.float32), "host bytes"),
        (tensor[::2], "contiguous"),
        (torch.empty(8 * KIB, dtype=torch.uint8, device="meta"), "host bytes"),
    ):
        for submit in (queue.read, queue.write):
            with pytest.raises(InternalError, match=reason):
                submit(extent, wrong, "chunk")
    with pytest.raises(InternalError, match="ends behind"):
        queue.read(Extent(0, 60 * KIB, 8 * KIB), tensor[: 8 * KIB], "chunk")


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"request_bytes": 0}, {"request_bytes": 5000}])
def test_depths_and_request_sizes_that_make_no_queue_raise(
    wrong: dict[str, int],
) -> None:
    with pytest.raises(InternalError):
        QueueOptions(**wrong)


# ---------------------------------------------------------------------------------------------- order and depth


def test_no_more_than_depth_requests_run_at_once(
    swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes
) -> None:
    lock, running, most = threading.Lock(), [0], [0]

    def counted(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        num_read = os.preadv(descriptor, views, offset)
        with lock:
            running[0] -= 1
        return num_read

    queue = queues(swap(MIB), os_functions=OsFunctions(preadv=counted), depth=3, request_bytes=4 * KIB)
    futures = [queue.read(Extent(0, 0, 128 * KIB), tensors(128 * KIB), f"{i}") for i in range(4)]
    for future in futures:
        lanes.wait(future, Reason.READ)
    assert 1 <= most[0] <= 3


def test_reads_go_before_waiting_writes_but_do_not_starve_them(
    swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes
) -> None:
    """Scenario: one thread, held by a first read, while writes and then reads queue up behind it."""
    order: list[str] = []
    gate = Gate(os.preadv)

    def read(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        order.append("r")
        return gate(descriptor, views, offset)

    def write(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        order.append("w")
        return os.pwritev(descriptor, views, offset)

    queue = queues(swap(MIB), os_functions=OsFunctions(preadv=read, pwritev=write), depth=1)
    extent = Extent(0, 0, 4 * KIB)
    futures = [queue.read(extent, tensors(4 * KIB), "first")]
    gate.entered.acquire()
    futures += [queue.write(Extent(0, 64 * KIB, 4 * KIB), tensors(4 * KIB), f"write {i}") for i in range(3)]
    futures += [queue.read(extent, tensors(4 * KIB), f"read {i}") for i in range(3 * READS_IN_ROW)]
    # A callback of the loop runs after all enqueued before it: only then may the first read end.
    queue._loop.call_soon_threadsafe(gate.open)
    for future in futures:
        lanes.wait(future, Reason.READ)
    assert "".join(order) == "r" + ("r" * READS_IN_ROW + "w") * 3


def test_transfers_of_one_direction_start_in_the_order_of_submission(
    swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes
) -> None:
    gate = Gate(os.preadv)
    gate.open()
    queue = queues(swap(MIB), os_functions=OsFunctions(preadv=gate), depth=1, request_bytes=4 * KIB)
    starts = [512 * KIB, 0, 128 * KIB]
    futures = [queue.read(Extent(0, start, 12 * KIB), tensors(12 * KIB), "chunk") for start in starts]
    for future in futures:
        lanes.wait(future, Reason.READ)
    assert gate.offsets == [start + step * 4 * KIB for start in starts for step in range(3)]


# ------------------------------------------------------------------------------------------ deadlines and close


def test_a_stalled_transfer_is_named_by_the_deadline(
    swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes
) -> None:
    gate = Gate(os.pwritev)
    files = swap(MIB)
    queue = queues(files, os_functions=OsFunctions(pwritev=gate))
    future = queue.write(Extent(0, 8 * KIB, 4 * KIB), tensors(4 * KIB), "state of chunk 3")
    lanes.wait_timeout_s = 0.3
    with pytest.raises(WaitTimeoutError, match="state of chunk 3") as caught:
        lanes.wait(future, Reason.EXTENT_WRITTEN)
    assert f"write: state of chunk 3, {files.files[0]}, offset 8192, 0 of 4096 bytes" in str(caught.value)
    with pytest.raises(WaitTimeoutError, match="closing the disk queue"):
        queue.close()
    gate.open()
    queue.close()  # the disk has come back: now it ends
    assert not queue._thread.is_alive()


def test_progress_on_the_disk_moves_the_deadline(
    swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []
    monkeypatch.setattr(lanes, "progress", lambda: moved.append(1))
    queue = queues(swap(MIB), request_bytes=64 * KIB)
    lanes.wait(queue.write(Extent(0, 0, 256 * KIB), tensors(256 * KIB), "chunk"), Reason.EXTENT_WRITTEN)
    assert len(moved) == 4


@QUEUES
def test_close_finishes_what_is_in_flight_and_then_refuses(
    kind: str, swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes, timeline: Timeline,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    gate = Gate(os.pwritev)
    files = swap(MIB)
    queue = queues(files, kind, OsFunctions(pwritev=gate), depth=2)
    source = fill(tensors(512 * KIB), rng)
    future = queue.write(Extent(0, 0, 512 * KIB), source, "chunk")
    gate.entered.acquire()
    closing = threading.Thread(target=queue.close)
    closing.start()
    assert not future.done()
    gate.open()
    closing.join()
    assert future.done()
    assert raw_bytes(files, Extent(0, 0, 512 * KIB)) == contents(source)
    with pytest.raises(SessionClosedError, match="closed"):
        queue.read(Extent(0, 0, 512 * KIB), source, "late")
    queue.close()
    assert lanes.describe() == []
    assert Reason.DRAIN in {reason for t in timeline.totals().values() for reason in t.waits_by_reason_s}


def test_close_after_a_failure_ends_too(swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor) -> None:
    def fail(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    for kind in ("io", "lanes"):
        queue = queues(swap(MIB), kind, OsFunctions(preadv=fail))
        futures = [queue.read(Extent(0, 0, 64 * KIB), tensors(64 * KIB), f"{i}") for i in range(5)]
        queue.close()
        for future in futures:
            with pytest.raises((TransferError, SessionFailedError)):
                settle(future)


def test_a_callback_that_raises_fails_the_session_but_not_the_queue(
    swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes
) -> None:
    gate = Gate(os.preadv)
    queue = queues(swap(MIB), os_functions=OsFunctions(preadv=gate))
    future = queue.read(Extent(0, 0, 4 * KIB), tensors(4 * KIB), "chunk")

    def broken() -> None:
        raise ZeroDivisionError("in a callback")

    future.when_done(broken)
    gate.open()
    queue.close()
    assert isinstance(lanes.failure, ZeroDivisionError)


@QUEUES
def test_the_tensor_lives_until_the_transfer_is_done(
    kind: str, swap: MakeSwap, queues: MakeQueue, lanes: Lanes
) -> None:
    gate = Gate(os.pwritev)
    files = swap(MIB)
    queue = queues(files, kind, OsFunctions(pwritev=gate))
    region = Region(4 * KIB, owner="buffer", ledger=Ledger({}))
    region.tensor.fill_(9)
    future = queue.write(Extent(0, 0, 4 * KIB), region.tensor, "chunk")
    gate.entered.acquire()
    with pytest.raises(InternalError, match="views of it are alive"):
        region.close()
    gate.open()
    lanes.wait(future, Reason.EXTENT_WRITTEN)
    assert raw_bytes(files, Extent(0, 0, 4 * KIB)) == b"\x09" * 4096


def test_a_forked_child_is_refused(swap: MakeSwap, queues: MakeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = queues(swap(MIB))
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(SessionClosedError, match="forked"):
            queue.read(Extent(0, 0, 0), torch.empty(0, dtype=torch.uint8), "chunk")


def test_without_asserts_everything_is_still_read_written_and_checked(tmp_path: Path) -> None:
    code = """
import errno, os, sys
from pathlib import Path
from offload.disk.io_queue import IoQueue
from offload.disk.layout import Extent
from offload.disk.swap_file import SwapFiles
from offload.disk.transfer import OsFunctions
from offload.errors import SessionFailedError, TransferError
from offload.concurrency.lanes import Lanes, Reason
from offload.memory.ledger import Ledger
from offload.memory.region import Region
from offload.concurrency.timeline import Timeline

lanes = Lanes(Timeline(), wait_timeout_s=30)
region, extent = Region(1 << 20, owner="x", ledger=Ledger({})), Extent(0, 0, 1 << 20)
with SwapFiles.create([Path(sys.argv[1])], run_id="o", rank=0, bytes_by_file=[1 << 20]) as files:
    queue = IoQueue(files, lanes=lanes)
    lanes.wait(queue.write(extent, region.tensor.fill_(5), "w"), Reason.EXTENT_WRITTEN)
    lanes.wait(queue.read(extent, region.tensor.fill_(0), "r"), Reason.READ)
    print(int(region.tensor.min()), __debug__)
    os.truncate(files.files[0].path, 0)
    try:
        lanes.wait(queue.read(extent, region.tensor, "r"), Reason.READ)
    except (TransferError, SessionFailedError) as error:
        print("checked" if "got 0" in str(error) else error)
    queue.close()
"""
    output, errors = start_python(code, str(tmp_path), options=("-O",)).communicate(timeout=100)
    assert output == "5 False\nchecked\n", errors
    assert list(tmp_path.iterdir()) == []


def settle(future: Future[None]) -> None:
    """The future's own outcome, also where the session has failed (then `Lanes.wait` may tell of that first)."""
    if not future.block(20):
        raise TimeoutError(future.name)
    future.result()


def test_the_table_of_system_calls_is_the_real_one_by_default() -> None:
    assert OsFunctions(os.preadv, os.pwritev) == REAL
