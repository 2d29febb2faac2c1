"""Save, load and export a session.

Owns: the order of each, what is undone where one fails, and what the caller is told.
Does not: know what a checkpoint's files look like (checkpoint/), where values are (session_state.py) or what else a
run has (run_state.py).
Threads: the training thread, with idle lanes.

What is not saved: gradients. Save after `step()`; one that accumulates over several backwards loses those before.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import psutil
import torch
from torch import Tensor, nn

from offload.checkpoint.background import BackgroundSaves, SaveResult, clear_frames
from offload.checkpoint.format import formats
from offload.checkpoint.format.errors import CheckpointError
from offload.checkpoint.format.export_hf import Exported
from offload.checkpoint.format.folder import MANIFEST
from offload.checkpoint.format.load import Loading
from offload.checkpoint.format.manifest import MAX_COUNT
from offload.checkpoint.format.reader import Checkpoint
from offload.checkpoint.format.save import CheckpointJob
from offload.checkpoint.format.state import OpenReader
from offload.checkpoint.model_values import ModelState
from offload.checkpoint.run_state import RunState
from offload.checkpoint.session_state import SessionReader, SessionSink, SessionSource, SessionValues, names_by_tensor
from offload.checkpoint.snapshot import Snapshots
from offload.checkpoint.together import together
from offload.errors import BudgetError, ConfigError, RanksDivergedError
from offload.gradients.intake import GradientIntake
from offload.model.partitions import Entry, Partition
from offload.optimizer.in_backward import BackwardSteps
from offload.optimizer.torch_state import SHARE_OF_FREE, TorchState
from offload.runtime import Runtime
from offload.storage.allocation import Storage
from offload.storage.values import HomeValues
from offload.units import format_bytes

__all__ = ["Exported", "LoadResult", "Persistence", "SaveResult"]


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


class Persistence:
    """Of one session, whose lanes are idle whenever anything here is called."""

    def __init__(
        self,
        runtime: Runtime,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        storage: Storage,
        home_values: HomeValues,
        values: SessionValues,
        run_state: RunState,
        torch_state: TorchState,
        model_state: ModelState,
        intake: GradientIntake,
        in_backward: BackwardSteps | None,
    ) -> None:
        self._ranks = runtime.ranks
        self._model = model
        self._partitions = runtime.partitions
        self._optimizer = optimizer
        self._storage = storage
        self._home_values = home_values
        self._num_steps = values.num_steps
        self._torch_state = torch_state
        self._model_state = model_state
        self._intake = intake
        self._in_backward = in_backward
        self._lanes = runtime.lanes
        self._values = values
        self._run_state = run_state
        self._snapshots = Snapshots(
            self._values, storage, dtype=runtime.precision.dtype, lanes=runtime.lanes, ledger=runtime.ledger,
            resident=self._is_first, num_local=runtime.ranks.num_local,
        )  # fmt: skip
        self._background = BackgroundSaves()

    # --------------------------------------------------------------------------------------------------- save

    def save(
        self, root: Path, *, step: int | None, extra: Mapping[str, Any] | None, keep: int | None, wait: bool
    ) -> SaveResult:
        """See Session.save."""
        self._background.end()  # one at a time: two would want twice the room
        with self._source() as source:
            with together(self._ranks, f"saving to {root}") as outcome, ExitStack() as undo:
                if (error := self._background.take_error()) is not None:
                    raise error
                if step is not None and (type(step) is not int or not 0 <= step < MAX_COUNT):
                    raise ConfigError(f"step={step!r}: expected the number of steps taken, or None to count them.")
                self._check_whole_step("save")
                number = max(self._num_steps.values(), default=0) if step is None else step
                job_of = partial(
                    CheckpointJob, root, step=number, extra=extra, rank_extra=self._run_state.snapshot(), keep=keep,
                    ranks=self._ranks.saving,
                )  # fmt: skip
                job = job_of(source)  # whatever can be refused is refused before anything is copied
                taken = None if wait else self._snapshots.take(source, root)
                if taken is not None:
                    undo.callback(taken.close)
                outcome.own = {"folder": root.name, "step": number, "keep": keep, "beside": taken is not None}
                kept = undo.pop_all()
            with kept:
                self._check_alike(outcome.of_all)
                if taken is not None and all(other["beside"] for other in outcome.of_all):
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

    def _check_whole_step(self, verb: str) -> None:
        if self._in_backward is not None and self._in_backward.is_ahead:
            raise ConfigError(
                f"cannot {verb} between backward and step(): with overlap='backward' a part of the weights is stepped "
                "already; call step() first."
            )

    def end_saves(self) -> BaseException | None:
        """Wait for a save that goes on beside training. Returns its error (logged, too), unless it was read."""
        self._background.end()
        return self._background.take_error()

    @contextmanager
    def _source(self) -> Iterator[SessionSource]:
        source = SessionSource(self._values, resident=self._is_first)
        try:
            yield source
        except BaseException as error:
            clear_frames(error)
            raise
        finally:
            source.close()

    # --------------------------------------------------------------------------------------------------- load

    def load(self, path: Path, *, strict: bool) -> LoadResult:
        """See Session.load."""
        self._background.end()  # its checkpoint may be the one that is wanted
        with ExitStack() as undo, ExitStack() as opened:
            with together(self._ranks, f"loading {path}") as found:
                self._check_whole_step("load")
                reader = opened.enter_context(formats.open_stored(path, self._values.items()))
                found.own = {"checkpoint": _identity(reader)}
                saved, extra, step, notes = self._saved(reader)
                notes += self._run_state.begin(saved, strict=strict, undo=undo)
                sink = SessionSink(self._values)
                opened.callback(sink.close)
                loading = Loading(reader, sink)
            self._check_same(path, [str(other["checkpoint"]) for other in found.of_all])
            try:
                with together(self._ranks, f"loading {path}") as outcome:
                    loaded = loading.run()
                    notes += self._run_state.finish(saved, has_begun=any(self._num_steps.values()))
                    outcome.own = {"notes": [*loaded.notes, *notes], "exact": loaded.exact and not notes}
            except BaseException as error:
                if sink.has_begun:
                    self._lanes.fail(CheckpointError(f"loading {path} ended midway: {type(error).__name__}: {error}"))
                clear_frames(error)
                raise
            undo.pop_all()
        self._model_state.invalidate({partition.id for partition in self._partitions})
        self._drop_gradients()
        every_note = dict.fromkeys(note for other in outcome.of_all for note in other["notes"])
        return LoadResult(step, extra, all(other["exact"] for other in outcome.of_all), tuple(every_note))

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
        rank, world_size = self._ranks.rank, self._ranks.world_size
        notes = []
        saved = reader.rank_extra(rank if rank < reader.world_size else 0)
        if reader.world_size > world_size:
            notes.append(f"random states are those of the first {world_size} of {reader.world_size} ranks")
        if reader.world_size < world_size:
            notes.append(f"random states of ranks {reader.world_size} to {world_size - 1} stay as they were")
            if rank >= reader.world_size:
                saved.pop("random", None)  # not those of another rank: both would draw the same
        return saved, reader.extra(), reader.step, notes

    @property
    def _is_first(self) -> bool:
        return self._ranks.rank == 0

    def _drop_gradients(self) -> None:
        """As `zero_grad()`: they belong to weights that are no more."""
        if self._in_backward is not None:
            self._in_backward.settle({}, ())  # backwards are counted anew
        self._intake.collect_for_step()
        self._intake.attach_placeholders()
        for partition in self._partitions:
            for entry in partition.entries():
                entry.parameter.grad = None
        self._intake.begin_backward()

    # ------------------------------------------------------------------------------------------------- export

    def export(self, out: Path, *, to: str, dtype: str | None) -> Exported:
        """See Session.export."""
        if self._ranks.is_sharded:
            return self._export_of_ranks(out, to, dtype)
        reader = SessionReader(self._values)
        try:
            return formats.export(reader, out, to=to, dtype=dtype)
        except BaseException as error:
            clear_frames(error)
            raise
        finally:
            reader.close()

    def _export_of_ranks(self, out: Path, to: str, dtype: str | None) -> Exported:
        """Through a checkpoint beside `out`, which every rank must reach: no rank has more than its shard."""
        formats.check(to, dtype)
        through = out.absolute().with_name(f".{out.name}.shards")
        # Of an export that was killed; a checkpoint of another session would be in the way.
        self.save(through, step=None, extra=None, keep=1, wait=True)
        with together(self._ranks, f"exporting to {out}") as outcome:
            if self._is_first:
                try:
                    with Checkpoint(through) as reader:
                        done = formats.export(reader, out, to=to, dtype=dtype)
                finally:
                    shutil.rmtree(through, ignore_errors=True)
                outcome.own = {"files": done.files, "num_tensors": done.num_tensors, "num_bytes": done.num_bytes}
        first = outcome.of_all[0]
        return Exported(out, tuple(first["files"]), first["num_tensors"], first["num_bytes"])

    def state_dict(self, *, with_optimizer: bool) -> dict[str, Any]:
        """See Session.state_dict."""
        with together(self._ranks, "state_dict"):
            self._check_room(with_moments=with_optimizer)
        places: dict[Tensor, tuple[Partition, Entry]] = {
            e.parameter: (p, e) for p in self._partitions for e in p.entries()
        }
        model: dict[str, Any] = {}
        for tensor, names in names_by_tensor(self._model).items():
            values = tensor.detach().to("cpu", copy=True) if tensor not in places else self._whole(*places[tensor])
            model |= dict.fromkeys(names, values)
        extra_states = self._run_state.of_modules()
        model |= {f"{name}._extra_state".lstrip("."): state for name, state in extra_states.items()}
        result: dict[str, Any] = {"model": model}
        if with_optimizer and self._optimizer is not None:
            packed = self._optimizer.state_dict()
            parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
            for index, parameter in enumerate(parameters):
                state = self._torch_state.state_of_steps(*places[parameter]) if parameter in places else None
                if state is not None:
                    packed["state"][index] = state
            result["optimizer"] = packed
        return result

    def _whole(self, partition: Partition, entry: Entry) -> Tensor:
        values = torch.empty(entry.numel, dtype=entry.original_dtype)
        self._home_values.read_into(partition, entry, values)
        return values.view(entry.shape)

    def _check_room(self, *, with_moments: bool) -> None:
        copies = 1 + (self._torch_state.num_moments if with_moments else 0)
        needed = sum(entry.numel * 4 * copies for p in self._partitions for entry in p.entries())
        if needed > SHARE_OF_FREE * psutil.virtual_memory().available:
            raise BudgetError(
                f"a state_dict of this session takes up to {format_bytes(needed)} of host memory, which is not there; "
                "session.save writes it to files chunk by chunk, and session.export for others."
            )


def _identity(reader: OpenReader) -> str:
    """What tells a checkpoint of ours from another one; of other formats the kind alone."""
    if not isinstance(reader, Checkpoint):
        return type(reader).__name__
    return f"step {reader.step} ({crc32((reader.folder / MANIFEST).read_bytes()):08x})"
