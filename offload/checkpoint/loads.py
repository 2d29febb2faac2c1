"""Loads into a session.

Owns: the order of a load, what is undone where it fails, and what the caller is told.
Does not: know what stored files look like (format/), where values are (session_state.py) or what else a run has
(run_state.py).
Threads: the training thread, with idle lanes.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from zlib import crc32

from offload.checkpoint.all_ranks import on_all_ranks
from offload.checkpoint.background import clear_frames
from offload.checkpoint.format import formats
from offload.checkpoint.format.errors import CheckpointError, CorruptCheckpointError
from offload.checkpoint.format.folder import MANIFEST, before
from offload.checkpoint.format.load import Loading
from offload.checkpoint.format.reader import Checkpoint
from offload.checkpoint.format.state import OpenReader
from offload.checkpoint.model_values import ModelState
from offload.checkpoint.run_state import RunState
from offload.checkpoint.saves import Saves, check_whole_step
from offload.checkpoint.session_state import SessionSink, SessionValues
from offload.errors import ConfigError, RanksDivergedError
from offload.gradients.intake import GradientIntake
from offload.optimizer.in_backward import BackwardSteps
from offload.runtime import Runtime

log = logging.getLogger("offload")

ON_CORRUPT: Final = ("raise", "previous")
"""What a load does about a damaged checkpoint."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What a load did."""

    step: int
    """Of the checkpoint; 0 where what was loaded knows of none."""
    extra: dict[str, Any]
    """The user's dictionary."""
    exact: bool
    """Training goes on with the bits it was saved with."""
    notes: tuple[str, ...]
    """What was not taken over as it was."""


class Loads:
    """Of one session, whose lanes are idle whenever anything here is called."""

    def __init__(
        self,
        runtime: Runtime,
        values: SessionValues,
        run_state: RunState,
        *,
        model_state: ModelState,
        saves: Saves,
        intake: GradientIntake,
        in_backward: BackwardSteps | None,
    ) -> None:
        self._runtime = runtime
        self._values = values
        self._run_state = run_state
        self._model_state = model_state
        self._saves = saves
        self._intake = intake
        self._in_backward = in_backward

    def load(self, path: Path, *, strict: bool, on_corrupt: str) -> LoadResult:
        """See Session.load."""
        if on_corrupt not in ON_CORRUPT:
            raise ConfigError(f"on_corrupt={on_corrupt!r} is unknown; use one of {', '.join(map(repr, ON_CORRUPT))}.")
        self._saves.wait()  # its checkpoint may be the one that is wanted
        try:
            return self._load(path, strict=strict)
        except CorruptCheckpointError as error:
            if on_corrupt == "raise" or self._runtime.lanes.failure is not None:
                raise
            damage = error
            clear_frames(damage)
        for previous in before(path):
            try:
                result = self._load(previous, strict=strict)
            except CorruptCheckpointError:
                if self._runtime.lanes.failure is not None:
                    raise
                continue
            if self._runtime.ranks.rank == 0:
                log.warning("%s The one of step %d, %s, is loaded instead.", damage, result.step, previous.name)
            return result
        raise damage

    def _load(self, path: Path, *, strict: bool) -> LoadResult:
        with ExitStack() as undo, ExitStack() as opened:
            with on_all_ranks(self._runtime.ranks, f"loading {path}") as found:
                check_whole_step(self._in_backward, "load")
                reader = opened.enter_context(formats.open_stored(path, self._values.items()))
                found.here = {"checkpoint": _identity(reader)}
                saved, extra, step, notes = self._saved(reader)
                notes += self._run_state.begin(saved, strict=strict, undo=undo)
                sink = SessionSink(self._values)
                opened.callback(sink.close)
                loading = Loading(reader, sink)
            self._check_same(path, [str(other["checkpoint"]) for other in found.by_rank])
            try:
                with on_all_ranks(self._runtime.ranks, f"loading {path}") as outcome:
                    loaded = loading.run()
                    notes += self._run_state.finish(saved, has_begun=any(self._values.num_steps.values()))
                    outcome.here = {"notes": [*loaded.notes, *notes], "exact": loaded.exact and not notes}
            except BaseException as error:
                if sink.has_begun:
                    self._runtime.lanes.fail(
                        CheckpointError(f"loading {path} ended midway: {type(error).__name__}: {error}")
                    )
                clear_frames(error)
                raise
            undo.pop_all()
        self._model_state.invalidate({partition.id for partition in self._runtime.partitions})
        self._drop_gradients()
        every_note = dict.fromkeys(note for other in outcome.by_rank for note in other["notes"])
        return LoadResult(step, extra, all(other["exact"] for other in outcome.by_rank), tuple(every_note))

    def _check_same(self, path: Path, by_rank: Sequence[str]) -> None:
        """Each rank takes its part of what it has found; parts of two checkpoints would make one that never was."""
        for rank, found in enumerate(by_rank):
            if found != by_rank[0]:
                raise RanksDivergedError(
                    f"at {path} rank {rank} finds {found}, rank 0 finds {by_rank[0]}: all have to load the same. Give "
                    "the folder of one checkpoint, which every rank sees, and not that of a run."
                )

    def _saved(self, reader: OpenReader) -> tuple[dict[str, Any], dict[str, Any], int, list[str]]:
        """What this rank had of its own, the user's dictionary, the step, and what is to be noted of them."""
        if not isinstance(reader, Checkpoint):
            return {}, {}, 0, []
        rank, world_size = self._runtime.ranks.rank, self._runtime.ranks.world_size
        notes = []
        saved = reader.rank_extra(rank if rank < reader.world_size else 0)
        if reader.world_size > world_size:
            notes.append(f"random states are those of the first {world_size} of {reader.world_size} ranks")
        if reader.world_size < world_size:
            notes.append(f"random states of ranks {reader.world_size} to {world_size - 1} stay as they were")
            if rank >= reader.world_size:
                saved.pop("random", None)  # not those of another rank: both would draw the same
        return saved, reader.extra(), reader.step, notes

    def _drop_gradients(self) -> None:
        """As `zero_grad()`: they belong to weights that are no more."""
        if self._in_backward is not None:
            self._in_backward.settle({}, ())  # backwards are counted from 0
        self._intake.collect_for_step()
        self._intake.attach_placeholders()
        for partition in self._runtime.partitions:
            for entry in partition.entries():
                entry.parameter.grad = None
        self._intake.begin_backward()


def _identity(reader: OpenReader) -> str:
    """What tells a checkpoint of ours from another one; of other formats the kind alone."""
    if not isinstance(reader, Checkpoint):
        return type(reader).__name__
    return f"step {reader.step} ({crc32((reader.folder / MANIFEST).read_bytes()):08x})"
