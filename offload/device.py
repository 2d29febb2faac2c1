"""The device that computes, and the two directions of the link to it.

Owns: what a device is (the protocols), the host as a device, and the choice between it and an accelerator.
Does not: decide what is copied, or when (weights/, gradients/, optimizer/); know streams or events (accelerator.py).
Threads: `h2d`, `d2h`, `collective` may be fed from any lane; `compute` belongs to the training thread and autograd's.

`HostDevice` runs the same code on CPU: slots are ordinary memory and copies run on lanes. It is a real backend (a
model larger than memory trains from disk on CPU), not a mock. `AcceleratorDevice` issues copies on streams.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from offload.accelerator import AcceleratorDevice
from offload.accelerator import default_accelerator as default_accelerator  # for who has no business in there
from offload.errors import ConfigError
from offload.lanes import Lanes, Promise, Reason, current_lane

_memmove: Final = ctypes.memmove  # a ctypes call releases the GIL; Tensor.copy_ would start an OpenMP team per lane


class Mark(Protocol):
    """A point in a stream: everything submitted before it is done once it is reached."""

    @property
    def promise(self) -> "Promise[Any]":
        """Done, on the host, once the point is reached."""


class CopyQueue(Protocol):
    """One direction of the link: copies in order of submission."""

    def after(self, mark: Mark, reason: Reason) -> None:
        """What is submitted from now on starts after `mark`, a point of the compute queue."""

    def copy(self, destination: Tensor, source: Tensor, name: str, *, crosses_link: bool = True) -> None:
        """Copy bytes (uint8, contiguous, equal length). Both must stay alive until a mark recorded later is reached."""

    def resize(self, flat: Tensor, num_bytes: int) -> None:
        """Give `flat`'s storage this many bytes; its contents are undefined."""

    def record(self) -> Mark:
        """The point after everything submitted so far."""


class ComputeQueue(Protocol):
    """Where the model computes."""

    def after(self, mark: Mark, reason: Reason) -> None:
        """What is computed from now on starts after `mark`."""

    def record(self) -> Mark:
        """The point after everything computed so far."""


class CollectiveQueue(Protocol):
    """Collectives between ranks, in order of submission: every rank submits the same ones in the same order."""

    def after(self, mark: Mark, reason: Reason) -> None:
        """What is run from now on starts after `mark`."""

    def run(self, work: Callable[[], Any], name: str, num_bytes: int) -> None:
        """Issue `work`, a collective of torch.distributed that moves `num_bytes` of this rank. Its tensors must stay
        alive until a mark recorded later is reached. On the host it runs in the calling thread and is over on return.
        """

    def record(self) -> Mark:
        """The point after everything run so far."""


class Device(Protocol):
    """A device and its link."""

    torch_device: torch.device
    is_host: bool
    """Kernels of the host can address its memory."""
    slots_share_a_block: bool
    """Slots are cut from one block of memory: it needs room for one more than are in use."""
    numa_node: int
    """Of the host memory that is nearest; -1 where none is."""

    @property
    def compute(self) -> ComputeQueue:
        """Where the model computes."""

    @property
    def h2d(self) -> CopyQueue:
        """Copies from the host."""

    @property
    def d2h(self) -> CopyQueue:
        """Copies to the host."""

    @property
    def collective(self) -> CollectiveQueue:
        """Collectives between ranks."""

    def allocate(self, num_bytes: int) -> Tensor:
        """uint8 memory on the device."""

    def reserve_slots(self, num_bytes: int) -> None:
        """Have this much ready for slots: the bytes of their ring, and on an accelerator one more of the largest, as
        memory is lent in blocks (accelerator.py, Note [One slot more]). Before the first fetch."""

    def register(self, address: int, num_bytes: int) -> Callable[[], None]:
        """Page-lock host memory for copies; returns what undoes it."""

    def free_bytes(self) -> int:
        """Bytes free on the device now."""

    def close(self) -> None:
        """Wait for everything submitted."""


# --------------------------------------------------------------------------------------------------------- host


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

    __slots__ = ("_promise",)

    def __init__(self, promise: "Promise[Any]") -> None:
        self._promise = promise

    @property
    def promise(self) -> "Promise[Any]":
        """Done once the lane has run everything before the point."""
        return self._promise


class HostCopyQueue:
    """Copies between two parts of host memory, on a lane of their own."""

    def __init__(self, name: str, lanes: Lanes) -> None:
        self._name = name
        self._lanes = lanes
        self._lane = lanes.lane(name)
        self._last: Promise[Any] = lanes.kept(f"{name} begin")
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
        self._lanes.wait(mark.promise, reason)

    def record(self) -> Mark:
        return HostMark(self._lanes.kept(f"{current_lane()} mark"))


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


# -------------------------------------------------------------------------------------------------- the choice


def make_device(device: "torch.device | str | None", lanes: Lanes) -> Device:
    """The device of this name; by default the accelerator where there is one, else the CPU."""
    if device is None:
        device = default_accelerator() or "cpu"
    chosen = torch.device(device)
    if chosen.type == "cpu":
        return HostDevice(lanes)
    if default_accelerator() is None:
        raise ConfigError(f"device={device!r} was asked for and torch finds no accelerator; use device='cpu'.")
    return AcceleratorDevice(chosen, lanes)
