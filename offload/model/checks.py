"""What can be refused about a model, its optimizer and its device: before anything is made, and at every step.

Owns: the refusals that need nothing but the arguments of `enable`.
Does not: look at budgets or the machine (enable.py).
Threads: the training thread.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim.lr_scheduler import LRScheduler

from offload.errors import ConfigError, UnsupportedModelError, UnsupportedOptimizerError
from offload.model.partitions import Entry, Partition
from offload.model.placeholders import Placeholder

log = logging.getLogger("offload")

WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
"""Names of torch's classes that reduce gradients or hold weights themselves."""


def check_model(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Mapping[nn.Parameter, int]:
    """Optimizer group by parameter; raises ConfigError or UnsupportedModelError where the model cannot be offloaded."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is {_named(model)}; pass the torch.nn.Module to offload.")
    _check_optimizer(optimizer)
    _check_wrappers(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    _check_parameters(names)
    _check_devices(names)
    _check_memory(names)
    group_of = _groups(optimizer, names)
    missing = sum(1 for parameter in names if parameter.requires_grad and parameter not in group_of)
    if missing and optimizer is not None:
        log.warning("%d parameters require gradients but are in no optimizer group: they stay as they are", missing)
    return group_of


def _named(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def _check_optimizer(optimizer: torch.optim.Optimizer | None) -> None:
    """Raise ConfigError for what only belongs to an optimizer, and for a learning rate that is not finite."""
    if optimizer is None:
        return
    if isinstance(optimizer, LRScheduler):
        raise ConfigError(
            f"optimizer is a {type(optimizer).__name__}, a scheduler of learning rates; pass the optimizer that it was "
            "made with."
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer is {_named(optimizer)}; pass an optimizer of the model's parameters, as "
            "torch.optim.AdamW(model.parameters()), or None to run the model without training it."
        )
    for index, group in enumerate(optimizer.param_groups):
        lr = group.get("lr")
        if lr is not None and not math.isfinite(lr):  # None: the optimizer finds its own
            raise ConfigError(f"group {index} of the optimizer has lr={lr!r}; set a finite learning rate.")


def _check_wrappers(model: nn.Module) -> None:
    for name, module in model.named_modules():
        wrapper = next((c.__name__ for c in type(module).__mro__ if c.__name__ in WRAPPERS), None)
        if wrapper is not None:
            raise UnsupportedModelError(
                f"{name or 'the model'} is wrapped in {wrapper}, which averages gradients and places weights itself; "
                "pass the model without it: offload.enable does both over the ranks of process_group."
            )


def _check_parameters(names: Mapping[nn.Parameter, str]) -> None:
    for parameter, name in names.items():
        if isinstance(parameter, UninitializedParameter):
            raise UnsupportedModelError(f"parameter {name!r} is lazy and has no shape yet; call the model once before.")
        if isinstance(parameter, Placeholder):
            raise UnsupportedModelError(
                f"parameter {name!r} is a placeholder: a session of this model was closed with give_back=False, or had "
                "failed, so its weights were dropped. Build the model again, and session.load a checkpoint."
            )
        if type(parameter.data) is not torch.Tensor:
            raise UnsupportedModelError(
                f"parameter {name!r} is a {type(parameter.data).__name__}, whose memory is not a plain array (another "
                "kind of parallelism or quantisation holds it); pass a model of ordinary tensors."
            )
        if parameter.numel() > 1 and not any(parameter.stride()):
            raise UnsupportedModelError(f"parameter {name!r} shows one element in all its places; clone it.")
        if parameter.requires_grad and not parameter.is_floating_point():
            raise UnsupportedModelError(
                f"parameter {name!r} has dtype {parameter.dtype} and requires a gradient, and only floating ones are "
                "stepped; keep its real and imaginary parts in two parameters, or set requires_grad_(False)."
            )


def _check_memory(names: Mapping[nn.Parameter, str]) -> None:
    """Each parameter gets memory of its own, so that a step of one would not be seen by the other any more."""
    places = sorted(
        ((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name) for p, name in names.items()
         if p.numel() and not p.is_meta and _is_dense(p))
    )  # fmt: skip
    for (_, stop, one), (start, _, other) in pairwise(places):
        if start < stop:
            raise UnsupportedModelError(
                f"parameters {one!r} and {other!r} share memory, but are two; make them one (the same nn.Parameter in "
                "both places), or clone one."
            )


def _is_dense(tensor: torch.Tensor) -> bool:
    """Its elements fill the memory from the first to the last."""
    return sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1 == tensor.numel()


def _check_devices(names: Mapping[nn.Parameter, str]) -> None:
    deferred = [name for parameter, name in names.items() if parameter.is_meta]
    real = {name: parameter.device for parameter, name in names.items() if not parameter.is_meta}
    if deferred and real:
        name, device = next(iter(real.items()))
        raise UnsupportedModelError(
            f"the model's parameters are on several devices: {deferred[0]!r} is on meta (and would be initialised "
            f"anew), {name!r} is on {device}; build the whole model inside offload.deferred_init, or none of it."
        )
    if len(devices := set(real.values())) > 1:
        raise UnsupportedModelError(
            f"the model's parameters are on several devices ({', '.join(sorted(map(str, devices)))}); move it to one."
        )


def _groups(optimizer: torch.optim.Optimizer | None, names: Mapping[nn.Parameter, str]) -> Mapping[nn.Parameter, int]:
    group_of: dict[nn.Parameter, int] = {}
    for index, group in enumerate(getattr(optimizer, "param_groups", ())):
        for parameter in group["params"]:
            if parameter in group_of:
                raise ConfigError(
                    f"parameter {names.get(parameter, 'of another model')!r} is in the optimizer twice, in groups "
                    f"{group_of[parameter]} and {index}, and can only be stepped with one set of options; take it out "
                    "of one."
                )
            if parameter not in names:
                raise UnsupportedModelError(
                    f"group {index} of the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not "
                    "the model's; build the optimizer from model.parameters()."
                )
            group_of[parameter] = index
    return group_of


def check_device(device: torch.device | str | None) -> None:
    """Raise ConfigError for a name that torch does not know."""
    if device is None:
        return
    refused = ConfigError(f"device={device!r} is not a device; name one as 'cuda', 'cuda:1' or 'cpu'.")
    if not isinstance(device, str | torch.device):
        raise refused
    try:
        torch.device(device)
    except RuntimeError as error:
        raise refused from error


def frozen_in_groups(optimizer: torch.optim.Optimizer | None, partitions: Sequence[Partition]) -> list[Entry]:
    """Parameters that the optimizer holds and that were not trained when the partitions were made."""
    held = {parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]}
    return [entry for partition in partitions for entry in partition.frozen.entries if entry.parameter in held]


def check_still_frozen(entries: Sequence[Entry]) -> None:
    """Raise UnsupportedOptimizerError where one has a gradient: torch would step it, and it has no moments here."""
    for entry in entries:
        if entry.parameter.grad is not None:
            raise UnsupportedOptimizerError(
                f"parameter {entry.name!r} is trained now, and was frozen when the session began. Leave the context "
                "and call offload.enable again, or begin with it trained and freeze it by requires_grad_(False)."
            )
