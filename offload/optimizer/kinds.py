"""Kinds of optimizers: which state tensors each keeps, and who steps it.

Owns: the table of torch optimizers that have a kernel, and of the forms of their moments.
Does not: lay out records (storage/state_tensors.py) or step (kernel_step.py, torch_step.py).
Threads: the training thread.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch

from offload.config import Precision
from offload.errors import UnsupportedOptimizerError
from offload.kernels.dynamic_map import BLOCK_8BIT_NUMEL
from offload.kernels.workers import Workers
from offload.optim import Lion
from offload.optimizer import torch_step
from offload.optimizer.hyper import AdagradHyper, AdamHyper, LionHyper, Options, SGDHyper
from offload.optimizer.kernel_step import KernelStepper, Stepper
from offload.optimizer.probe import probe
from offload.storage.state_tensors import MASTER, REMAINDER, SCALE, StateTensor, StateTensors

REFUSED: Final = {"differentiable": "it would keep a graph through the step", "capturable": "steps run on the host"}
"""Options that nobody here can honour, and why."""


@dataclass(frozen=True, slots=True)
class OptimizerKind:
    """What the session knows of its optimizer."""

    name: str
    moments: StateTensors
    """What it keeps in addition to the master."""
    names: tuple[str, ...]
    """Its moments as torch calls them; a state tensor of scales is not one."""
    counts_steps: bool
    """torch keeps `step` in its state."""
    align_numel: int
    """Every parameter starts at a multiple of this."""
    whole: bool
    """It must see whole parameters: every partition is one chunk."""
    snapshot: Callable[[torch.optim.Optimizer], tuple[Any, ...]]
    """Options of every group, as plain values."""
    stepper: Callable[[Precision, Precision, Workers], Stepper]
    """From (precision of gradients in their homes, working precision, workers)."""
    small_bytes: int = 0
    """Host memory for state that is in no state tensor."""
    on_accelerator: bool = False
    """Its state may be resident on an accelerator: device_step.py steps it there."""

    def state_tensors(self, *, split: bool) -> StateTensors:
        """All state tensors of a record."""
        return (REMAINDER if split else MASTER, *self.moments)


def splits(precision: Precision, *, weights_on_device: bool) -> bool:
    """Whether a partition's master is kept as its weights and a remainder.

    Not where the weights are resident on the device: the kernel, which needs them then, runs on the host.
    """
    return precision is Precision.BF16 and not weights_on_device


def kind_of(optimizer: torch.optim.Optimizer | None, state_dtype: str = "fp32") -> OptimizerKind:
    """The kind of this optimizer; raises UnsupportedOptimizerError for options that nobody can honour."""
    if optimizer is None:
        return _with_kernel("none", (), lambda _: None)
    kind = _kind_of(optimizer, state_dtype)
    return replace(kind, snapshot=partial(_of_same_groups, kind.snapshot, _members(optimizer)))


def _members(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]


def _of_same_groups(
    snapshot: Callable[[torch.optim.Optimizer], tuple[Any, ...]], members: list[list[int]],
    optimizer: torch.optim.Optimizer,
) -> tuple[Any, ...]:  # fmt: skip
    """The snapshot, unless a parameter was added, taken out or moved: it would be stepped as before, or not at all."""
    if _members(optimizer) != members:
        raise UnsupportedOptimizerError(
            f"the groups of {type(optimizer).__name__} hold other parameters than when the session began; leave the "
            "context, change them, and call offload.enable again."
        )
    return snapshot(optimizer)


def _kind_of(optimizer: torch.optim.Optimizer, state_dtype: str) -> OptimizerKind:
    name = type(optimizer).__name__
    for index, group in enumerate(optimizer.param_groups):
        for option, why in REFUSED.items():
            if group.get(option):
                raise UnsupportedOptimizerError(
                    f"group {index} of {name} has {option}=True, which cannot be offloaded: {why}; set it to False."
                )
    is_adam = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
    if state_dtype != "fp32" and not is_adam:
        raise UnsupportedOptimizerError(
            f"state_dtype={state_dtype!r} is for Adam and AdamW alone, not for {name}; leave it at 'fp32'."
        )
    if is_adam:
        return _adam(optimizer, state_dtype)
    if type(optimizer) is Lion:
        return _with_kernel(name, _fp32("exp_avg"), LionHyper.of)
    if type(optimizer) is torch.optim.Adagrad:
        return _with_kernel(name, _fp32("sum"), AdagradHyper.of, counts_steps=True)
    if type(optimizer) is torch.optim.SGD:
        has_momentum = any(group["momentum"] for group in optimizer.param_groups)
        return _with_kernel(name, _fp32("momentum_buffer") if has_momentum else (), SGDHyper.of)
    state_forms = probe(optimizer)
    return OptimizerKind(
        name=name,
        moments=state_forms.tensors,
        names=tuple(state_tensor.name for state_tensor in state_forms.tensors),
        counts_steps=False,
        align_numel=1,
        whole=not torch_step.is_elementwise(optimizer),
        snapshot=torch_step.groups_of,
        stepper=lambda gradient, precision, workers: torch_step.TorchStepper(optimizer, state_forms),
        small_bytes=state_forms.small_bytes,
    )


def _fp32(*names: str) -> StateTensors:
    return tuple(StateTensor(name, torch.float32) for name in names)


def _adam(optimizer: torch.optim.Optimizer, state_dtype: str) -> OptimizerKind:
    amsgrad = any(group["amsgrad"] for group in optimizer.param_groups)
    if amsgrad and state_dtype != "fp32":
        raise UnsupportedOptimizerError(
            f"amsgrad=True keeps maxima, which state_dtype={state_dtype!r} would round; leave it at 'fp32'."
        )
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if amsgrad else 2]
    moments = _fp32(*names)
    if state_dtype == "bf16":
        moments = tuple(StateTensor(name, torch.bfloat16) for name in names)
    elif state_dtype == "8bit":
        moments = tuple(
            state_tensor
            for name in names
            for state_tensor in (
                StateTensor(name, torch.uint8),
                StateTensor(name + SCALE, torch.float32, BLOCK_8BIT_NUMEL),
            )
        )
    kind = _with_kernel(type(optimizer).__name__, moments, partial(AdamHyper.of, state=state_dtype), counts_steps=True)
    align_numel = BLOCK_8BIT_NUMEL if state_dtype == "8bit" else 1
    return replace(kind, names=names, align_numel=align_numel, on_accelerator=state_dtype == "fp32")


def _with_kernel(
    name: str, moments: StateTensors, of_group: Callable[[Options], Any], *, counts_steps: bool = False
) -> OptimizerKind:
    held = {state_tensor.name for state_tensor in moments}

    def snapshot(optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
        hypers = tuple(of_group(group) for group in optimizer.param_groups)
        for index, hyper in enumerate(hypers):
            missing = sorted(set(hyper.state_tensors) - held)
            if missing:
                raise UnsupportedOptimizerError(
                    f"group {index} of {name} was changed to options that need {', '.join(missing)}, which this "
                    "session does not keep; set them before offload.enable."
                )
        return hypers

    return OptimizerKind(
        name=name,
        moments=moments,
        names=tuple(state_tensor.name for state_tensor in moments),
        counts_steps=counts_steps,
        align_numel=1,
        whole=False,
        snapshot=snapshot,
        stepper=lambda gradient, precision, workers: KernelStepper(
            gradient=gradient, precision=precision, workers=workers
        ),
    )


def has_begun(state: Mapping[str, Any]) -> int:
    """Steps that a parameter with this state has taken, as far as it tells: for SGD, whether it has momentum."""
    if "step" in state:
        return int(state["step"])
    return int(any(isinstance(value, torch.Tensor) for value in state.values()))
