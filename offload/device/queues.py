"""The queues of a device that has streams and events: copies, collectives, and what the model computes.

Owns: the order of what is submitted to each stream, the marks in it, and the times of the work between two marks.
Does not: make streams or events (accelerator.py does, through `Streams`), or decide what is copied, or when.
Threads: `h2d`, `d2h` and `collective` may be fed from any lane; `compute` by the training thread and autograd's own.
One waiter thread per stream synchronises its events in order, so that no other thread has to.

Note [No record_stream]: a slot's memory is allocated under the h2d stream, so the allocator gives freed memory only to
what that stream does later; and the stream has been made to wait for the last reader (`after`) before the slot is
freed. So the next writer comes after the last reader, though no thread waits. `record_stream` would keep the memory
until the allocator happens to see an event passed: reserved memory would depend on timing and exceed the plan.

Note [Times]: work on a stream is timed by a pair of events around everything between two marks. A pair tells how long
it took; when it was, on the host's clock, is known exactly where the waiter had to wait for its end. Where the waiter
came late, the end is counted on from the last end that is known. So the two clocks do not drift apart.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from offload.concurrency.futures import Future
from offload.concurrency.lanes import COMPUTE_STREAM, Lane, Lanes, Reason
from offload.device.page_lock import Borders
from offload.errors import BudgetError, DeviceError, OffloadError
from offload.units import format_bytes


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
