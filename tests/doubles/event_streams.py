"""Streams that are not there: what a queue of the accelerator says to them is written down, events pass when told to.

Owns: a clock of the device that tests set; the record of calls; events that the waiters' threads really wait for.
Does not: run anything late (stream_device.py does, for whole runs): a copy is made at once.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any


class FakeEvent:
    """Passed at a time of the device's clock, once it is let pass."""

    def __init__(self, name: str, time_ms: float, timed: bool) -> None:
        self.name = name
        self.time_ms = time_ms
        self.timed = timed
        self.passed = threading.Event()

    def query(self) -> bool:
        return self.passed.is_set()

    def synchronize(self) -> None:
        assert self.passed.wait(20.0), f"nobody let {self.name} pass"

    def elapsed_time(self, other: "FakeEvent") -> float:
        assert self.timed
        assert other.timed
        assert self.query()
        assert other.query()
        return other.time_ms - self.time_ms


class FakeStreams:
    """See `offload.device.queues.Streams`."""

    def __init__(self, *, holds: bool = False) -> None:
        self.holds = holds
        """Events pass only when `let_pass` is called."""
        self.time_ms = 0.0
        self.calls: list[str] = []
        self.events: list[FakeEvent] = []
        self.fails: BaseException | None = None
        self._num_streams = 0
        self._current = threading.local()

    def new_stream(self) -> str:
        self._num_streams += 1
        return f"stream {self._num_streams}"

    def current_stream(self) -> str:
        return getattr(self._current, "stream", "default")

    @contextlib.contextmanager
    def on(self, stream: str) -> Iterator[None]:
        before, self._current.stream = self.current_stream(), stream
        self.calls.append(f"enter {stream}")
        try:
            if self.fails is not None:
                raise self.fails
            yield
        finally:
            self._current.stream = before
            self.calls.append(f"leave {stream}")

    def record(self, stream: str, *, timed: bool) -> FakeEvent:
        event = FakeEvent(f"event {len(self.events)}", self.time_ms, timed)
        self.events.append(event)
        self.calls.append(f"record {event.name} on {stream}")
        if not self.holds:
            event.passed.set()
        return event

    def wait(self, stream: str, event: FakeEvent) -> None:
        self.calls.append(f"{stream} waits for {event.name}")

    @contextlib.contextmanager
    def slot_memory(self) -> Iterator[None]:
        self.calls.append(f"slot memory under {self.current_stream()}")
        yield

    def enter_thread(self) -> None:
        pass

    def let_pass(self) -> None:
        """All events so far have passed."""
        for event in self.events:
            event.passed.set()


class FakeRuntime:
    """`cudaHostRegister` and its opposite; `refuses` is the number of the call that fails, from 0 on."""

    def __init__(self, *, refuses: int | None = None, unregister_code: int = 0) -> None:
        self.locked: dict[int, int] = {}
        self._refuses = refuses
        self._unregister_code = unregister_code
        self._num_calls = 0

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        number, self._num_calls = self._num_calls, self._num_calls + 1
        if number == self._refuses:
            return 2
        self.locked[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return self._unregister_code

    def cudaError(self, code: int) -> Any:
        return code

    def cudaGetErrorString(self, error: Any) -> str:
        return "out of memory"
