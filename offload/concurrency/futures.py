"""Futures: what a unit of work on a lane resolves.

Owns: completion of one unit of work, its value or its error, and the callbacks that run then.
Does not: wait with a deadline (`Lanes.wait` does, the one way to wait).
Threads: a future is resolved by one thread, once; everything else may be called from any thread.
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from offload.errors import InternalError

T = TypeVar("T")


class Future(Generic[T]):
    """Completion of one unit of work; resolves or fails exactly once."""

    __slots__ = ("_callbacks", "_done", "_error", "_gate", "_lock", "_value", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._done = False
        self._gate: threading.Lock | None = None
        """Held until it is settled; made by the first thread that blocks: most futures have none."""
        self._lock = threading.Lock()
        self._value: T | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[], None]] | None = None

    def resolve(self, value: T | None = None) -> None:
        """Complete with a value and run the callbacks in this thread."""
        self._settle(value, None)

    def fail(self, error: BaseException) -> None:
        """Complete with an error, which every `result` raises."""
        self._settle(None, error)

    def done(self) -> bool:
        """Whether it has resolved or failed."""
        return self._done

    def block(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s`; only `Lanes.wait` calls this."""
        with self._lock:
            if self._done:
                return True
            if self._gate is None:
                self._gate = threading.Lock()  # an Event does the same and costs three times as much
                self._gate.acquire()
        if self._gate.acquire(timeout=timeout_s):
            self._gate.release()  # for whoever waits as well
        return self._done

    def result(self) -> T:
        """The value; raises the error of a failed future. Must be done."""
        if not self._done:
            raise InternalError(f"result of {self.name!r} was read before it was done; wait for it first.")
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call `callback` once done: at once where it is, else in the resolving thread. It must not block."""
        with self._lock:
            if not self._done:
                if self._callbacks is None:
                    self._callbacks = []
                self._callbacks.append(callback)
                return
        callback()

    def _settle(self, value: T | None, error: BaseException | None) -> None:
        with self._lock:
            if self._done:
                raise InternalError(f"future {self.name!r} was settled twice.")
            self._value, self._error = value, error
            self._done = True
            if self._gate is not None:
                self._gate.release()
            callbacks, self._callbacks = self._callbacks, None
        for callback in callbacks or ():
            callback()
