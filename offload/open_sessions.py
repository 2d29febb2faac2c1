"""The open sessions of this process: found again by their models, ended with them or with the interpreter.

Owns: the list of those that are open, and how a session ends that nobody closes.
Does not: close anything itself (session.py).
Threads: any. Sessions are dropped wherever the garbage collector happens to run.

Note [Dropped]: a session is held by the hooks on its model, so the collector finds both at once, in whatever thread and
under whatever locks it runs: on a lane of the session itself, perhaps, for which closing would wait for ever. So the
finalizer only starts a thread, which takes no lock of ours or of `threading`, and that one closes. Whoever needs the
memory (`enable`) or the files (the end of the interpreter) waits for it.

Note [Exit]: `concurrent.futures` ends the threads that do the disk's system calls as soon as the main thread ends,
before `atexit`. So sessions of the main thread are closed before that, where `threading` lets one be called; those of
other threads, which may still train, at `atexit`, when these have ended.

Note [Keeps]: the collector calls back those who watch an object before it calls any finalizer. Swap files remove
themselves when they are dropped: that must not come before the lanes have written to them for the last time. So they
are held from here as long as their session lives.
"""

import _thread
import atexit
import contextlib
import gc
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final, Protocol

from torch import nn

log = logging.getLogger("offload")

POLL_S: Final = 1.0
"""Waits are of this length each, so that Ctrl-C is heard."""


class OpenSession(Protocol):
    """What of a session is needed here."""

    model: nn.Module
    opened_in: threading.Thread

    def settle_lanes(self) -> None:
        """Wait until nothing is under way, whatever comes of it."""

    def close(self, *, give_back: bool = True) -> None:
        """End it."""

    def describe(self) -> str:
        """Its name for people."""


_open: "Final[weakref.WeakKeyDictionary[OpenSession, Any]]" = weakref.WeakKeyDictionary()
_ending: Final[set[threading.Event]] = set()
"""Of sessions that were dropped and are being closed."""


def opened(session: OpenSession, keeps: Any) -> None:
    """A session is open. `keeps`: held as long as it lives (Note [Keeps])."""
    _open[session] = keeps


def closed(session: OpenSession) -> None:
    """It is not any more."""
    _open.pop(session, None)


def open_sessions() -> list[OpenSession]:
    """In the order in which they were opened."""
    return list(_open)


def close_all(*, give_back: bool = True) -> None:
    """Close every open session of this process, as `Session.close` does; the first error is raised after the last.

    For notebooks, where the session of a cell may be held by nothing but its model.
    """
    with contextlib.ExitStack() as closing:
        for session in open_sessions():
            closing.callback(session.close, give_back=give_back)
    wait_for_dropped()


def session_of(model: nn.Module) -> OpenSession | None:
    """The open session that holds a parameter of this model."""
    parameters = set(model.parameters())
    found = (session for session in open_sessions() if not parameters.isdisjoint(session.model.parameters()))
    return next(found, None)


def collect_dropped() -> None:
    """Close what was dropped and not yet collected: what it holds is needed now."""
    if _open:
        _settle_lanes()
        gc.collect()
    wait_for_dropped()


def _settle_lanes() -> None:
    """Work under way holds what it works on: nothing of that would be collected."""
    for session in open_sessions():
        session.settle_lanes()


def close_dropped(close: Callable[[], None]) -> None:
    """For a finalizer: call `close` soon, in a thread of its own (Note [Dropped])."""
    done = threading.Event()
    _ending.add(done)
    try:
        _thread.start_new_thread(_end, (close, done))
    except RuntimeError:  # the interpreter has ended all but this: nothing is left to close
        _ending.discard(done)


def wait_for_dropped() -> None:
    """Wait until every session that was dropped is closed."""
    for done in list(_ending):
        while not done.wait(POLL_S):
            pass


def _end(close: Callable[[], None], done: threading.Event) -> None:
    try:
        close()
    except Exception as error:  # nobody is left who could take it
        log.warning("a session that was dropped did not end well: %s: %s", type(error).__name__, error)
    finally:
        del close
        done.set()
        _ending.discard(done)


def _at_exit() -> None:
    """Leave no thread, file or message: the weights are dropped, and so are errors (Note [Exit])."""
    for session in open_sessions():
        if session.opened_in is threading.main_thread() or not session.opened_in.is_alive():
            with contextlib.suppress(Exception):
                session.close(give_back=False)
    wait_for_dropped()


def _forget() -> None:
    """A forked child has none of the threads: the sessions are its parent's."""
    _open.clear()
    _ending.clear()


threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
atexit.register(_at_exit)
os.register_at_fork(after_in_child=_forget)
