"""Wrong bytes never pass: what is read is what was written to that extent, or an error says where it is not."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from offload.concurrency.lanes import Lanes, Reason
from offload.disk.checksums import Checksums
from offload.disk.io_queue import IoQueue, QueueOptions
from offload.disk.layout import Extent
from offload.disk.swap_file import SwapFiles
from offload.disk.transfer import OsFunctions
from offload.errors import DiskCorruptionError, InternalError
from offload.memory.ledger import Ledger
from offload.memory.region import Region
from offload.units import KIB, MIB

MakeSwap = Callable[..., SwapFiles]
MakeTensor = Callable[[int], torch.Tensor]
EXTENT = Extent(0, 64 * KIB, 300 * KIB)


def flip_a_bit(path: Path, offset: int) -> None:
    with path.open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 4]), offset)


def fill(tensor: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    tensor.numpy()[:] = rng.integers(0, 256, tensor.numel(), dtype=np.uint8)
    return tensor


def checked(files: SwapFiles, lanes: Lanes, os_functions: OsFunctions | None = None) -> IoQueue:
    return IoQueue(
        files, lanes=lanes, options=QueueOptions(depth=3, request_bytes=64 * KIB), checksums=Checksums.of(files),
        **({} if os_functions is None else {"os_functions": os_functions}),
    )  # fmt: skip


def write_and_read(queue: IoQueue, lanes: Lanes, source: torch.Tensor, destination: torch.Tensor) -> None:
    lanes.wait(queue.write(EXTENT, source, "state 7"), Reason.EXTENT_WRITTEN)
    lanes.wait(queue.read(EXTENT, destination, "state 7"), Reason.READ)


def test_what_was_written_passes_also_when_written_again(
    folder: Path, swap: MakeSwap, tensors: MakeTensor, lanes: Lanes, rng: np.random.Generator
) -> None:
    queue = checked(swap(MIB, root=folder), lanes)
    for _ in range(3):
        source, destination = fill(tensors(EXTENT.num_bytes), rng), tensors(EXTENT.num_bytes)
        write_and_read(queue, lanes, source, destination)
        assert torch.equal(source, destination)
    queue.close()


@pytest.mark.parametrize("position", [0, 150 * KIB + 7, 300 * KIB - 1])
def test_a_bit_flipped_on_disk_is_an_error_that_names_everything(
    position: int, folder: Path, swap: MakeSwap, tensors: MakeTensor, lanes: Lanes, rng: np.random.Generator
) -> None:
    files = swap(MIB, root=folder)
    queue = checked(files, lanes)
    lanes.wait(queue.write(EXTENT, fill(tensors(EXTENT.num_bytes), rng), "state 7"), Reason.EXTENT_WRITTEN)
    flip_a_bit(files.files[0].path, EXTENT.offset + position)
    future = queue.read(EXTENT, tensors(EXTENT.num_bytes), "state 7")
    assert future.block(20)
    with pytest.raises(DiskCorruptionError, match=r"307200 bytes at offset 65536.*wanted checksum \w{16}, got") as told:
        future.result()
    assert str(files.files[0]) in str(told.value)
    assert lanes.failure is told.value
    queue.close()


def test_a_write_that_the_disk_lost_is_an_error(
    swap: MakeSwap, tensors: MakeTensor, lanes: Lanes, rng: np.random.Generator
) -> None:
    """Scenario: the second write of an extent is acknowledged and never done, so that the old bytes come back."""
    writes = []

    def forget(descriptor: int, views: list[memoryview], offset: int) -> int:
        writes.append(offset)
        if len(writes) > 5:  # of 60 KiB each
            return sum(len(view) for view in views)
        return os.pwritev(descriptor, views, offset)

    queue = checked(swap(MIB), lanes, OsFunctions(pwritev=forget))
    source, destination = fill(tensors(EXTENT.num_bytes), rng), tensors(EXTENT.num_bytes)
    write_and_read(queue, lanes, source, destination)
    future = queue.write(EXTENT, fill(source, rng), "state 7")
    lanes.wait(future, Reason.EXTENT_WRITTEN)
    future = queue.read(EXTENT, destination, "state 7")
    assert future.block(20)
    with pytest.raises(DiskCorruptionError):
        future.result()
    queue.close()


def test_the_error_keeps_no_memory_alive(swap: MakeSwap, lanes: Lanes) -> None:
    files = swap(MIB)
    queue = checked(files, lanes)
    region = Region(EXTENT.num_bytes, owner="buffers", ledger=Ledger({}))
    lanes.wait(queue.write(EXTENT, region.tensor.fill_(3), "state 7"), Reason.EXTENT_WRITTEN)
    flip_a_bit(files.files[0].path, EXTENT.offset)
    future = queue.read(EXTENT, region.tensor, "state 7")
    assert future.block(20)
    queue.close()
    assert isinstance(lanes.failure, DiskCorruptionError)
    region.close()  # raises where a view is alive


def test_the_table_alone_tells_what_was_recorded(swap: MakeSwap, tensors: MakeTensor, rng: np.random.Generator) -> None:
    files = swap(MIB, MIB)
    table = Checksums.of(files)
    buffer = fill(tensors(EXTENT.num_bytes), rng)
    table.record(EXTENT, buffer)
    table.verify(EXTENT, buffer)
    with pytest.raises(InternalError, match=r"offset 65536 .*never written"):
        table.verify(Extent(1, EXTENT.offset, EXTENT.num_bytes), buffer)
    buffer[17] ^= 1
    with pytest.raises(DiskCorruptionError, match=str(files.files[0])):
        table.verify(EXTENT, buffer)


def test_nothing_is_checked_without_a_table(
    swap: MakeSwap, tensors: MakeTensor, lanes: Lanes, queues: Callable[..., IoQueue]
) -> None:
    files = swap(MIB)
    queue, destination = queues(files), tensors(EXTENT.num_bytes)
    lanes.wait(queue.write(EXTENT, tensors(EXTENT.num_bytes), "state 7"), Reason.EXTENT_WRITTEN)
    flip_a_bit(files.files[0].path, EXTENT.offset)
    lanes.wait(queue.read(EXTENT, destination, "state 7"), Reason.READ)
    assert destination[0] == 4
