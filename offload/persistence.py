"""Save, load and export a session.

Owns: the order of each, what is undone where one fails, and what the caller is told.
Does not: know what a checkpoint's files look like (checkpoint/), where values are (session_state.py) or what else a
run has (run_state.py).
Threads: the training thread, with idle lanes.

What is not saved: gradients. Save after `step()`; one that accumulates over several backwards loses those before.
"""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from offload.background import BackgroundSaves, Copied, SaveResult, num_bytes_of
from offload.checkpoint import formats
from offload.checkpoint.errors import CheckpointError
from offload.checkpoint.export_hf import Exported
from offload.checkpoint.load import load
from offload.checkpoint.reader import Checkpoint
from offload.checkpoint.save import CheckpointJob
from offload.errors import BudgetError, ConfigError
from offload.fill import Filler
from offload.gradients.intake import GradientIntake
from offload.handover import SHARE_OF_FREE, Handover
from offload.lanes import Lanes
from offload.memory.ledger import Ledger
from offload.model_state import ModelState
from offload.optimizer.early import EarlySteps
from offload.optimizer.kernel_step import Stepper
from offload.optimizer.kinds import OptimizerKind
from offload.optimizer.outcomes import Outcomes
from offload.partition import Entry, Partition
from offload.run_state import RunState
from offload.session_state import SessionReader, SessionSink, SessionSource, SessionValues, names_by_tensor
from offload.storage import Storage
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
        model: nn.Module,
        partitions: Sequence[Partition],
        optimizer: torch.optim.Optimizer | None,
        kind: OptimizerKind,
        *,
        storage: Storage,
        filler: Filler,
        stepper: Stepper,
        outcomes: Outcomes,
        num_steps: dict[int, int],
        handover: Handover,
        model_state: ModelState,
        intake: GradientIntake,
        early: EarlySteps | None,
        device: torch.device,
        dtype: torch.dtype,
        lanes: Lanes,
        ledger: Ledger,
    ) -> None:
        self._model = model
        self._partitions = partitions
        self._optimizer = optimizer
        self._storage = storage
        self._filler = filler
        self._num_steps = num_steps
        self._handover = handover
        self._model_state = model_state
        self._intake = intake
        self._early = early
        self._lanes = lanes
        self._values = SessionValues(model, partitions, storage=storage, dtype=dtype, num_steps=num_steps)
        self._run_state = RunState(
            model, optimizer, kind, stepper=stepper, outcomes=outcomes, values=self._values, device=device
        )
        self._background = BackgroundSaves(ledger)

    # --------------------------------------------------------------------------------------------------- save

    def save(
        self, root: Path, *, step: int | None, extra: Mapping[str, Any] | None, keep: int | None, wait: bool
    ) -> SaveResult:
        """See Session.save."""
        if step is not None and (type(step) is not int or step < 0):
            raise ConfigError(f"step={step!r}: expected the number of steps taken, or None to count them.")
        self._check_whole_step("save")
        self.end_saves()  # one at a time writes to a folder, and to memory
        number = max(self._num_steps.values(), default=0) if step is None else step
        run_state = self._run_state.snapshot()
        with self._source() as source:

            def job_of(values: SessionSource | Copied) -> CheckpointJob:
                return CheckpointJob(root, values, step=number, extra=extra, rank_extra=run_state, keep=keep)

            if not wait and self._background.has_room(num_bytes := num_bytes_of(source)):
                return self._background.begin(job_of(Copied(source)), num_bytes)
            job = job_of(source)
            job.run()
            return SaveResult(job.durable)

    def _check_whole_step(self, verb: str) -> None:
        if self._early is not None and self._early.is_ahead:
            raise ConfigError(
                f"cannot {verb} between backward and step(): with overlap='backward' a part of the weights is stepped "
                "already; call step() first."
            )

    def end_saves(self) -> None:
        """Wait for a save that goes on beside training. An error that nobody has read is logged."""
        self._background.end()

    @contextmanager
    def _source(self) -> Iterator[SessionSource]:
        source = SessionSource(self._values, self._filler, self._storage)
        try:
            yield source
        except BaseException as error:
            _clear_frames(error)
            raise
        finally:
            source.close()

    # --------------------------------------------------------------------------------------------------- load

    def load(self, path: Path, *, strict: bool) -> LoadResult:
        """See Session.load."""
        self._check_whole_step("load")
        self.end_saves()
        with ExitStack() as undo, formats.open_stored(path, self._values.items()) as reader:
            saved: dict[str, Any] = {}
            extra: dict[str, Any] = {}
            step = 0
            if isinstance(reader, Checkpoint):
                saved, extra, step = reader.rank_extra(0), reader.extra(), reader.step
            notes = self._run_state.begin(saved, strict=strict, undo=undo)
            if isinstance(reader, Checkpoint) and reader.world_size > 1:
                notes.append(f"random states are those of the first of {reader.world_size} ranks")
            sink = SessionSink(self._values, self._filler, self._storage, num_steps=self._num_steps)
            try:
                loaded = load(reader, sink)
                notes += self._run_state.finish(saved, has_begun=any(self._num_steps.values()))
            except BaseException as error:
                if sink.has_begun:
                    self._lanes.fail(CheckpointError(f"loading {path} ended midway: {type(error).__name__}: {error}"))
                _clear_frames(error)
                raise
            finally:
                sink.close()
            undo.pop_all()
        self._model_state.invalidate({partition.id for partition in self._partitions})
        self._drop_gradients()
        return LoadResult(step, extra, loaded.exact and not notes, (*loaded.notes, *notes))

    def _drop_gradients(self) -> None:
        """As `zero_grad()`: they belong to weights that are no more."""
        if self._early is not None:
            self._early.settle({}, ())  # backwards are counted anew
        self._intake.collect_for_step()
        self._intake.hand_out()
        for partition in self._partitions:
            for entry in partition.entries():
                entry.parameter.grad = None
        self._intake.begin_backward()

    # ------------------------------------------------------------------------------------------------- export

    def export(self, out: Path, *, to: str, dtype: str | None) -> Exported:
        """See Session.export."""
        reader = SessionReader(self._values, self._filler, self._storage)
        try:
            return formats.export(reader, out, to=to, dtype=dtype)
        except BaseException as error:
            _clear_frames(error)
            raise
        finally:
            reader.close()

    def state_dict(self, *, with_optimizer: bool) -> dict[str, Any]:
        """See Session.state_dict."""
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
                state = self._handover.state_of_steps(*places[parameter]) if parameter in places else None
                if state is not None:
                    packed["state"][index] = state
            result["optimizer"] = packed
        return result

    def _whole(self, partition: Partition, entry: Entry) -> Tensor:
        values = torch.empty(entry.numel, dtype=entry.original_dtype)
        self._filler.read_into(partition, entry, values)
        return values.view(entry.shape)

    def _check_room(self, *, with_moments: bool) -> None:
        copies = 1 + (self._handover.num_moments if with_moments else 0)
        needed = sum(entry.numel * 4 * copies for p in self._partitions for entry in p.entries())
        if needed > SHARE_OF_FREE * psutil.virtual_memory().available:
            raise BudgetError(
                f"a state_dict of this session takes up to {format_bytes(needed)} of host memory, which is not there; "
                "session.save writes it to files piece by piece, and session.export for others."
            )


def _clear_frames(error: BaseException | None) -> None:
    """Frames of an error hold views of slabs, which would keep the session's memory mapped as long as it lives."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
