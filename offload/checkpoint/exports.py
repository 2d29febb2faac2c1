"""Exports of a session, and its state as torch's own `state_dict` has it.

Owns: what is exported, and through what where each rank has its shards alone.
Does not: know a format (format/) or where values are (session_state.py).
Threads: the training thread, with idle lanes.
"""

import shutil
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from offload.checkpoint.all_ranks import on_all_ranks
from offload.checkpoint.background import clear_frames
from offload.checkpoint.format import formats
from offload.checkpoint.format.export_hf import Exported
from offload.checkpoint.format.reader import Checkpoint
from offload.checkpoint.run_state import states_of_modules
from offload.checkpoint.saves import Saves
from offload.checkpoint.session_state import SessionReader, SessionValues, names_by_tensor
from offload.errors import BudgetError
from offload.model.partitions import Entry, Partition
from offload.optimizer.torch_state import SHARE_OF_FREE, TorchState
from offload.runtime import Runtime
from offload.storage.values import HomeValues
from offload.units import format_bytes


class Exports:
    """Of one session, whose lanes are idle whenever anything here is called."""

    def __init__(
        self,
        runtime: Runtime,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        values: SessionValues,
        home_values: HomeValues,
        torch_state: TorchState,
        saves: Saves,
    ) -> None:
        self._runtime = runtime
        self._model = model
        self._optimizer = optimizer
        self._values = values
        self._home_values = home_values
        self._torch_state = torch_state
        self._saves = saves

    def export(self, out: Path, *, to: str, dtype: str | None) -> Exported:
        """See Session.export."""
        if self._runtime.ranks.is_sharded:
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
        """Through a checkpoint next to `out`, which every rank must reach: no rank has more than its shard."""
        formats.check(to, dtype)
        through = out.absolute().with_name(f".{out.name}.shards")
        # Of an export that was killed; a checkpoint of another session would be in the way.
        self._saves.save(through, step=None, extra=None, keep=1, wait=True)
        with on_all_ranks(self._runtime.ranks, f"exporting to {out}") as outcome:
            if self._runtime.ranks.rank == 0:
                try:
                    with Checkpoint(through) as reader:
                        done = formats.export(reader, out, to=to, dtype=dtype)
                finally:
                    shutil.rmtree(through, ignore_errors=True)
                outcome.here = {"files": done.files, "num_tensors": done.num_tensors, "num_bytes": done.num_bytes}
        first = outcome.by_rank[0]
        return Exported(out, tuple(first["files"]), first["num_tensors"], first["num_bytes"])

    def state_dict(self, *, with_optimizer: bool) -> dict[str, Any]:
        """See Session.state_dict."""
        with on_all_ranks(self._runtime.ranks, "state_dict"):
            self._check_room(with_moments=with_optimizer)
        places: dict[Tensor, tuple[Partition, Entry]] = {
            e.parameter: (p, e) for p in self._runtime.partitions for e in p.entries()
        }
        model: dict[str, Any] = {}
        for tensor, names in names_by_tensor(self._model).items():
            values = tensor.detach().to("cpu", copy=True) if tensor not in places else self._whole(*places[tensor])
            model |= dict.fromkeys(names, values)
        extra_states = states_of_modules(self._model)
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
        needed = sum(entry.numel * 4 * copies for p in self._runtime.partitions for entry in p.entries())
        if needed > SHARE_OF_FREE * psutil.virtual_memory().available:
            raise BudgetError(
                f"a state_dict of this session takes up to {format_bytes(needed)} of host memory, which is not there; "
                "session.save writes it to files chunk by chunk, and session.export for others."
            )
