"""What a run has besides values of parameters: options, random states, loss scale, small state, modules' own state.

Owns: its form in a checkpoint, and taking it over from one.
Does not: know state tensors (session_state.py) or files (format/).
Threads: the training thread, with idle lanes.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Final

import torch
from torch import Tensor, nn

from offload.checkpoint.format.errors import CheckpointError, CorruptCheckpointError, shown
from offload.checkpoint.format.user_data import random_states, set_random_states
from offload.checkpoint.session_state import SessionValues, names_by_tensor
from offload.errors import OffloadError
from offload.optimizer.history import StepHistory
from offload.optimizer.kernel_step import Stepper
from offload.optimizer.kinds import OptimizerKind
from offload.optimizer.torch_step import TorchStepper

NOT_OPTIONS: Final = ("params", "param_names")
"""What a group holds besides its options."""

STEP_HISTORY: Final = "outcomes"
"""In a checkpoint: the key of what older versions of the library saved, too."""

ANEW: Final = "state of the optimizer that is no array of a parameter's shape begins anew"


class RunState:
    """Gives and takes it."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        kind: OptimizerKind,
        *,
        stepper: Stepper,
        step_history: StepHistory,
        values: SessionValues,
        device: torch.device,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._kind = kind
        self._stepper = stepper
        self._step_history = step_history
        self._values = values
        self._device = device

    def snapshot(self) -> dict[str, Any]:
        """Everything, as plain values and tensors."""
        return {
            "random": self._random(),
            "optimizer": self._state_of(self._optimizer) if self._optimizer is not None else None,
            STEP_HISTORY: self._step_history.state(),
            "modules": states_of_modules(self._model),
        }

    def begin(self, saved: Mapping[str, Any], *, strict: bool, undo: ExitStack) -> list[str]:
        """Take over options and random states, which may raise. `undo` puts the old ones back. Returns notes."""
        try:
            return self._begin(saved, strict, undo)
        except OffloadError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise CorruptCheckpointError(
                f"what the checkpoint has besides values of parameters cannot be used: {shown(error)}."
            ) from error

    def _begin(self, saved: Mapping[str, Any], strict: bool, undo: ExitStack) -> list[str]:
        notes: list[str] = []
        if self._optimizer is not None and saved.get("optimizer") is not None:
            notes += self._take_options(self._optimizer, saved["optimizer"], strict, undo)
        if "random" in saved:
            undo.callback(self._set_random, self._random())
            notes += self._set_random(saved["random"])
        modules = {name for name, _ in _modules_with_state(self._model)}
        if (stored := saved.get("modules")) is not None and stored.keys() != modules:
            raise CheckpointError(
                f"the checkpoint has extra state of the modules {sorted(stored)}, the model expects {sorted(modules)}."
            )
        return notes

    def finish(self, saved: Mapping[str, Any], *, has_begun: bool) -> list[str]:
        """Take over the rest, once the values have come; `has_begun`: they were stepped before. Returns notes."""
        notes: list[str] = []
        optimizer = saved.get("optimizer") or {}
        small = optimizer["small_state"] if optimizer.get("kind") == self._kind.name else {}
        if isinstance(self._stepper, TorchStepper):
            self._stepper.forget()
            for name, entry in self._values.trainable():
                if name in small:
                    self._stepper.take_over(entry.index, small[name])
            if has_begun and not small:
                notes.append(ANEW)
        if STEP_HISTORY in saved:
            self._step_history.take_over(saved[STEP_HISTORY])
        for name, module in _modules_with_state(self._model):
            if name in saved.get("modules", {}):
                module.set_extra_state(saved["modules"][name])
        return notes

    # ----------------------------------------------------------------------------------------------- optimizer

    def _state_of(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        groups = [
            {"names": names, "options": {key: value for key, value in group.items() if key not in NOT_OPTIONS}}
            for group, names in zip(optimizer.param_groups, self._names_by_group(optimizer), strict=True)
        ]
        small = {}
        if isinstance(self._stepper, TorchStepper):
            for name, entry in self._values.trainable():
                if (state := self._stepper.state_of(entry.index)) is not None:
                    small[name] = state
        return {"kind": self._kind.name, "groups": groups, "small_state": small}

    def _names_by_group(self, optimizer: torch.optim.Optimizer) -> list[list[str]]:
        names = {tensor: first for tensor, (first, *_) in names_by_tensor(self._model).items()}
        return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]

    def _take_options(
        self, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], strict: bool, undo: ExitStack
    ) -> list[str]:
        flaw = None
        if saved["kind"] != self._kind.name:
            flaw = f"it was saved with the optimizer {saved['kind']}, this session has {self._kind.name}"
        elif [group["names"] for group in saved["groups"]] != self._names_by_group(optimizer):
            flaw = "its optimizer has other groups of parameters"
        if flaw is not None and strict:
            raise CheckpointError(
                f"{flaw}. Load with the optimizer that it was saved with; or give strict=False, which keeps the "
                "options that the groups have now."
            )
        if flaw is not None:
            return [f"options of the optimizer stay as they were: {flaw}"]
        for group, stored in zip(optimizer.param_groups, saved["groups"], strict=True):
            undo.callback(_restore, group, dict(group))
            group.update(stored["options"])
        self._kind.snapshot(optimizer)  # raises for options that need state tensors which this session does not keep
        return []

    # ------------------------------------------------------------------------------------------- random states

    def _random(self) -> dict[str, Any]:
        devices = {}
        if self._device.type != "cpu":
            devices[self._device.type] = torch.get_device_module(self._device).get_rng_state(self._device)
        return random_states(devices=devices)

    def _set_random(self, states: Mapping[str, Any]) -> list[str]:
        devices = set_random_states(states)
        if self._device.type == "cpu":
            return []
        state: Tensor | None = devices.get(self._device.type)
        if state is None:
            return [f"there is no random state of a {self._device.type} device"]
        torch.get_device_module(self._device).set_rng_state(state, self._device)
        return []


def states_of_modules(model: nn.Module) -> dict[str, Any]:
    """What modules have besides parameters and buffers, by their names."""
    return {name: module.get_extra_state() for name, module in _modules_with_state(model)}


def _modules_with_state(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield name, module


def _restore(group: dict[str, Any], before: dict[str, Any]) -> None:
    group.clear()
    group.update(before)
