"""The device that computes, and the two directions of the link to it.

Owns: streams, events, page-locking; the only file that names torch.cuda or torch.accelerator.
Does not: decide what is copied, or when (weights/, gradients/, optimizer/).
Threads: `h2d` and `d2h` may be fed from any lane; `compute` belongs to the training thread and autograd's own.

`HostDevice` runs the same code on CPU: slots are ordinary memory and copies run on lanes. It is a real backend (a
model larger than memory trains from disk on CPU), not a mock. `AcceleratorDevice` issues copies on streams.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

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


class Device(Protocol):
    """A device and its link."""

    torch_device: torch.device
    is_host: bool
    """Kernels of the host can address its memory."""
    numa_node: int
    """Of the host memory that is nearest; -1 where none is."""
    compute: ComputeQueue
    h2d: CopyQueue
    d2h: CopyQueue

    def allocate(self, num_bytes: int) -> Tensor:
        """uint8 memory on the device."""

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


class HostDevice:
    """CPU as the device."""

    is_host = True
    numa_node = -1

    def __init__(self, lanes: Lanes) -> None:
        _return_freed_slots()
        self.torch_device = torch.device("cpu")
        self.compute: ComputeQueue = HostComputeQueue(lanes)
        self.h2d: CopyQueue = HostCopyQueue("h2d", lanes)
        self.d2h: CopyQueue = HostCopyQueue("d2h", lanes)

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def register(self, address: int, num_bytes: int) -> Callable[[], None]:
        return lambda: None  # nothing to lock: no DMA engine reads it

    def free_bytes(self) -> int:
        raise ConfigError(
            "device_memory is needed when the model computes on the CPU: there, device and host are the same memory. "
            "Give it as the part of it that weights and gradients in use may take, for example device_memory='2GiB'."
        )

    def close(self) -> None:
        """The lanes are closed by their owner."""


# -------------------------------------------------------------------------------------------------- accelerator


class AcceleratorMark:
    """An event on a stream."""

    __slots__ = ("_event", "_lanes", "_promise", "_waiter")

    def __init__(self, event: Any, waiter: Any, lanes: Lanes) -> None:
        self._event = event
        self._waiter = waiter
        self._lanes = lanes
        self._promise: Promise[Any] | None = None

    @property
    def event(self) -> Any:
        """The torch event."""
        return self._event

    @property
    def promise(self) -> "Promise[Any]":
        if self._promise is None:
            # One thread per direction waits for events in order, so that no other thread has to.
            self._promise = self._waiter.submit(self._event.synchronize, "event")
        return self._promise


class AcceleratorQueue:
    """A stream: of copies, or (stream None) whatever stream the calling thread computes on."""

    def __init__(self, name: str, device: torch.device, lanes: Lanes, *, own_stream: bool) -> None:
        self._name = name
        self._device = device
        self._lanes = lanes
        self._stream = torch.Stream(device) if own_stream else None
        self._waiter = lanes.lane(f"{name} waiter")

    def after(self, mark: Mark, reason: Reason) -> None:
        assert isinstance(mark, AcceleratorMark)
        self._current().wait_event(mark.event)

    def copy(self, destination: Tensor, source: Tensor, name: str, *, crosses_link: bool = True) -> None:
        now_s = time.perf_counter()
        with self._current():
            destination.copy_(source, non_blocking=True)
        lane = self._name if crosses_link else f"{self._name} local"
        self._lanes.timeline.add_work(lane, name, now_s, now_s, destination.numel())

    def resize(self, flat: Tensor, num_bytes: int) -> None:
        # Under this stream, so that the allocator orders the block's next use after the copies and waits of this one.
        with self._current():
            flat.untyped_storage().resize_(num_bytes)

    def record(self) -> Mark:
        return AcceleratorMark(self._current().record_event(), self._waiter, self._lanes)

    def _current(self) -> Any:
        return self._stream if self._stream is not None else torch.accelerator.current_stream(self._device)


class AcceleratorDevice:
    """A GPU, by torch.accelerator; page-locking by the CUDA runtime."""

    is_host = False

    def __init__(self, device: torch.device, lanes: Lanes) -> None:
        index = device.index if device.index is not None else torch.accelerator.current_device_index()
        self.torch_device = torch.device(device.type, index)
        self.numa_node = _numa_node(self.torch_device)
        self.compute: ComputeQueue = AcceleratorQueue("compute", self.torch_device, lanes, own_stream=False)
        self.h2d: CopyQueue = AcceleratorQueue("h2d", self.torch_device, lanes, own_stream=True)
        self.d2h: CopyQueue = AcceleratorQueue("d2h", self.torch_device, lanes, own_stream=True)

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)

    def register(self, address: int, num_bytes: int) -> Callable[[], None]:
        if self.torch_device.type != "cuda" or num_bytes == 0:
            return lambda: None
        runtime = torch.cuda.cudart()
        code = int(runtime.cudaHostRegister(address, num_bytes, 0))
        if code != 0:
            raise ConfigError(
                f"page-locking {num_bytes} bytes of host memory failed with CUDA error {code}; lower host_memory, "
                "or raise the limit on locked memory (ulimit -l) of this container."
            )
        return lambda: runtime.cudaHostUnregister(address)

    def free_bytes(self) -> int:
        free, _ = torch.accelerator.get_memory_info(self.torch_device)
        return int(free)

    def close(self) -> None:
        torch.accelerator.synchronize(self.torch_device)


PCI_DEVICES: Final = Path("/sys/bus/pci/devices")


def _numa_node(device: torch.device) -> int:
    """Of the PCI slot of a CUDA device, as sysfs tells; -1 where it does not."""
    if device.type != "cuda":
        return -1
    properties = torch.cuda.get_device_properties(device)
    try:
        domain, bus, slot = (getattr(properties, f"pci_{part}_id") for part in ("domain", "bus", "device"))
        return int((PCI_DEVICES / f"{domain:04x}:{bus:02x}:{slot:02x}.0" / "numa_node").read_text())
    except (AttributeError, OSError, ValueError):  # another build of torch, or a machine that hides its slots
        return -1


def make_device(device: "torch.device | str | None", lanes: Lanes) -> Device:
    """The device of this name; by default the accelerator where there is one, else the CPU."""
    if device is None:
        device = torch.accelerator.current_accelerator() or "cpu"
    chosen = torch.device(device)
    if chosen.type == "cpu":
        return HostDevice(lanes)
    if not torch.accelerator.is_available():
        raise ConfigError(f"device={device!r} was asked for and torch finds no accelerator; use device='cpu'.")
    return AcceleratorDevice(chosen, lanes)
