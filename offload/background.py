"""Saves that go on while training does, from a copy in host memory.

Owns: the copy and what it is charged as, the thread that writes it, and what the user holds of a save.
Does not: know what is saved (session_state.py) or how (checkpoint/save.py).
Threads: a save is begun by the training thread; its result may be read by any.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from offload.checkpoint.save import CheckpointJob, Saved
from offload.checkpoint.state import Item, Run, StateSource
from offload.lanes import Promise
from offload.memory.ledger import Ledger
from offload.units import Tier

log = logging.getLogger("offload")

COPY: Final = "copy for a checkpoint"
POLL_S: Final = 0.2


class SaveResult:
    """What a save did. Reading a field waits until the checkpoint would survive a power cut, or raises why not."""

    def __init__(self, durable: "Promise[Saved]") -> None:
        self._promise = durable
        self._told = False

    @property
    def durable(self) -> bool:
        """Whether it has ended; does not wait."""
        return self._promise.done()

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
        """Older checkpoints that `keep` let go."""
        return self.wait().removed

    def wait(self) -> Saved:
        """Wait for the end."""
        while not self._promise.block(POLL_S):
            pass  # in short turns, so that Ctrl-C is heard
        self._told = True
        return self._promise.result()

    def end(self) -> None:
        """Wait for the end; an error that nobody has read is logged."""
        told = self._told
        try:
            self.wait()
        except Exception as error:
            if not told:
                log.error("a checkpoint was not saved: %s", error)  # noqa: TRY400 - the frames are those of a thread


class Copied:
    """A source whose values were copied: training may go on. See StateSource."""

    def __init__(self, source: StateSource) -> None:
        self._items = source.items()
        self._runs = source.runs()
        self._values = [values.clone() for values in source.values()]

    def items(self) -> Sequence[Item]:
        """See StateSource."""
        return self._items

    def runs(self) -> Sequence[Run]:
        """See StateSource."""
        return self._runs

    def values(self) -> Iterator[Tensor]:
        """See StateSource. Each value is let go of once it was given."""
        self._values.reverse()
        while self._values:
            yield self._values.pop()


class BackgroundSaves:
    """At most one at a time."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._running: SaveResult | None = None

    def has_room(self, num_bytes: int) -> bool:
        """Whether a copy of so many bytes keeps within the host budget."""
        budget = self._ledger.budget(Tier.HOST)
        return budget is None or self._ledger.held(Tier.HOST) + num_bytes <= budget

    def begin(self, job: CheckpointJob, num_bytes: int) -> SaveResult:
        """Run a job over a copy of `num_bytes` in a thread of its own."""
        result = self._running = SaveResult(job.durable)
        self._ledger.charge(Tier.HOST, COPY, num_bytes)
        job.durable.when_done(lambda: self._ledger.discharge(Tier.HOST, COPY, num_bytes))
        threading.Thread(target=_run, args=(job,), name="offload-checkpoint", daemon=True).start()
        return result

    def end(self) -> None:
        """Wait for the one that runs. Idempotent."""
        if self._running is not None:
            self._running.end()
            self._running = None


def _run(job: CheckpointJob) -> None:
    started_s = time.perf_counter()
    try:
        saved = job.run()
    except BaseException as error:  # the promise has it, too
        log.debug("saving ended by %r", error)
    else:
        log.info("saved %s in %.1f s beside training", saved.folder, time.perf_counter() - started_s)


def num_bytes_of(source: StateSource) -> int:
    """Bytes of all its values."""
    sizes: dict[tuple[str, str], torch.dtype] = {(i.name, p.name): p.dtype for i in source.items() for p in i.planes}
    return sum(run.numel * sizes[run.item, run.plane].itemsize for run in source.runs())
