"""Signals that end a run between steps instead of within one.

Owns: the handlers of SIGINT, and of others that are asked for, while a run trains.
Does not: end the run; its loop asks `requested` after each step.
Threads: made and left in the main thread, as Python's signal handlers demand.
"""

import signal
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Self

Handler = Callable[[int, FrameType | None], object]


class StopRequest:
    """While entered, the first signal is remembered; the second does at once what it does without us."""

    def __init__(self, on_request: Callable[[], None], signals: Sequence[signal.Signals] = (signal.SIGINT,)) -> None:
        self.signal: signal.Signals | None = None
        """Which one has come."""
        self._on_request = on_request
        self._before: dict[signal.Signals, Handler | int | None] = dict.fromkeys(signals)

    @property
    def requested(self) -> bool:
        """The run is to end."""
        return self.signal is not None

    def __enter__(self) -> Self:
        for number in self._before:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self.__exit__(None, None, None)
            signal.raise_signal(number)
        self.signal = signal.Signals(number)
        self._on_request()
