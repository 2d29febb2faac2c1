"""What disks do to a run: the waiting thread gets an error soon, that names what it wanted and got; nothing hangs."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from offload.concurrency.lanes import Lanes, Reason
from offload.disk.io_queue import TransferQueue
from offload.disk.layout import Extent
from offload.disk.probe import free_bytes
from offload.disk.swap_file import SwapFile, SwapFiles
from offload.disk.transfer import OsFunctions
from offload.errors import DiskFullError, SessionFailedError, TransferError, WaitTimeoutError
from offload.units import KIB, MIB
from tests.doubles.small_disk import file_system_of

SOON_S = 5.0

MakeQueue = Callable[..., TransferQueue]
MakeSwap = Callable[..., SwapFiles]
MakeTensor = Callable[[int], torch.Tensor]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    with file_system_of(4 * MIB, folder) as mounted:
        yield mounted


class Stall:
    """A system call that does not return before `resume`."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._resumed = threading.Event()

    def __call__(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        self.entered.set()
        if not self._resumed.wait(30):
            raise TimeoutError("the test never ended the stall")
        return sum(len(view) for view in views)

    def resume(self) -> None:
        self._resumed.set()


# --------------------------------------------------------------------------------------------------- full disk


def test_a_small_disk_is_found_full_before_the_run(small_disk: Path) -> None:
    free = free_bytes(small_disk)
    with pytest.raises(DiskFullError, match=rf"{small_disk}: the swap files need {64 * MIB} bytes .*free are {free} "):
        SwapFiles.create([small_disk], run_id="a", rank=0, bytes_by_file=[64 * MIB])
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_another_program_fills_while_files_are_made_leaves_nothing(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenario: the space is free when asked for and gone when taken."""
    original = os.posix_fallocate

    def filled_meanwhile(descriptor: int, offset: int, num_bytes: int) -> None:
        (small_disk / "other").write_bytes(bytes(3 * MIB))
        original(descriptor, offset, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", filled_meanwhile)
    with pytest.raises(DiskFullError, match=f"need {2 * MIB} bytes"):
        SwapFiles.create([small_disk], run_id="a", rank=0, bytes_by_file=[2 * MIB])
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_a_write_to_a_really_full_disk_is_told_and_fails_the_session(
    small_disk: Path, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes
) -> None:
    """Scenario: somebody has punched the preallocated file and filled the disk."""
    with SwapFiles.create([small_disk], run_id="a", rank=0, bytes_by_file=[2 * MIB]) as files:
        os.truncate(files.files[0].path, 0)
        with (small_disk / "other").open("wb") as other, pytest.raises(OSError, match="No space"):
            other.write(bytes(8 * MIB))
        queue = queues(files)
        start_s = time.perf_counter()
        with pytest.raises((TransferError, SessionFailedError)):
            lanes.wait(queue.write(Extent(0, 0, MIB), tensors(MIB), "state 7"), Reason.EXTENT_WRITTEN)
        assert time.perf_counter() - start_s < SOON_S
        assert isinstance(lanes.failure, TransferError)
        assert lanes.failure.errno == errno.ENOSPC
        for part in ("write of state 7", str(files.files[0]), "wanted 65536 bytes at offset", "got 0", "No space"):
            assert part in str(lanes.failure)
        queue.close()


def test_the_kernels_own_full_device_is_told(queues: MakeQueue, tensors: MakeTensor, lanes: Lanes) -> None:
    descriptor = os.open("/dev/full", os.O_RDWR)
    full = SwapFile(
        folder=Path("/dev"), rank=0, descriptor=descriptor, num_bytes=MIB, mode="buffered", path=Path("/dev/full"),
        is_named=True,
    )  # fmt: skip
    files = SwapFiles([full], ExitStack())
    queue = queues(files)
    with pytest.raises((TransferError, SessionFailedError)):
        lanes.wait(queue.write(Extent(0, 0, MIB), tensors(MIB), "state 7"), Reason.EXTENT_WRITTEN)
    assert isinstance(lanes.failure, TransferError)
    assert lanes.failure.errno == errno.ENOSPC
    queue.close()
    os.close(descriptor)


# --------------------------------------------------------------------------------------------- errors and stalls


@pytest.mark.parametrize("direction", ["read", "write"])
def test_an_error_reaches_a_thread_that_waits_for_something_else(
    direction: str, swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes
) -> None:
    """Scenario: one direction stalls for good, the other gets EIO; the training thread waits for the stalled one."""
    stall = Stall()

    def fail(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    functions = (
        OsFunctions(preadv=fail, pwritev=stall) if direction == "read" else OsFunctions(preadv=stall, pwritev=fail)
    )
    queue = queues(swap(MIB), os_functions=functions)
    other = "write" if direction == "read" else "read"
    waited_for = getattr(queue, other)(Extent(0, 0, 64 * KIB), tensors(64 * KIB), "stalled")
    stall.entered.wait()
    start_s = time.perf_counter()
    getattr(queue, direction)(Extent(0, 128 * KIB, 64 * KIB), tensors(64 * KIB), "state 7")
    with pytest.raises(SessionFailedError, match=rf"{direction} of state 7 .*offset 131072, got 0: .*errno 5"):
        lanes.wait(waited_for, Reason.READ)
    assert time.perf_counter() - start_s < SOON_S
    stall.resume()


def test_a_stalled_device_is_told_at_the_deadline_with_all_that_is_in_flight(
    swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes
) -> None:
    stall = Stall()
    files = swap(4 * MIB)
    queue = queues(files, os_functions=OsFunctions(preadv=stall), depth=2)
    futures = [queue.read(Extent(0, i * MIB, 64 * KIB), tensors(64 * KIB), f"state {i}") for i in range(3)]
    lanes.wait_timeout_s = 0.4
    start_s = time.perf_counter()
    with pytest.raises(WaitTimeoutError) as told:
        lanes.wait(futures[0], Reason.READ)
    assert 0.4 <= time.perf_counter() - start_s < 0.4 + SOON_S
    for i in range(3):
        assert f"read: state {i}, {files.files[0]}, offset {i * MIB}, 0 of 65536 bytes" in str(told.value)
    stall.resume()
    queue.close()
    with pytest.raises(SessionFailedError):  # it waited its turn while the session failed: never begun
        futures[2].result()


def test_a_file_truncated_during_the_run_is_told_at_the_next_read(
    swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes
) -> None:
    files = swap(MIB)
    queue = queues(files)
    lanes.wait(queue.write(Extent(0, 0, MIB), tensors(MIB), "state 7"), Reason.EXTENT_WRITTEN)
    os.truncate(files.files[0].path, 300 * KIB)
    start_s = time.perf_counter()
    with pytest.raises((TransferError, SessionFailedError)):
        lanes.wait(queue.read(Extent(0, 0, MIB), tensors(MIB), "state 7"), Reason.READ)
    assert time.perf_counter() - start_s < SOON_S
    assert isinstance(lanes.failure, TransferError)
    for part in (str(files.files[0]), "wanted 65536 bytes at offset", "shorter than it was made"):
        assert part in str(lanes.failure)


@pytest.mark.usefixtures("named")
def test_a_removed_file_still_serves_its_own_run(
    swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes
) -> None:
    """Scenario: somebody cleans up by hand during a run."""
    files = swap(MIB)
    files.files[0].path.unlink()
    queue, destination = queues(files), tensors(MIB)
    lanes.wait(queue.write(Extent(0, 0, MIB), tensors(MIB).fill_(7), "state 7"), Reason.EXTENT_WRITTEN)
    lanes.wait(queue.read(Extent(0, 0, MIB), destination, "state 7"), Reason.READ)
    assert destination.eq(7).all()
