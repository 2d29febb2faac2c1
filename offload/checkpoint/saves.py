"""Saves of a session, in the foreground or in the background.

Owns: the order of a save, the agreement of the ranks on it, and what the caller is told.
Does not: know what a checkpoint's files look like (format/), where values are (session_state.py) or what else a run has
(run_state.py).
Threads: the training thread, with idle lanes.

What is not saved: gradients. Save after `step()`; one that accumulates over several backwards loses those before.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from offload.checkpoint.all_ranks import on_all_ranks
from offload.checkpoint.background import BackgroundSaves, SaveResult, clear_frames
from offload.checkpoint.format.manifest import MAX_COUNT
from offload.checkpoint.format.save import CheckpointJob, Extras
from offload.checkpoint.run_state import RunState
from offload.checkpoint.session_state import SessionSource, SessionValues
from offload.checkpoint.snapshot import Snapshots
from offload.errors import ConfigError, RanksDivergedError
from offload.optimizer.in_backward import BackwardSteps
from offload.runtime import Runtime


class Saves:
    """Of one session, whose lanes are idle whenever anything here is called."""

    def __init__(
        self, runtime: Runtime, values: SessionValues, run_state: RunState, in_backward: BackwardSteps | None
    ) -> None:
        self._runtime = runtime
        self._values = values
        self._run_state = run_state
        self._in_backward = in_backward
        self._snapshots = Snapshots(runtime, values)
        self._background = BackgroundSaves()

    def save(
        self, root: Path, *, step: int | None, extra: Mapping[str, Any] | None, keep: int | None, wait: bool
    ) -> SaveResult:
        """See Session.save."""
        self._background.end()  # one at a time: two would want twice the room
        with self._source() as source:
            with on_all_ranks(self._runtime.ranks, f"saving to {root}") as outcome, ExitStack() as undo:
                if (error := self._background.take_error()) is not None:
                    raise error
                if step is not None and (type(step) is not int or not 0 <= step < MAX_COUNT):
                    raise ConfigError(f"step={step!r}: expected the number of steps taken, or None to count them.")
                check_whole_step(self._in_backward, "save")
                number = max(self._values.num_steps.values(), default=0) if step is None else step
                job_of = partial(
                    CheckpointJob, root, step=number, extras=Extras(extra or {}, self._run_state.snapshot()), keep=keep,
                    ranks=self._runtime.ranks.saving,
                )  # fmt: skip
                job = job_of(source)  # what is wrong with it raises before anything is copied
                taken = None if wait else self._snapshots.take(source, root)
                if taken is not None:
                    undo.callback(taken.close)
                outcome.here = {"folder": root.name, "step": number, "keep": keep, "background": taken is not None}
                kept = undo.pop_all()
            with kept:
                self._check_alike(outcome.by_rank)
                if taken is not None and all(other["background"] for other in outcome.by_rank):
                    result = self._background.begin(job_of(taken), taken)
                    kept.pop_all()
                    return result
            job.run()
            return SaveResult(job.durable)

    def _check_alike(self, of_all: Sequence[Mapping[str, Any]]) -> None:
        asked = [{name: other[name] for name in ("step", "keep", "folder")} for other in of_all]
        for rank, other in enumerate(asked):
            if other != asked[0]:
                raise RanksDivergedError(
                    f"rank {rank} saves with {other}, rank 0 with {asked[0]}. Call save alike on every rank."
                )

    def wait(self) -> None:
        """Wait for a save in the background; its error is kept."""
        self._background.end()

    def end(self) -> BaseException | None:
        """Wait for a save in the background. Returns its error (logged, too), unless it was read."""
        self._background.end()
        return self._background.take_error()

    @contextmanager
    def _source(self) -> Iterator[SessionSource]:
        source = SessionSource(self._values, resident=self._runtime.ranks.rank == 0)
        try:
            yield source
        except BaseException as error:
            clear_frames(error)
            raise
        finally:
            source.close()


def check_whole_step(in_backward: BackwardSteps | None, verb: str) -> None:
    """Raise where a part of the weights is stepped and the rest is not."""
    if in_backward is not None and in_backward.is_ahead:
        raise ConfigError(
            f"cannot {verb} between backward and step(): with overlap='backward' a part of the weights is stepped "
            "already; call step() first."
        )
