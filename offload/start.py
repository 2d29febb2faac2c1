"""The door: arguments of `enable` into a plan and a session.

Owns: checking, defaults, and the order of the start: everything that can be refused is refused before anything is
allocated.
Does not: run the session.
"""

import dataclasses
import errno
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from offload.config import MAX_SKIPPED_STEPS, Config, gradient_precision, make_config
from offload.device import Device, make_device
from offload.disk.io_queue import IoQueue
from offload.errors import BudgetError, ConfigError, UnsupportedModelError
from offload.lanes import Lanes
from offload.optimizer.kinds import OptimizerKind, kind_of, splits
from offload.partition import Partition, partition_model
from offload.placement.disk_settings import DiskSettings, settings_for
from offload.placement.hardware import default_disk_budget, default_host_budget, free_disk_bytes, free_host_bytes
from offload.placement.plan import Budgets, Encoding, PartitionSizes, Plan, plan
from offload.session import Session
from offload.storage import QueueOf
from offload.timeline import Timeline
from offload.units import format_bytes

log = logging.getLogger("offload")

WHOLE_COPIES: Final = 4
"""Temporary tensors of a parameter's shape in the step of an optimizer that sees whole parameters."""


def enable(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    device: torch.device | str | None = None,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    disk: str | Path | Sequence[str | Path] | None = None,
    disk_space: int | str | None = None,
    precision: str = "bf16",
    max_grad_norm: float | None = None,
    accumulate: int | None = None,
    max_skipped_steps: int = MAX_SKIPPED_STEPS,
    overlap: str = "forward",
    state_dtype: str = "fp32",
    checksum: bool = False,
    wait_timeout_s: float = 600.0,
) -> Session:
    """Offload `model` and the state of `optimizer`; train inside the returned context with an ordinary loop.

    device_memory: bytes (or "8GiB") that weights, gradients and state may take on the device; default: what is free.
    host_memory: bytes of page-locked host memory; default: what is available, less a margin.
    disk: folder or folders for swap files; without one everything must fit device and host.
    disk_space: bytes on these folders; default: 95 % of what is free.
    precision: "bf16", "fp32", or "fp16" (with dynamic loss scaling: call session.backward(loss)): the dtype of weights
        and gradients on the device. Masters are fp32, and moments unless state_dtype says otherwise.
    max_grad_norm: clip the global gradient norm inside the step, as torch.nn.utils.clip_grad_norm_ does.
    accumulate: backwards per step; 1 keeps gradients in 16 bit on the host, None or more in fp32.
    max_skipped_steps: steps skipped in a row, for gradients that are not finite, before NonFiniteError.
    overlap: what the optimizer's step overlaps: the next "forward" (exact, with clipping); also "backward", each block
        stepped when its gradient is complete (fp32 and bf16, no clipping, accumulate given, no reentrant checkpoints;
        what then goes wrong before step() fails the session); or nothing ("off"). The bits are the same.
    state_dtype: how Adam's moments are kept: "fp32" (exact), or rounded: "bf16" (stochastically, reproducible; half
        the bytes) or "8bit" (blocks of 256 that share a scale; a quarter).
    checksum: keep a checksum of every piece on disk and verify it at each read; DiskCorruptionError where it differs.
    wait_timeout_s: how long nothing may move on any lane before a wait raises WaitTimeoutError.

    Raises ConfigError, BudgetError, UnsupportedModelError, UnsupportedOptimizerError or DiskError with the remedy; the
    model is then as it was. Where a disk that had the room fails while the weights are written to it, the weights that
    had left the model by then are lost.
    """
    config = make_config(
        device_memory=device_memory, host_memory=host_memory, disk=disk, disk_space=disk_space, precision=precision,
        max_grad_norm=max_grad_norm, accumulate=accumulate, wait_timeout_s=wait_timeout_s,
        max_skipped_steps=max_skipped_steps, state_dtype=state_dtype, checksum=checksum, overlap=overlap,
    )  # fmt: skip
    return start(model, optimizer, config, device)


def start(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    config: Config,
    device: torch.device | str | None,
    *,
    lanes: Lanes | None = None,
    queue_of: QueueOf = IoQueue,
    device_of: Callable[[torch.device | str | None, Lanes], Device] = make_device,
    plan_of: "Callable[[Sequence[Partition], Config, Device, OptimizerKind, DiskSettings], Plan] | None" = None,
) -> Session:
    """As `enable`, from a checked configuration; tests bring their own lanes, device and plan."""
    check_parameters(model, optimizer)
    group_of = check_model(model, optimizer)
    kind = kind_of(optimizer, config.state_dtype)
    check_device(device)
    lanes = lanes if lanes is not None else Lanes(Timeline(), wait_timeout_s=config.wait_timeout_s)
    made: Device | None = None
    try:
        made = device_of(device, lanes)
        config = with_defaults(config, made)
        itemsize = config.precision.dtype.itemsize
        partitions = partition_model(model, group_of, itemsize=itemsize, align_numel=kind.align_numel)
        disk = settings_for(config.disk_folders, checksum=config.checksum)
        chosen = (plan_of or make_plan)(partitions, config, made, kind, disk)
    except BaseException:
        lanes.close()
        raise
    return Session(
        model, optimizer, kind=kind, config=config, disk=disk, plan=chosen, partitions=partitions, device=made,
        lanes=lanes, timeline=lanes.timeline, queue_of=queue_of,
    )  # fmt: skip


def check_parameters(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise ConfigError, or UnsupportedModelError, for a parameter that cannot be offloaded or is stepped twice."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is {model!r}; pass the torch.nn.Module to offload.")
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, name in names.items():
        if isinstance(parameter, UninitializedParameter):
            raise UnsupportedModelError(f"parameter {name!r} is lazy and has no shape yet; call the model once before.")
        if parameter.numel() > 1 and not any(parameter.stride()):
            raise UnsupportedModelError(
                f"parameter {name!r} shows one element in all its places: another session holds the model (leave that "
                "first), or it was expanded (clone it)."
            )
        if parameter.requires_grad and not parameter.is_floating_point():
            raise UnsupportedModelError(
                f"parameter {name!r} has dtype {parameter.dtype} and requires a gradient, and only floating ones are "
                "stepped; keep its real and imaginary parts in two parameters, or set requires_grad_(False)."
            )
    deferred = [name for parameter, name in names.items() if parameter.is_meta]
    real = [name for parameter, name in names.items() if not parameter.is_meta]
    if deferred and real:
        raise UnsupportedModelError(
            f"the model's parameters are on several devices: {deferred[0]!r} is on meta (and would be initialised "
            f"anew), {real[0]!r} is on {model.get_parameter(real[0]).device}; build the whole model inside "
            "offload.deferred_init, or none of it."
        )
    group_of: dict[nn.Parameter, int] = {}
    for index, group in enumerate(getattr(optimizer, "param_groups", ())):
        for parameter in group["params"]:
            if parameter in group_of:
                raise ConfigError(
                    f"parameter {names.get(parameter, 'of another model')!r} is in the optimizer twice, in groups "
                    f"{group_of[parameter]} and {index}, and can only be stepped with one set of options; take it out "
                    "of one."
                )
            group_of[parameter] = index


def check_model(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Mapping[nn.Parameter, int]:
    """Optimizer group by parameter; raises where the model cannot be offloaded."""
    devices = {parameter.device for parameter in model.parameters() if not parameter.is_meta}
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"the model's parameters are on several devices ({', '.join(sorted(map(str, devices)))}); move it to one."
        )
    if optimizer is None:
        return {}
    group_of: dict[nn.Parameter, int] = {}
    own = set(model.parameters())
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter not in own:
                raise UnsupportedModelError(
                    f"group {index} of the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not "
                    "the model's; build the optimizer from model.parameters()."
                )
            group_of[parameter] = index
    missing = sum(1 for p in own if p.requires_grad and p not in group_of)
    if missing:
        log.warning("%d parameters require gradients but are in no optimizer group: they stay as they are", missing)
    return group_of


def check_device(device: torch.device | str | None) -> None:
    """Raise ConfigError for a name that torch does not know."""
    try:
        torch.device(device if device is not None else "cpu")
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device={device!r} is not a device; name one as 'cuda', 'cuda:1' or 'cpu'.") from error


def with_defaults(config: Config, device: Device) -> Config:
    """The configuration with every budget filled in; raises BudgetError where one exceeds the machine."""
    if config.host_bytes is not None and config.host_bytes > free_host_bytes():
        raise BudgetError(
            f"host_memory is {format_bytes(config.host_bytes)}, but this machine has only "
            f"{format_bytes(free_host_bytes())} available; lower it, and give disk= a folder for the rest."
        )
    for folder in config.disk_folders:
        if not folder.is_dir():
            raise ConfigError(f"disk={str(folder)!r} is not a folder; make it, or name one that exists.")
        try:
            Path(tempfile.mkdtemp(prefix="offload-", dir=folder)).rmdir()  # rights alone do not tell: /sys, for one
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a full disk is measured where the bytes are known
                raise ConfigError(
                    f"disk={str(folder)!r} cannot be written ({error.strerror}); give this user the right to write, or "
                    "name another folder."
                ) from error
    if device.is_host and config.device_bytes is not None and config.device_bytes > free_host_bytes():
        raise BudgetError(
            f"device_memory is {format_bytes(config.device_bytes)}, but the device is the CPU, whose machine has only "
            f"{format_bytes(free_host_bytes())} available; lower it."
        )
    if config.disk_bytes is not None and config.disk_bytes > free_disk_bytes(config.disk_folders):
        names = ", ".join(map(str, config.disk_folders))
        raise BudgetError(
            f"disk_space is {format_bytes(config.disk_bytes)}, but {names} has only "
            f"{format_bytes(free_disk_bytes(config.disk_folders))} free; lower it, free some, or name another disk=."
        )
    disk_budget = default_disk_budget(config.disk_folders) if config.disk_folders else 0
    return dataclasses.replace(
        config,
        device_bytes=config.device_bytes if config.device_bytes is not None else device.free_bytes() * 9 // 10,
        host_bytes=config.host_bytes if config.host_bytes is not None else default_host_budget(),
        disk_bytes=config.disk_bytes if config.disk_bytes is not None else disk_budget,
    )


def whole_bytes(partition: Partition) -> int:
    """Host memory for stepping the largest parameter whole: fp32 copies of master and gradient, and torch's own."""
    return WHOLE_COPIES * 4 * max((entry.numel for entry in partition.trainable.entries), default=0)


def make_plan(
    partitions: Sequence[Partition], config: Config, device: Device, kind: OptimizerKind, disk: DiskSettings
) -> Plan:
    """Homes and ring sizes for these partitions under these budgets."""
    itemsize = config.precision.dtype.itemsize
    at_home, on_device = (
        tuple((plane.name, plane.bytes_per_element) for plane in kind.planes(split=split))
        for split in (splits(config.precision, weights_on_device=there) for there in (False, True))
    )
    encoding = Encoding(
        weight_itemsize=itemsize,
        wire_itemsize=itemsize,
        gradient_itemsize=gradient_precision(config).dtype.itemsize,
        planes=at_home,
        resident_planes=on_device,
        whole_partitions=kind.whole,
    )
    sizes = [
        PartitionSizes(
            id=p.id,
            name=p.name,
            trainable_numel=p.trainable.numel,
            frozen_numel=p.frozen.numel,
            held_with=p.held_with,
            build_bytes=max(p.build_bytes, whole_bytes(p) if kind.whole else 0),
        )
        for p in partitions
    ]
    budgets = Budgets(config.device_bytes, config.host_bytes, config.disk_bytes or 0)
    return plan(
        sizes, encoding, budgets, device_state=device.is_host, in_flight_bytes=disk.in_flight_bytes,
        minimum_rings=config.minimum_rings,
    )  # fmt: skip
