"""The CPU as a device.

Owns: slots as ordinary memory, and copies that run on lanes. A real backend (a model larger than memory trains from
disk on the CPU), not a mock.
Does not: decide what is copied, or when (weights/, gradients/, optimizer/).
Threads: as in protocol.py.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Lanes, Reason, current_lane
from offload.device.protocol import CollectiveQueue, ComputeQueue, CopyQueue, Mark
from offload.errors import ConfigError

_memmove: Final = ctypes.memmove  # a ctypes call releases the GIL; Tensor.copy_ would start an OpenMP team per lane

HOST_MMAP_THRESHOLD_BYTES: Final = 4 * 1024 * 1024
"""Allocations of this size and more are mapped, and returned when freed. By default glibc raises its own threshold
with every freed slot, and keeps later ones in the heap of the thread that freed them: resident memory then exceeds
the budgets by a third (measured: 270 MiB over budgets of 696 MiB, against 45 MiB with this)."""

_M_MMAP_THRESHOLD: Final = -3  # malloc.h


def _return_freed_slots() -> None:
    """Set the threshold for this process; does nothing where the C library has no mallopt."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, HOST_MMAP_THRESHOLD_BYTES)


_HUGE_PAGE_BYTES: Final = 2 * 1024 * 1024
_MADV_HUGEPAGE: Final = 14  # asm-generic/mman-common.h
_madvise: Final = getattr(ctypes.CDLL(None), "madvise", None)


def _advise_huge_pages(address: int, num_bytes: int) -> None:
    """Ask for huge pages in a fresh slot, which is touched for the first time by the copy that follows: a page fault
    for every 4 KiB would make that copy three times slower (measured: 2.9 against 10.3 GB/s). A refusal costs nothing.
    """
    start = -(-address // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    length = (address + num_bytes) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES - start
    if _madvise is not None and length > 0:
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)


class HostMark:
    """A point in a lane."""

    __slots__ = ("_future",)

    def __init__(self, future: "Future[Any]") -> None:
        self._future = future

    @property
    def future(self) -> "Future[Any]":
        """Done once the lane has run everything before the point."""
        return self._future


class HostCopyQueue:
    """Copies between two parts of host memory, on a lane of their own."""

    def __init__(self, name: str, lanes: Lanes) -> None:
        self._name = name
        self._lanes = lanes
        self._lane = lanes.lane(name)
        self._last: Future[Any] = lanes.resolved(f"{name} begin")
        self._lock = threading.Lock()  # two lanes may feed one direction

    def after(self, mark: Mark, reason: Reason) -> None:
        """Nothing to wait for: on the host compute is the thread that submits, and what it submits comes later."""

    def copy(self, destination: Tensor, source: Tensor, name: str, *, crosses_link: bool = True) -> None:
        self._submit(lambda: self._copy(destination, source, name, crosses_link), name)

    def resize(self, flat: Tensor, num_bytes: int) -> None:
        self._submit(lambda: self._resize(flat, num_bytes), "resize")

    def record(self) -> Mark:
        return HostMark(self._last)

    def _submit(self, work: Callable[[], Any], name: str) -> None:
        with self._lock:
            self._last = self._lane.submit(work, f"{self._name} {name}")

    def _copy(self, destination: Tensor, source: Tensor, name: str, crosses_link: bool) -> None:
        self._lanes.declare(reads=[source], writes=[destination])
        start_s = time.perf_counter()
        _memmove(destination.data_ptr(), source.data_ptr(), destination.numel())
        lane = self._name if crosses_link else f"{self._name} local"
        self._lanes.timeline.add_work(lane, name, start_s, time.perf_counter(), destination.numel())

    def _resize(self, flat: Tensor, num_bytes: int) -> None:
        self._lanes.declare(writes=[flat])
        storage = flat.untyped_storage()
        storage.resize_(num_bytes)
        _advise_huge_pages(storage.data_ptr(), num_bytes)


class HostComputeQueue:
    """The thread that calls is the one that computes."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes

    def after(self, mark: Mark, reason: Reason) -> None:
        self._lanes.wait(mark.future, reason)

    def record(self) -> Mark:
        return HostMark(self._lanes.resolved(f"{current_lane()} mark"))


class HostCollectiveQueue(HostComputeQueue):
    """The calling thread runs the collective: the backends of the host return when it is over."""

    def run(self, work: Callable[[], Any], name: str, num_bytes: int) -> None:
        with self._lanes.timeline.work("collective", name, num_bytes):
            work()


class HostDevice:
    """CPU as the device."""

    is_host = True
    slots_share_a_block = False
    numa_node = -1

    def __init__(self, lanes: Lanes) -> None:
        _return_freed_slots()
        self.torch_device = torch.device("cpu")
        self.compute: ComputeQueue = HostComputeQueue(lanes)
        self.h2d: CopyQueue = HostCopyQueue("h2d", lanes)
        self.d2h: CopyQueue = HostCopyQueue("d2h", lanes)
        self.collective: CollectiveQueue = HostCollectiveQueue(lanes)

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def reserve_slots(self, num_bytes: int) -> None:
        """Nothing to have ready: a slot's memory is mapped when it is first touched."""

    def register(self, address: int, num_bytes: int) -> Callable[[], None]:
        return lambda: None  # nothing to lock: no DMA engine reads it

    def free_bytes(self) -> int:
        raise ConfigError(
            "device_memory is needed when the model computes on the CPU: there, device and host are the same memory. "
            "Give it as the part of it that weights and gradients in use may take, for example device_memory='2GiB'."
        )

    def close(self) -> None:
        """The lanes are closed by their owner."""
