"""The accelerator device itself: registration, order between streams, threads of autograd, memory of slots.

Every hazard is provoked by a kernel that keeps the device busy for a long time, so that what runs too early does.
"""

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offload.concurrency.lanes import Lanes, Reason
from offload.concurrency.timeline import Timeline
from offload.device.accelerator import AcceleratorDevice
from offload.errors import ConfigError
from offload.memory.ledger import Ledger
from offload.memory.region import Region
from offload.units import MIB

pytestmark = pytest.mark.gpu

LONG_CYCLES = 400_000_000
"""Of the device's clock: about a fifth of a second."""
POISON = 0xA5
SIZE = 8 * MIB


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    lanes = Lanes(Timeline(), wait_timeout_s=60.0)
    yield lanes
    lanes.close()


@pytest.fixture
def device(lanes: Lanes) -> Iterator[AcceleratorDevice]:
    device = AcceleratorDevice(torch.device("cuda"), lanes)
    yield device
    lanes.drain()
    device.close()


@pytest.fixture
def region(device: AcceleratorDevice) -> Iterator[Region]:
    with Region(4 * SIZE, owner="test", ledger=Ledger({}), register=device.register) as region:
        yield region


def slot(device: AcceleratorDevice, num_bytes: int = SIZE) -> torch.Tensor:
    """A flat without memory, as weights have it."""
    flat = torch.empty(num_bytes, dtype=torch.uint8, device=device.torch_device)
    flat.untyped_storage().resize_(0)
    return flat


# -------------------------------------------------------------------------------------------------- host memory


def test_a_region_is_page_locked_for_its_own_bytes_and_unlocked_at_close(device: AcceleratorDevice) -> None:
    region = Region(SIZE, owner="test", ledger=Ledger({}), register=device.register)
    address = region.address
    runtime = torch.cuda.cudart()
    assert region.tensor.is_pinned()
    assert int(runtime.cudaHostRegister(address, mmap.PAGESIZE, 0)) != 0, "it is registered already"
    device._forget_error()  # the next kernel of this thread would raise it
    region.close()
    again = Region(SIZE, owner="test", ledger=Ledger({}), register=device.register)
    again.close()


def test_a_refused_registration_is_named_and_leaves_no_error_behind(device: AcceleratorDevice) -> None:
    with pytest.raises(ConfigError, match=r"page-locking .* failed with CUDA error \d+ \(.+\)"):
        device.register(mmap.PAGESIZE, SIZE)  # nothing is mapped there
    assert torch.ones(4, device=device.torch_device).sum().item() == 4.0


def test_the_disk_reads_and_writes_registered_memory_directly(region: Region, tmp_path: Path) -> None:
    path = tmp_path / "swap"
    region.tensor[:SIZE].fill_(7)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        memory = memoryview(region.tensor.numpy())
        assert os.pwritev(descriptor, [memory[:SIZE]], 0) == SIZE
        assert os.preadv(descriptor, [memory[SIZE : 2 * SIZE]], 0) == SIZE
        memory.release()
    finally:
        os.close(descriptor)
    assert bool((region.tensor[SIZE : 2 * SIZE] == 7).all())


def test_copies_both_ways_are_timed_by_the_device(device: AcceleratorDevice, lanes: Lanes, region: Region) -> None:
    flat = device.allocate(SIZE)
    region.tensor[:SIZE].fill_(3)
    for _ in range(20):
        device.h2d.copy(flat, region.tensor[:SIZE], "weights")
    device.d2h.after(device.h2d.record(), Reason.GRADIENT_READY)
    device.d2h.copy(region.tensor[SIZE : 2 * SIZE], flat, "gradient")
    lanes.wait(device.d2h.record().future, Reason.GRADIENT_ON_HOST)
    lanes.drain()
    assert torch.equal(region.tensor[:SIZE], region.tensor[SIZE : 2 * SIZE])
    totals = lanes.timeline.totals()
    assert totals["h2d"].num_bytes == 20 * SIZE
    # Slower than a disk or faster than any link means that the wrong thing was timed.
    assert 1e9 < totals["h2d"].num_bytes / totals["h2d"].busy_s < 1e12


# -------------------------------------------------------------------------------------------------------- order


def test_a_gradient_is_not_read_before_it_has_offloaded(
    device: AcceleratorDevice, lanes: Lanes, region: Region
) -> None:
    host = region.tensor[:SIZE].fill_(POISON)
    gradient = device.allocate(SIZE).fill_(POISON)
    torch.cuda._sleep(LONG_CYCLES)
    gradient.fill_(9)
    device.d2h.after(device.compute.record(), Reason.GRADIENT_READY)
    device.d2h.copy(host, gradient, "gradient")
    offloaded = device.d2h.record()
    assert not offloaded.future.done()
    lanes.wait(offloaded.future, Reason.GRADIENT_ON_HOST)
    assert bool((host == 9).all())


def test_without_the_wait_a_gradient_is_read_too_early(device: AcceleratorDevice, lanes: Lanes, region: Region) -> None:
    """Scenario: the test above would pass on a device that runs everything in order. It does not."""
    host = region.tensor[:SIZE].fill_(0)
    gradient = device.allocate(SIZE).fill_(POISON)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_CYCLES)
    gradient.fill_(9)
    device.d2h.copy(host, gradient, "gradient")
    lanes.wait(device.d2h.record().future, Reason.GRADIENT_ON_HOST)
    assert bool((host == POISON).all())
    torch.cuda.synchronize()


def test_a_slot_is_not_overwritten_while_a_long_kernel_reads_it(
    device: AcceleratorDevice, lanes: Lanes, region: Region
) -> None:
    first, second = region.tensor[:SIZE].fill_(1), region.tensor[SIZE : 2 * SIZE].fill_(2)
    device.reserve_slots(SIZE)
    one, other = slot(device), slot(device)
    device.h2d.resize(one, SIZE)
    address = one.data_ptr()
    device.h2d.copy(one, first, "weights 1")
    device.compute.after(device.h2d.record(), Reason.WEIGHTS_ARRIVED)
    torch.cuda._sleep(LONG_CYCLES)
    total = one.sum(dtype=torch.int64)
    device.h2d.after(device.compute.record(), Reason.SLOT_RELEASED)
    device.h2d.resize(one, 0)
    device.h2d.resize(other, SIZE)
    assert other.data_ptr() == address, "the slot is lent again at once: no thread has waited"
    device.h2d.copy(other, second, "weights 2")
    device.compute.after(device.h2d.record(), Reason.WEIGHTS_ARRIVED)
    assert total.item() == SIZE
    assert other.sum(dtype=torch.int64).item() == 2 * SIZE


def test_slots_grow_under_the_side_stream_from_memory_of_their_own(device: AcceleratorDevice) -> None:
    sizes = [3 * SIZE, SIZE, 2 * SIZE, SIZE // 2]
    device.reserve_slots(4 * SIZE)
    flat_parameters = [slot(device, size) for size in sizes]
    reserved = torch.cuda.memory_reserved()
    for _ in range(250):
        for flat in flat_parameters[:2]:
            device.h2d.resize(flat, flat.numel())
        for flat in flat_parameters[:2]:
            device.h2d.resize(flat, 0)
        for flat in flat_parameters[2:]:
            device.h2d.resize(flat, flat.numel())
        for flat in flat_parameters[2:]:
            device.h2d.resize(flat, 0)
    assert torch.cuda.memory_reserved() == reserved
    mine = torch.empty(4 * SIZE, dtype=torch.uint8, device=device.torch_device)  # not from the slots' memory
    assert torch.cuda.memory_reserved() >= reserved + mine.numel()


def test_slot_memory_goes_back_to_the_driver_after_close(lanes: Lanes) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    device = AcceleratorDevice(torch.device("cuda"), lanes)
    device.reserve_slots(64 * MIB)
    assert torch.cuda.memory_reserved() >= before + 64 * MIB
    lanes.drain()
    device.close()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before


# ------------------------------------------------------------------------------------------------------ threads


def test_hooks_run_on_autograds_own_thread_under_the_stream_of_the_forward(device: AcceleratorDevice) -> None:
    seen: list[tuple[threading.Thread, int]] = []
    parameter = torch.nn.Parameter(torch.ones(8, device=device.torch_device))

    def hook(_: torch.Tensor) -> None:
        device.compute.record()
        seen.append((threading.current_thread(), torch.cuda.current_stream().cuda_stream))

    parameter.register_post_accumulate_grad_hook(hook)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        (parameter * 2).sum().backward()
    ((thread, under),) = seen
    assert thread is not threading.main_thread()
    assert under == stream.cuda_stream


def test_a_lane_of_another_thread_copies_on_this_device(
    device: AcceleratorDevice, lanes: Lanes, region: Region
) -> None:
    flat = device.allocate(SIZE)
    region.tensor[:SIZE].fill_(5)
    lane = lanes.lane("test")

    def copy() -> None:
        device.h2d.copy(flat, region.tensor[:SIZE], "weights")

    lanes.wait(lane.submit(copy, "copy"), Reason.FETCH_ISSUED)
    device.compute.after(device.h2d.record(), Reason.WEIGHTS_ARRIVED)
    assert flat.sum(dtype=torch.int64).item() == 5 * SIZE


def test_waiting_for_an_event_leaves_its_core_to_others(
    device: AcceleratorDevice, lanes: Lanes, region: Region
) -> None:
    torch.cuda.synchronize()
    clock = ctypes.CDLL(None).clock  # processor time of the whole process, in microseconds
    clock.restype = ctypes.c_long
    torch.cuda._sleep(5 * LONG_CYCLES)
    device.d2h.after(device.compute.record(), Reason.GRADIENT_READY)
    device.d2h.copy(region.tensor[:SIZE], device.allocate(SIZE), "gradient")
    before = clock()
    lanes.wait(device.d2h.record().future, Reason.GRADIENT_ON_HOST)
    assert (clock() - before) / 1e6 < 0.3, "a waiter that spins takes as long as it waits"
