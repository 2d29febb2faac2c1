"""Signals that ask for a checkpoint: noted when they come, answered between steps.

Owns: the handlers, and what would have happened without them.
Does not: save (session.py).
Threads: made by the main thread, which all handlers run in; ended by any.

Note [Chained]: a handler that was there before is called as it would have been, only later: after the save. With the
default action the process ends by the signal itself, so that whoever waits for it sees the signal and not a code of
ours. A second signal of the same kind does at once what the first would have done without us. A forked child is no
trainer: there signals do what they did before.
"""

import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

from offload.errors import ConfigError

Handler = Callable[[int, FrameType | None], Any]


class SignalRequest:
    """One signal of this process, whose action waits until `deliver`. Made by `catch`."""

    def __init__(self, number: signal.Signals, before: Handler | int | None) -> None:
        self.number = number
        self.requested = False
        """The signal has come."""
        self._before = before
        self._is_over = False
        """Nobody answers it any more."""
        self._pid = os.getpid()

    @classmethod
    def catch(cls, number: int) -> Self:
        """Catch it from now on. Raises ConfigError for one that cannot be caught, or not by this thread."""
        try:
            request = cls(signal.Signals(number), signal.getsignal(number))
            signal.signal(number, request._note)
        except (ValueError, TypeError, OSError) as error:
            raise ConfigError(
                f"signal {number!r} cannot be caught here ({error}); give one as signal.SIGTERM, in the main thread."
            ) from error
        return request

    @property
    def is_fatal(self) -> bool:
        """Without us it ends the process, with nobody asked."""
        return self._before in (signal.SIG_DFL, None)

    def deliver(self) -> None:
        """Catch it no more, and do what it does without us. Leaves alone a handler that was set meanwhile."""
        self._give_way()
        if callable(self._before):
            self._before(self.number, None)
        elif self.is_fatal:
            signal.raise_signal(self.number)

    def end(self) -> None:
        """Catch it no more; where it has come and was not answered, let it act."""
        self._is_over = True
        if threading.current_thread() is not threading.main_thread():
            if self.requested:
                os.kill(os.getpid(), self.number)  # the main thread notes it, and delivers
        elif self.requested:
            self.deliver()
        else:
            self._give_way()

    def _give_way(self) -> None:
        self.requested, self._is_over = False, True
        if signal.getsignal(self.number) == self._note:
            signal.signal(self.number, signal.SIG_DFL if self._before is None else self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested or self._is_over or os.getpid() != self._pid:
            self.deliver()
        else:
            self.requested = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalSave:
    """What a session does when a signal has come."""

    request: SignalRequest
    path: Path
    extra: Callable[[], Mapping[str, Any]]
    keep: int | None
