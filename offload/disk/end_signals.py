"""A swap folder with a name goes also where SIGTERM or SIGHUP ends the process at once.

Owns: the handler of these signals, where nobody else has one.
Does not: touch a handler of the user's, or change how the process ends.
Threads: a handler can be set by the main thread alone; elsewhere nothing is done, and the folder is left to `doctor`.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Final

from offload.disk.named_folder import remove_folder

SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)


class RemoveAndEnd:
    """Removes folders, then lets the signal do what it would have done."""

    def __init__(self) -> None:
        self.folders: list[Path] = []
        self._pid = os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid:  # a forked child has the handler, too, and must not take the files away
            for folder in self.folders:
                remove_folder(folder)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


@contextlib.contextmanager
def removed_on_signals(folder: Path) -> Iterator[None]:
    """While entered, a signal that would end the process removes `folder` first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = []
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if handler == signal.SIG_DFL:
            handler = RemoveAndEnd()
            signal.signal(number, handler)
        if isinstance(handler, RemoveAndEnd):
            handler.folders.append(folder)
            handlers.append((number, handler))
    try:
        yield
    finally:
        for number, handler in handlers:
            handler.folders.remove(folder)
            is_last = not handler.folders and signal.getsignal(number) is handler
            if is_last and threading.current_thread() is threading.main_thread():
                signal.signal(number, signal.SIG_DFL)
