"""The accelerator: its streams and events, page-locking, and the memory of its slots.

Owns: everything that is said to torch.cuda; the only file that names it.
Does not: order copies and computations on streams (queues.py), or know the host device (host.py).
Threads: as in protocol.py.

Note [Current streams]: which device and stream are current is a fact of each thread, and a new thread begins on device
0 and its default stream. So nothing here relies on it: every call enters our device and its stream. The device first:
torch leaves a stream by making the device before it current, and CUDA then gives the process a context there, half a
GiB of a device that other ranks train on; the guard of a device goes back without one. `compute` alone is whatever is
current in the thread that calls: the user's in the training thread, and in hooks of a backward the one that autograd
has set in its own thread.

Note [One slot more]: slots of several sizes are cut from one block, and a ring's worth of free bytes may lie in parts
that are each too small for the next slot. A block of the ring and one more of the largest slot was enough for every
order of use and every shape tried (tests/device/test_slot_memory.py); the ring alone was not, and grew by one or two
slots in the first steps.
"""

import contextlib
import ctypes
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from offload.concurrency.lanes import Lanes
from offload.device.page_lock import Borders, HostRegistration
from offload.device.queues import AcceleratorComputeQueue, AcceleratorQueue, named
from offload.errors import ConfigError, DeviceError
from offload.units import format_bytes

log = logging.getLogger("offload")


class Cuda:
    """`Streams` of one CUDA or ROCm device. No decisions here: this part cannot be run without one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with self.here():  # a pool belongs to the device that is current when it is made
            self._pool: Any = torch.cuda.MemPool()

    def here(self) -> "contextlib.AbstractContextManager[Any]":
        """The calling thread speaks to this device inside."""
        return torch.cuda.device(self._device)

    def new_stream(self) -> Any:
        return torch.cuda.Stream(self._device)

    def current_stream(self) -> Any:
        return torch.cuda.current_stream(self._device)

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        with self.here(), torch.cuda.stream(stream):  # in this order: Note [Current streams]
            yield

    def record(self, stream: Any, *, timed: bool) -> Any:
        # blocking: the waiter sleeps. By default it would spin, on a core that the optimizer's kernels need.
        event = torch.cuda.Event(enable_timing=timed, blocking=True)
        event.record(stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def slot_memory(self) -> "contextlib.AbstractContextManager[Any]":
        # Its own: memory that torch has cached for activations is of other sizes and under other streams.
        return torch.cuda.use_mem_pool(self._pool, self._device)

    def enter_thread(self) -> None:
        torch.cuda.set_device(self._device)

    def close(self) -> None:
        """Wait for the device; slot memory goes back to the driver as it is freed."""
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            # Kept for good: torch frees a pool in a C++ destructor. Of a device that is lost that fails, and what fails
            # there ends the process before anybody has read why.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._pool))
            raise
        self._pool = None


class AcceleratorDevice:
    """A GPU: CUDA, or ROCm by the same names."""

    is_host = False
    slots_share_a_block = True

    def __init__(self, device: torch.device, lanes: Lanes) -> None:
        if device.type != "cuda":
            raise ConfigError(f"device={str(device)!r} is not supported; use a CUDA or ROCm device, or device='cpu'.")
        index = device.index if device.index is not None else torch.cuda.current_device()
        if index >= torch.cuda.device_count():
            raise ConfigError(f"device='cuda:{index}' is not there; this process sees {torch.cuda.device_count()}.")
        self.torch_device = torch.device("cuda", index)
        with named(f"opening {self.torch_device}"):
            torch.cuda.init()
            self._streams = Cuda(self.torch_device)
            borders = Borders()
            self._registration = HostRegistration(torch.cuda.cudart(), borders)
            self.numa_node = _numa_node(self.torch_device)
            self.compute = AcceleratorComputeQueue(self._streams, lanes)
            self.h2d = AcceleratorQueue("h2d", self._streams, lanes, borders)
            self.d2h = AcceleratorQueue("d2h", self._streams, lanes, borders)
            self.collective = AcceleratorQueue("collective", self._streams, lanes, borders)

    def allocate(self, num_bytes: int) -> Tensor:
        with named(f"device memory for resident gradients and weights ({format_bytes(num_bytes)})"):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)

    def reserve_slots(self, num_bytes: int) -> None:
        # Freed at once: every slot is cut from this block, so that none asks the driver later, and what torch caches
        # for activations cannot take its place. Nor what it has cached by now: up to 2.11 at least it gives nothing
        # of that up for memory that a pool asks for (pytorch issue 175015), and free_bytes has counted it as free.
        torch.cuda.empty_cache()
        probe = torch.empty(0, dtype=torch.uint8, device=self.torch_device)
        self.h2d.resize(probe, num_bytes)
        self.h2d.resize(probe, 0)

    def register(self, address: int, num_bytes: int) -> Callable[[], None]:
        with self._streams.here():
            unlock = self._registration.lock(address, num_bytes, self._forget_error)
        return partial(self._unlock, unlock)

    def free_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        held = torch.cuda.memory_allocated(self.torch_device)
        cached = torch.cuda.memory_reserved(self.torch_device) - held  # torch gives it up where it is needed
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(self.torch_device)) - held
        return int(min(free + cached, allowed))

    def close(self) -> None:
        try:
            with named(f"closing {self.torch_device}"):
                self._streams.close()
        except DeviceError as error:  # no reason to leave the rest, swap files too: the next call to it fails as well
            log.warning("%s", error)

    def _unlock(self, unlock: Callable[[], None]) -> None:
        with self._streams.here():
            unlock()

    def _forget_error(self) -> None:
        """The runtime keeps the error of a refused call and would raise it at the next kernel, whosever it is."""
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self.torch_device)


def default_accelerator() -> torch.device | None:
    """The accelerator of this machine; None where there is none that is supported."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


PCI_DEVICES: Final = Path("/sys/bus/pci/devices")


def _numa_node(device: torch.device) -> int:
    """Of the PCI slot of a CUDA device, as sysfs tells; -1 where it does not."""
    properties = torch.cuda.get_device_properties(device)
    try:
        domain, bus, slot = (getattr(properties, f"pci_{part}_id") for part in ("domain", "bus", "device"))
        return int((PCI_DEVICES / f"{domain:04x}:{bus:02x}:{slot:02x}.0" / "numa_node").read_text())
    except (AttributeError, OSError, ValueError):  # another build of torch, or a machine that hides its slots
        return -1
