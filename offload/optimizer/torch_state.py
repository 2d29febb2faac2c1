"""The state of the user's optimizer: taken over at the start; handed back, with the parameters, at the end.

Owns: the form in which torch keeps an optimizer's state, and when there is no room to hand it back.
Does not: read or write homes (storage/values.py). Every function needs idle lanes.
Threads: the training thread.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import psutil
import torch

from offload.model.partitions import Entry, Partition
from offload.optimizer.kernel_step import Stepper
from offload.optimizer.kinds import OptimizerKind, has_begun
from offload.optimizer.torch_step import TorchStepper
from offload.runtime import Runtime
from offload.storage.values import HomeValues
from offload.units import format_bytes

log = logging.getLogger("offload")

SHARE_OF_FREE: Final = 0.8
"""Of host memory that is free, what moments may take when they are handed back."""


class TorchState:
    """The state of the user's optimizer, between it and the session."""

    def __init__(
        self,
        runtime: Runtime,
        optimizer: torch.optim.Optimizer | None,
        kind: OptimizerKind,
        *,
        stepper: Stepper,
        num_steps: dict[int, int],
        values: HomeValues,
    ) -> None:
        self._ranks = runtime.ranks
        self._optimizer = optimizer
        self._kind = kind
        self._stepper = stepper
        self._num_steps = num_steps
        self._values = values

    def state_of(self, entry: Entry) -> Mapping[str, Any]:
        """What the optimizer knows of a parameter."""
        return self._optimizer.state.get(entry.parameter, {}) if self._optimizer is not None else {}

    def take_over(self, partitions: Sequence[Partition]) -> None:
        """Step counts, and state that is in no state tensor; the state tensors have been filled.

        Empties the optimizer's state.
        """
        for partition in partitions if self._optimizer is not None else ():
            for entry in partition.trainable.entries:
                state = self._optimizer.state.pop(entry.parameter, None) if self._optimizer is not None else None
                if state:
                    self._num_steps[entry.index] = has_begun(state)
                    if isinstance(self._stepper, TorchStepper):
                        self._stepper.take_over(entry.index, state)

    def hand_back(self, partitions: Sequence[Partition]) -> None:
        """Parameters on their original device in their original dtype, and the optimizer's state as torch keeps it.

        What host memory has no room for stays where it is, and a warning says what to do.
        """
        for partition in partitions:
            for entry in partition.entries():
                device = torch.device("cpu") if entry.original_device.type == "meta" else entry.original_device
                if self._lacks_room(entry.numel * 4 if device.type == "cpu" else 0):
                    log.warning("no room to hand %s back; save a checkpoint before leaving the context", entry.name)
                    return
                values = torch.empty(entry.numel, dtype=entry.original_dtype)
                self._values.read_into(partition, entry, values)
                entry.parameter.__class__ = entry.original_class
                entry.parameter.data = values.view(entry.shape).to(device)
        self._hand_back_state(partitions)

    def _lacks_room(self, num_bytes: int) -> bool:
        """Whether some rank's host memory has no room for so much on each rank of a node: all decide alike."""
        lacks = num_bytes * self._ranks.num_local > int(psutil.virtual_memory().available)
        return bool(self._ranks.unite(np.array([lacks], np.uint8), "leave the session")[0])

    def _hand_back_state(self, partitions: Sequence[Partition]) -> None:
        begun = [(p, e) for p in partitions for e in p.trainable.entries if self._has_state(e)]
        if self._optimizer is None or not begun:
            return
        needed = sum(entry.numel * 4 * len(self._kind.names) for _, entry in begun)
        if self._lacks_room(int(needed / SHARE_OF_FREE)):
            log.warning("the optimizer's moments (%s) do not fit host memory; save a checkpoint", format_bytes(needed))
            return
        for partition, entry in begun:
            state = self._state(partition, entry)
            # In the parameter's dtype, as torch keeps moments: its step does not mix dtypes.
            moved = {name: state[name].to(entry.parameter) for name in self._kind.names}
            self._optimizer.state[entry.parameter] = state | moved

    @property
    def num_moments(self) -> int:
        """How many values the optimizer keeps for each trainable one."""
        return len(self._kind.names)

    def state_of_steps(self, partition: Partition, entry: Entry) -> dict[str, Any] | None:
        """What torch's optimizer would know of a parameter now, on the host; None before it knows anything."""
        if entry.index < 0 or not self._has_state(entry):
            return None
        return self._state(partition, entry)

    def _has_state(self, entry: Entry) -> bool:
        """An optimizer that counts steps may have made its state before the first; others begin with that."""
        return self._num_steps.get(entry.index, 0) > 0 or (self._kind.counts_steps and entry.index in self._num_steps)

    def _state(self, partition: Partition, entry: Entry) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if isinstance(self._stepper, TorchStepper):
            state = self._stepper.state_of(entry.index) or {}
        elif self._kind.counts_steps:
            state["step"] = torch.tensor(float(self._num_steps[entry.index]))
        for name in self._kind.names:
            values = torch.empty(entry.numel, dtype=torch.float32)
            self._values.read_into(partition, entry, values, name)
            state[name] = values.view(entry.shape)
        return state
