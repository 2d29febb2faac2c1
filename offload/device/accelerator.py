"""The accelerator: its streams and events, page-locking, and the memory of its slots.

Owns: everything that is said to torch.cuda; the only file that names it, torch.accelerator, streams or events.
Does not: decide what is copied, or when (weights/, gradients/, optimizer/), or know the host device (device.py).
Threads: `h2d`, `d2h` and `collective` may be fed from any lane; `compute` by the training thread and autograd's own.
One waiter thread per stream synchronises its events in order, so that no other thread has to.

Note [Current streams]: which device and stream are current is a fact of each thread, and a new thread begins on device
0 and its default stream. So nothing here relies on it: every call enters our device and its stream. The device first:
torch leaves a stream by making the device before it current, and CUDA then gives the process a context there, half a
GiB of a device that other ranks train on; the guard of a device goes back without one. `compute` alone is whatever is
current in the thread that calls: the user's in the training thread, and in hooks of a backward the one that autograd
has set in its own thread.

Note [No record_stream]: a slot's memory is allocated under the h2d stream, so the allocator lends freed memory only to
what that stream does later; and the stream has been made to wait for the last reader (`after`) before the slot is
freed. So the next writer comes after the last reader, though no thread waits. `record_stream` would keep the memory
until the allocator happens to see an event passed: reserved memory would depend on timing and exceed the plan.

Note [One slot more]: slots of several sizes are cut from one block, and a ring's worth of free bytes may lie in parts
that are each too small for the next slot. A block of the ring and one more of the largest slot was enough for every
order of use and every shape tried (tests/device/test_slot_memory.py); the ring alone was not, and grew by one or two
slots in the first steps.

Note [Times]: work on a stream is timed by a pair of events around everything between two marks. A pair tells how long
it took; when it was, on the host's clock, is known exactly where the waiter had to wait for its end. Where the waiter
came late, the end is counted on from the last end that is known. So the two clocks do not drift apart.
"""

import contextlib
import ctypes
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from offload.concurrency.futures import Future
from offload.concurrency.lanes import COMPUTE_STREAM, Lane, Lanes, Reason
from offload.device.page_lock import Borders, HostRegistration
from offload.errors import BudgetError, ConfigError, DeviceError, OffloadError
from offload.units import format_bytes

log = logging.getLogger("offload")


class Streams(Protocol):
    """What a queue needs of the device; tests bring one without a device."""

    def new_stream(self) -> Any:
        """A stream of our own."""

    def current_stream(self) -> Any:
        """That of the calling thread."""

    def on(self, stream: Any) -> "contextlib.AbstractContextManager[Any]":
        """What the calling thread does inside is submitted to `stream`."""

    def record(self, stream: Any, *, timed: bool) -> Any:
        """A new event after everything submitted to `stream`."""

    def wait(self, stream: Any, event: Any) -> None:
        """What is submitted to `stream` from now on starts after `event`."""

    def slot_memory(self) -> "contextlib.AbstractContextManager[Any]":
        """What the calling thread allocates inside comes from the slots' own memory."""

    def enter_thread(self) -> None:
        """The calling thread will synchronise events of this device."""


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


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """A failed call to the device says what it was for."""
    try:
        yield
    except OffloadError:
        raise
    except torch.OutOfMemoryError as error:
        raise BudgetError(
            f"{what}: the device has not that much memory left ({error}). Lower device_memory by what activations and "
            "other users of the device need, or free what they hold."
        ) from error
    except RuntimeError as error:
        raise DeviceError(
            f"{what}: {error}. Errors of a device are told late: set CUDA_LAUNCH_BLOCKING=1 to see which call it was. "
            "The process cannot use the device any more; start it again from a checkpoint."
        ) from error


class EventClock:
    """Host times of the events of one stream, asked for in order by its waiter. Note [Times]."""

    def __init__(self) -> None:
        self._known: tuple[Any, float] | None = None
        """The last end, and when it was."""

    def span(self, start: Any, stop: Any) -> tuple[float, float]:
        """Waits for both; `time.perf_counter()` seconds of both."""
        late = self._known is not None and stop.query()
        stop.synchronize()
        stop_s = time.perf_counter()
        if late and self._known is not None:
            known, known_s = self._known
            stop_s = min(stop_s, known_s + known.elapsed_time(stop) / 1e3)
        self._known = (stop, stop_s)
        return stop_s - start.elapsed_time(stop) / 1e3, stop_s


class AcceleratorMark:
    """An event on a stream."""

    __slots__ = ("_future", "_waiter", "event")

    def __init__(self, event: Any, waiter: Lane, future: "Future[Any] | None" = None) -> None:
        self.event = event
        self._waiter = waiter
        self._future = future

    @property
    def future(self) -> "Future[Any]":
        """Done once the waiter has seen the event."""
        if self._future is None:
            self._future = self._waiter.submit(partial(_reach, self.event, self._waiter.name), "event")
        return self._future


def _reach(event: Any, waiter: str) -> None:
    with named(f"{waiter}: waiting for the device"):
        event.synchronize()


@dataclass(slots=True)
class _Batch:
    """Work on a stream between two marks, timed as one."""

    lane: str
    name: str
    start: Any
    num_bytes: int = 0


class AcceleratorQueue:
    """A stream of our own: copies of one direction, or collectives."""

    def __init__(self, name: str, streams: Streams, lanes: Lanes, borders: Borders) -> None:
        self._name = name
        self._streams = streams
        self._timeline = lanes.timeline
        self._borders = borders
        self._stream = streams.new_stream()
        self._waiter = lanes.lane(f"{name} waiter")
        self._waiter.submit(streams.enter_thread, f"{name} waiter begins")
        self._clock = EventClock()
        self._lock = threading.Lock()  # several lanes may feed one direction
        self._open: _Batch | None = None
        self._last: AcceleratorMark | None = None
        """The point reached; None where something was submitted since."""

    def after(self, mark: Any, reason: Reason) -> None:
        with self._lock, named(f"{self._name}: waiting on the stream ({reason})"):
            self._close_batch()  # the wait is no part of the work before it
            self._last = None
            self._streams.wait(self._stream, mark.event)

    def copy(self, destination: Tensor, source: Tensor, name: str, *, crosses_link: bool = True) -> None:
        lane = self._name if crosses_link else f"{self._name} local"
        with self._lock, named(f"copy of {source.numel()} bytes ({self._name}, {name})"):
            self._begin(lane, name, source.numel())
            with self._streams.on(self._stream):
                for start, stop in self._cuts(destination, source):
                    destination[start:stop].copy_(source[start:stop], non_blocking=True)

    def resize(self, flat: Tensor, num_bytes: int) -> None:
        # Under this stream: Note [No record_stream].
        with (
            self._lock,
            named(f"memory of a slot ({format_bytes(num_bytes)})"),
            self._streams.on(self._stream),
            self._streams.slot_memory(),
        ):
            flat.untyped_storage().resize_(num_bytes)

    def run(self, work: Callable[[], Any], name: str, num_bytes: int) -> None:
        """A collective, or a pass over device memory: issued from the calling thread, ordered by the stream."""
        with self._lock, named(f"{self._name}: {name}"):
            # What moves nothing is no work of the link: in its seconds it would make the link look slower than it is.
            self._begin(self._name if num_bytes else f"{self._name} local", name, num_bytes)
            with self._streams.on(self._stream):
                work()

    def record(self) -> AcceleratorMark:
        with self._lock, named(f"{self._name}: recording an event"):
            self._close_batch()
            if self._last is None:
                event = self._streams.record(self._stream, timed=False)
                # At once: asked for later, it would stand behind all that has been submitted meanwhile.
                reached = self._waiter.submit(partial(_reach, event, self._waiter.name), "event")
                self._last = AcceleratorMark(event, self._waiter, reached)
            return self._last

    def _cuts(self, destination: Tensor, source: Tensor) -> list[tuple[int, int]]:
        host = source if source.device.type == "cpu" else destination
        return self._borders.cut(host.data_ptr(), host.numel())

    def _begin(self, lane: str, name: str, num_bytes: int) -> None:
        if self._open is None or (self._open.lane, self._open.name) != (lane, name):
            self._close_batch()
            self._open = _Batch(lane, name, self._streams.record(self._stream, timed=True))
        self._open.num_bytes += num_bytes
        self._last = None

    def _close_batch(self) -> None:
        batch, self._open = self._open, None
        if batch is not None:
            stop = self._streams.record(self._stream, timed=True)
            done = self._waiter.submit(partial(self._finish, batch, stop), f"{self._name} {batch.name}")
            self._last = AcceleratorMark(stop, self._waiter, done)

    def _finish(self, batch: _Batch, stop: Any) -> None:
        with named(f"{batch.lane} {batch.name} ({batch.num_bytes} bytes)"):
            start_s, stop_s = self._clock.span(batch.start, stop)
        self._timeline.add_work(batch.lane, batch.name, start_s, stop_s, batch.num_bytes)


class AcceleratorComputeQueue:
    """Whatever stream the calling thread computes on."""

    def __init__(self, streams: Streams, lanes: Lanes) -> None:
        self._streams = streams
        self._timeline = lanes.timeline
        self._waiter = lanes.lane("compute waiter")
        self._waiter.submit(streams.enter_thread, "compute waiter begins")
        self._clock = EventClock()

    def after(self, mark: Any, reason: Reason) -> None:
        with named(f"compute: waiting on the stream ({reason})"):
            stream = self._streams.current_stream()
            if mark.event.query():  # nothing to wait for, so nothing to time; the order is said all the same
                self._streams.wait(stream, mark.event)
                return
            start = self._streams.record(stream, timed=True)
            self._streams.wait(stream, mark.event)
            stop = self._streams.record(stream, timed=True)
            self._waiter.submit(partial(self._waited, reason, start, stop), f"compute waits ({reason})")

    def record(self) -> AcceleratorMark:
        with named("compute: recording an event"):
            event = self._streams.record(self._streams.current_stream(), timed=False)
            return AcceleratorMark(event, self._waiter)

    def _waited(self, reason: Reason, start: Any, stop: Any) -> None:
        with named(f"compute: waiting ({reason})"):
            start_s, stop_s = self._clock.span(start, stop)
        self._timeline.add_wait(COMPUTE_STREAM, reason, start_s, stop_s)


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
        with named(f"device memory for gradients and weights at home ({format_bytes(num_bytes)})"):
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
