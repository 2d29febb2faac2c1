"""What the model holds, for whoever reads or sets it while it is offloaded: masters, gradients, state_dict.

Owns: the state_dict hooks of the modules, the errors of `model.to()` and its kin and of copies of the model.
Does not: move training's data (weights/, gradients/) or know where they are stored (storage/).
Threads: the training thread.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from offload.errors import RanksDivergedError, UnsupportedModelError
from offload.gradients.intake import GradientIntake
from offload.model.partitions import Entry, Partition
from offload.model.structure import StructureWatch
from offload.runtime import Runtime
from offload.storage.values import HomeValues
from offload.weights.fetch import WeightFetcher
from offload.weights.parameter_values import SessionParameters


class ModelState:
    """Reads and writes values in their homes, with idle lanes: `settle` waits for them."""

    def __init__(
        self,
        runtime: Runtime,
        model: nn.Module,
        *,
        values: HomeValues,
        fetcher: WeightFetcher,
        intake: GradientIntake,
        settle: Callable[[], None],
        parameters: SessionParameters,
    ) -> None:
        self._ranks = runtime.ranks
        self._model = model
        self._places: dict[nn.Parameter, tuple[Partition, Entry]] = {
            entry.parameter: (partition, entry) for partition in runtime.partitions for entry in partition.entries()
        }
        self._partitions = runtime.partitions
        self._values = values
        self._fetcher = fetcher
        self._intake = intake
        self._settle = settle
        self._parameters = parameters
        self._structure = StructureWatch(model)
        self._handles: list[Any] = []
        self._loaded: set[str] = set()
        """Names taken over by a running `load_state_dict`, which torch will take for missing."""

    def attach(self) -> None:
        """Register the hooks of `state_dict` and `load_state_dict`; `to`, `half`, `cuda` …, copies and pickles raise.

        Of every module: each can be asked for itself. Parameters and modules that are assigned raise, too.
        """
        self._structure.attach()
        for module in self._model.modules():
            self._handles.append(module.register_state_dict_pre_hook(self._begin_state_dict))
            self._handles.append(module.register_state_dict_post_hook(partial(self._own_values)))
            self._handles.append(module.register_load_state_dict_pre_hook(partial(self._take_values)))
            self._handles.append(module.register_load_state_dict_post_hook(partial(self._end_load)))
            if not self._places.keys().isdisjoint(module.parameters()):
                # The one method that all such calls go through; the class stays as it is.
                module.__dict__ |= {"_apply": self._refuse_move, "__reduce_ex__": self._refuse_copy}

    def detach(self) -> None:
        """Remove them."""
        self._structure.detach()
        while self._handles:
            self._handles.pop().remove()
        for module in self._model.modules():
            for name in ("_apply", "__reduce_ex__"):
                module.__dict__.pop(name, None)

    # ------------------------------------------------------------------------------------------ by the session

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[dict[str, Tensor]]:
        """fp32 masters of `module`'s parameters by name; edits are taken over at the end.

        With ranks all must enter it, and the edits are those of the first rank.
        """
        self._settle()
        values: dict[str, Tensor] = {}
        chosen = [self._places[p] for p in dict.fromkeys(module.parameters()) if p in self._places]
        for partition, entry in chosen:
            values[entry.name] = torch.empty(entry.numel, dtype=torch.float32).view(entry.shape)
            self._values.read_into(partition, entry, values[entry.name].view(-1))
        before = {name: tensor.clone() for name, tensor in values.items()}
        yield values
        self._settle()
        changed = [(p, e) for p, e in chosen if not torch.equal(values[e.name], before[e.name])]
        changed = self._edits_of_first(chosen, changed, values)
        for partition, entry in changed:
            self._values.write(partition, entry, values[entry.name])
        self.invalidate({partition.id for partition, _ in changed})

    def _edits_of_first(
        self,
        chosen: Sequence[tuple[Partition, Entry]],
        changed: Sequence[tuple[Partition, Entry]],
        values: Mapping[str, Tensor],
    ) -> list[tuple[Partition, Entry]]:
        """What the first rank has changed, with its values. An edit that is not on the first rank would be lost."""
        own = {entry.name for _, entry in changed}
        by_rank = [set(json.loads(text)) for text in self._ranks.exchange(json.dumps(sorted(own)))]
        for rank, names in enumerate(by_rank):
            if lost := sorted(names - by_rank[0]):
                raise RanksDivergedError(
                    f"rank {rank} edited {lost[0]!r} inside gathered() and the first rank did not, whose edits are "
                    "taken. Make them there, or on all."
                )
        edited = [(partition, entry) for partition, entry in chosen if entry.name in by_rank[0]]
        for _, entry in edited:
            self._ranks.broadcast(values[entry.name])
        return edited

    def gradients(self, module: nn.Module) -> dict[str, Tensor]:
        """Offloaded gradients of `module`'s parameters by name, fp32 copies on the host."""
        wanted = set(module.parameters())
        self._settle()
        offloaded = self._intake.collect_for_step()
        self._intake.attach_placeholders()
        self._intake.wait_stored()
        gradients = {}
        for partition in self._partitions:
            for position in sorted(offloaded[partition.id]):
                entry = partition.trainable.entries[position]
                if entry.parameter in wanted:
                    values = torch.empty(entry.numel, dtype=torch.float32)
                    self._values.read_gradient(partition, entry, values)
                    gradients[entry.name] = values.view(entry.shape)
        return gradients

    def sha256(self) -> str:
        """SHA-256 of the working weights, in parameter order."""
        self._settle()
        digest = hashlib.sha256()
        for parameter in self._model.parameters():
            if parameter in self._places:
                for run in self._values.weights_of(*self._places[parameter]):
                    digest.update(run.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    # ------------------------------------------------------------------------------------------- torch's hooks

    def _begin_state_dict(self, *_: Any) -> None:
        """torch looks at every parameter, to no avail: their values come in `_own_values`."""
        self._parameters.is_suspended = True

    def _own_values(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """Trained values instead of placeholders: the working weights, copied to the host."""
        self._parameters.is_suspended = False
        for name, (partition, entry) in self._own_places(module, prefix).items():
            if name in state:
                self._settle()
                runs = [run.clone() for run in self._values.weights_of(partition, entry)]
                state[name] = torch.cat(runs).view(entry.shape) if runs else torch.empty(entry.shape)

    def _take_values(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Values go to their homes; torch, which would write to placeholders, does not see them.

        With ranks all must load, and the values are those of the first rank.
        """
        touched = set()
        for name, (partition, entry) in self._own_places(module, prefix).items():
            value = state.get(name)
            if isinstance(value, Tensor) and value.shape == entry.shape:
                self._settle()
                if self._ranks.is_sharded:  # those of the first, as at the start; every rank keeps a part of them
                    value = value.detach().clone()
                    self._ranks.broadcast(value)
                self._values.write(partition, entry, value)
                del state[name]  # torch made this dict for the call; the user's own stays whole
                self._loaded.add(name)
                touched.add(partition.id)
        self.invalidate(touched)

    def _end_load(self, module: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in self._loaded]
        self._loaded.clear()

    def _refuse_move(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedModelError(
            "the model was asked to move or change its dtype (to, half, cuda, …) while it is offloaded: its weights "
            "are where the plan put them. Leave the context first, or choose device= and precision= in offload.enable."
        )

    def _refuse_copy(self, *_: Any) -> Any:
        raise UnsupportedModelError(
            "the model was asked for a copy of itself or to be pickled (copy.deepcopy, torch.save) while it is "
            "offloaded: its parameters are placeholders. Use model.state_dict() or session.save, or leave the context "
            "first."
        )

    def _own_places(self, module: nn.Module, prefix: str) -> Mapping[str, tuple[Partition, Entry]]:
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        return {prefix + name: self._places[p] for name, p in own if p in self._places}

    def invalidate(self, pids: set[int]) -> None:
        """Slots of these partitions hold old weights, and graphs built on them are stale."""
        for pid in pids:
            self._partitions[pid].version += 1
        if pids:
            self._fetcher.step(pids)
