"""Requests are as large as the disk wants them: large transfers are cut evenly, small neighbours are joined."""

import errno
import os
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Lanes, Reason
from offload.disk.io_queue import MAX_JOINED, IoQueue, QueueOptions, TransferQueue
from offload.disk.layout import Extent
from offload.disk.swap_file import SwapFiles
from offload.disk.transfer import OsFunctions
from offload.errors import TransferError
from offload.units import KIB, MIB

MakeQueue = Callable[..., TransferQueue]
MakeSwap = Callable[..., SwapFiles]
MakeTensor = Callable[[int], torch.Tensor]

FIRST = Extent(0, 3 * MIB, 4 * KIB)


class Calls:
    """Notes (offset, lengths) of each write but the first, which waits until `others` have all been enqueued."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, tuple[int, ...]]] = []
        self.opened = threading.Event()

    def __call__(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        if offset == FIRST.offset:
            self.opened.wait(20)
        else:
            self.calls.append((offset, tuple(len(view) for view in views)))
        return self.move(descriptor, views, offset)

    def move(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        return os.pwritev(descriptor, views, offset)


def write_all(
    queue: TransferQueue, calls: Calls, extents: Sequence[Extent], sources: Sequence[torch.Tensor], first: torch.Tensor
) -> list[Future[None]]:
    """Write all of them while the queue's only turn is taken, then wait; they are taken when all are there."""
    held = queue.write(FIRST, first, "first")
    futures = [queue.write(e, s, f"chunk {e.offset}") for e, s in zip(extents, sources, strict=True)]
    queue._loop.call_soon_threadsafe(calls.opened.set)  # type: ignore[attr-defined]
    for future in (held, *futures):
        assert future.block(20)
    return futures


def contents(files: SwapFiles, extent: Extent) -> bytes:
    with files.files[extent.file_index].path.open("rb") as file:
        file.seek(extent.offset)
        return file.read(extent.num_bytes)


def make(num: int, num_bytes: int, tensors: MakeTensor, rng: np.random.Generator) -> tuple[list[Extent], list]:
    extents = [Extent(0, i * num_bytes, num_bytes) for i in range(num)]
    sources = [tensors(num_bytes) for _ in extents]
    for source in sources:
        source.numpy()[:] = rng.integers(0, 256, num_bytes, dtype=np.uint8)
    return extents, sources


def test_small_neighbours_are_moved_by_one_call_of_at_most_a_request(
    swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, rng: np.random.Generator
) -> None:
    files, calls = swap(4 * MIB), Calls()
    queue = queues(files, os_functions=OsFunctions(pwritev=calls), depth=1, request_bytes=64 * KIB)
    extents, sources = make(5, 24 * KIB, tensors, rng)
    for future in write_all(queue, calls, extents, sources, tensors(4 * KIB)):
        future.result()
    two = (24 * KIB, 24 * KIB)
    assert calls.calls == [(0, two), (48 * KIB, two), (96 * KIB, (24 * KIB,))]
    assert [contents(files, extent) for extent in extents] == [source.numpy().tobytes() for source in sources]


def test_reads_of_neighbours_arrive_each_in_its_own_tensor(
    swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes, rng: np.random.Generator
) -> None:
    queue = queues(swap(4 * MIB), depth=1, request_bytes=256 * KIB)
    extents, sources = make(40, 12 * KIB, tensors, rng)
    destinations = [tensors(12 * KIB) for _ in extents]
    for future in [queue.write(e, s, "chunk") for e, s in zip(extents, sources, strict=True)]:
        lanes.wait(future, Reason.EXTENT_WRITTEN)
    for future in [queue.read(e, d, "chunk") for e, d in zip(extents, destinations, strict=True)]:
        lanes.wait(future, Reason.READ)
    assert all(torch.equal(s, d) for s, d in zip(sources, destinations, strict=True))


def test_requests_with_a_gap_or_in_another_file_are_not_joined(
    swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor
) -> None:
    calls = Calls()
    queue = queues(swap(4 * MIB, MIB), os_functions=OsFunctions(pwritev=calls), depth=1)
    extents = [Extent(0, 0, 4 * KIB), Extent(0, 8 * KIB, 4 * KIB), Extent(1, 12 * KIB, 4 * KIB), Extent(0, 4096, 4096)]
    for future in write_all(queue, calls, extents, [tensors(4 * KIB) for _ in extents], tensors(4 * KIB)):
        future.result()
    assert calls.calls == [(extent.offset, (4 * KIB,)) for extent in extents]


def test_one_call_takes_no_more_stretches_of_memory_than_the_kernel_does(
    swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, rng: np.random.Generator
) -> None:
    calls = Calls()
    queue = queues(swap(4 * MIB), os_functions=OsFunctions(pwritev=calls), depth=1, request_bytes=MIB)
    extents, sources = make(2 * MAX_JOINED, 4 * KIB, tensors, rng)
    for future in write_all(queue, calls, extents, sources, tensors(4 * KIB)):
        future.result()
    assert [len(lengths) for _, lengths in calls.calls] == [MAX_JOINED, MAX_JOINED]


@pytest.mark.parametrize("moved", [1, 4 * KIB, 30 * KIB, 48 * KIB])
def test_what_a_short_call_leaves_is_moved_request_by_request(
    moved: int, swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, rng: np.random.Generator
) -> None:
    class Short(Calls):
        def move(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            if len(views) == 1:
                return os.pwritev(descriptor, views, offset)
            joint = b"".join(views)[:moved]  # through the page cache: a direct call could not stop inside a page
            with files.files[0].path.open("r+b", buffering=0) as file:
                return os.pwrite(file.fileno(), joint, offset)

    files, calls = swap(4 * MIB), Short()
    queue = queues(files, os_functions=OsFunctions(pwritev=calls), depth=1, request_bytes=128 * KIB)
    extents, sources = make(3, 24 * KIB, tensors, rng)
    for future in write_all(queue, calls, extents, sources, tensors(4 * KIB)):
        future.result()
    assert [contents(files, extent) for extent in extents] == [source.numpy().tobytes() for source in sources]


def test_an_error_of_a_joined_call_names_the_transfer_it_belongs_to(
    swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor, lanes: Lanes, rng: np.random.Generator
) -> None:
    """Scenario: one bad sector in the middle of three neighbours."""

    class Bad(Calls):
        def move(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            if offset <= 30 * KIB < offset + sum(len(view) for view in views):
                raise OSError(errno.EIO, "Input/output error")
            return os.pwritev(descriptor, views, offset)

    calls = Bad()
    queue = queues(swap(4 * MIB), os_functions=OsFunctions(pwritev=calls), depth=1, request_bytes=128 * KIB)
    extents, sources = make(3, 24 * KIB, tensors, rng)
    first, second, _ = write_all(queue, calls, extents, sources, tensors(4 * KIB))
    first.result()
    with pytest.raises(TransferError, match=f"write of chunk 24576 .*wanted 24576 bytes at offset {24 * KIB}, got 0"):
        second.result()
    assert lanes.failure is not None
    assert "chunk 24576" in str(lanes.failure)


def test_large_transfers_are_cut_evenly(swap: MakeSwap, queues: MakeQueue, tensors: MakeTensor) -> None:
    calls = Calls()
    queue = queues(swap(4 * MIB), os_functions=OsFunctions(pwritev=calls), depth=1, request_bytes=64 * KIB)
    extents = [Extent(0, 0, 68 * KIB), Extent(0, MIB, 256 * KIB), Extent(0, 2 * MIB, 132 * KIB)]
    sources = [tensors(extent.num_bytes) for extent in extents]
    for future in write_all(queue, calls, extents, sources, tensors(4 * KIB)):
        future.result()
    sizes = [sum(lengths) // KIB for _, lengths in calls.calls]
    assert sizes == [36, 32, 64, 64, 64, 64, 44, 44, 44]


def test_writes_may_have_a_size_of_their_own(swap: MakeSwap, lanes: Lanes, tensors: MakeTensor) -> None:
    sizes: dict[str, list[int]] = {"read": [], "write": []}

    def noted(direction: str, call: Callable[..., int]) -> Callable[..., int]:
        def move(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            sizes[direction].append(sum(len(view) for view in views))
            return call(descriptor, views, offset)

        return move

    functions = OsFunctions(preadv=noted("read", os.preadv), pwritev=noted("write", os.pwritev))
    queue = IoQueue(
        swap(MIB), lanes=lanes, options=QueueOptions(request_bytes=64 * KIB, write_request_bytes=128 * KIB),
        os_functions=functions,
    )  # fmt: skip
    tensor = tensors(256 * KIB)
    lanes.wait(queue.write(Extent(0, 0, 256 * KIB), tensor, "chunk"), Reason.EXTENT_WRITTEN)
    lanes.wait(queue.read(Extent(0, 0, 256 * KIB), tensor, "chunk"), Reason.READ)
    queue.close()
    assert sizes == {"read": [64 * KIB] * 4, "write": [128 * KIB] * 2}
