"""Ctrl-C between steps instead of within one.

Owns: the handler of SIGINT while a run trains.
Does not: end the run; its loop asks `requested` after each step.
Threads: made and left in the main thread, as Python's signal handlers demand.
"""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self


class StopRequest:
    """While entered, the first Ctrl-C is remembered and the second raises KeyboardInterrupt at once."""

    def __init__(self, on_request: Callable[[], None]) -> None:
        self.requested = False
        self._on_request = on_request
        self._before: Callable[[int, FrameType | None], object] | int | None = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._on_request()
