"""Saves that go on while training does.

Owns: the thread that writes, what the user holds of a save, and the error of one whose result nobody reads.
Does not: know what is saved (session_state.py), from what (snapshot.py) or how (checkpoint/save.py).
Threads: a save is begun by the training thread; its result may be read by any.
"""

import logging
import threading
import time
import traceback
from pathlib import Path
from typing import Final, Protocol

from offload.checkpoint.format.save import CheckpointJob, Saved
from offload.checkpoint.format.state import StateSource
from offload.concurrency.futures import Future

log = logging.getLogger("offload")

POLL_S: Final = 0.2


class SaveResult:
    """What a save did. Reading any other field waits until it is durable, or raises why it cannot become so."""

    def __init__(self, durable: "Future[Saved]") -> None:
        self._future = durable
        self._told = False

    @property
    def durable(self) -> bool:
        """Whether the checkpoint would survive a power cut by now. Does not wait; raises where there will be none."""
        return self._future.done() and bool(self.wait())

    @property
    def folder(self) -> Path:
        """The checkpoint's own folder."""
        return self.wait().folder

    @property
    def num_bytes(self) -> int:
        """Bytes of its files."""
        return self.wait().num_bytes

    @property
    def removed(self) -> tuple[str, ...]:
        """Older checkpoints, beyond the number of `keep`."""
        return self.wait().removed

    def wait(self) -> Saved:
        """Wait for the end."""
        while not self._future.block(POLL_S):
            pass  # for a short time each, so that Ctrl-C is heard
        self._told = True
        return self._future.result()

    def end(self) -> None:
        """Wait for the end, whatever it is."""
        while not self._future.block(POLL_S):
            pass

    def take_error(self) -> BaseException | None:
        """The error of a save that has failed, unless the user has read it here; given once."""
        told, self._told = self._told, True
        if told:
            return None
        try:
            self._future.result()
        except BaseException as error:
            return error
        return None


class SourceOfCopies(StateSource, Protocol):
    """A source that training does not change any more."""

    def close(self) -> None:
        """Release what it holds. Idempotent."""


class BackgroundSaves:
    """At most one at a time."""

    def __init__(self) -> None:
        self._running: SaveResult | None = None
        self._ended: list[SaveResult] = []

    def begin(self, job: CheckpointJob, source: SourceOfCopies) -> SaveResult:
        """Run a job over `source` in a thread of its own, which then closes the source."""
        result = SaveResult(job.durable)
        # No daemon: a program that ends without closing its session would leave the save unfinished, and say nothing.
        threading.Thread(target=_run, args=(job, source), name="offload-checkpoint").start()
        self._running = result
        return result

    def end(self) -> None:
        """Wait for the one that runs; its error is kept until somebody takes it. Idempotent."""
        if self._running is not None:
            self._running.end()
            self._ended.append(self._running)
            self._running = None

    def take_error(self) -> BaseException | None:
        """Of the newest save that failed and whose result nobody has read; each is given once. After `end`."""
        errors = [error for result in self._ended if (error := result.take_error()) is not None]
        self._ended.clear()
        return errors[-1] if errors else None


def _run(job: CheckpointJob, source: SourceOfCopies) -> None:
    started_s = time.perf_counter()
    try:
        saved = job.run(source.close)
    except BaseException as error:
        log.error("a checkpoint was not saved: %s", error)  # noqa: TRY400 - the frames are those of this thread
        # They hold views of memory that is released.
        clear_frames(error)
    else:
        log.info("saved %s in %.1f s in the background", saved.folder, time.perf_counter() - started_s)


def clear_frames(error: BaseException | None) -> None:
    """Frames of an error hold views of staging buffers, which would keep the session's memory mapped while it lives."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
