"""The door: arguments of `enable` into a plan and a session.

Owns: checking, defaults, and the order of the start: everything that can be refused is refused before anything is
allocated.
Does not: run the session.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import nn

from offload.assembly import Subject
from offload.concurrency.lanes import Lanes
from offload.concurrency.timeline import Timeline
from offload.config import MAX_SKIPPED_STEPS, Config, gradient_precision, make_config
from offload.device.choose import make_device
from offload.device.protocol import Device
from offload.disk.io_queue import IoQueue
from offload.errors import BudgetError, ConfigError, DiskFullError, RanksDivergedError, UnsupportedModelError
from offload.memory.ledger import Ledger
from offload.model.checks import check_device, check_model
from offload.model.partitions import Partition, partition_model
from offload.open_sessions import collect_dropped, open_sessions, session_of
from offload.optimizer.device_step import DEVICE_WORKSPACE_ITEMSIZE
from offload.optimizer.kinds import OptimizerKind, has_begun, kind_of, splits
from offload.planning.disk_settings import DiskSettings, settings_for
from offload.planning.hardware import default_disk_budget, default_host_budget, free_disk_bytes, free_host_bytes
from offload.planning.planner import Budgets, Encoding, PartitionSizes, Plan, Planner, plan
from offload.ranks.collectives import ProcessRanks
from offload.ranks.protocol import Ranks
from offload.ranks.single import SINGLE_RANK
from offload.runtime import Runtime
from offload.session import Session
from offload.storage.allocation import QueueOf
from offload.units import Tier, format_bytes

log = logging.getLogger("offload")

PlanOf = Callable[[Sequence[Partition], Config, Device, OptimizerKind, DiskSettings, Ranks], Plan]
"""Makes the plan."""

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
    precision: str | torch.dtype = "bf16",
    max_grad_norm: float | None = None,
    accumulate: int | None = None,
    max_skipped_steps: int = MAX_SKIPPED_STEPS,
    overlap: str = "forward",
    state_dtype: str | torch.dtype = "fp32",
    checksum: bool = False,
    process_group: "dist.ProcessGroup | None" = None,
    reduce_dtype: str | torch.dtype = "fp32",
    wait_timeout_s: float = 600.0,
) -> Session:
    """Offload `model` and the state of `optimizer`; train inside the returned context with an ordinary loop.

    device_memory: bytes (or "8GiB") that weights, gradients and state may take on the device; default: half of
        what is free; the rest is for activations.
    host_memory: bytes of page-locked host memory of this node, shared by its ranks; default: what is available, less
        a margin.
    disk: folder or folders (`~` is the home folder) for swap files; without one everything must fit device and host.
    disk_space: bytes on these folders, shared by the ranks of this node; default: 95 % of what is free.
    precision: "bf16", "fp32", or "fp16" (with dynamic loss scaling: call session.backward(loss)), or torch's names and
        dtypes of these: that of weights and gradients on the device. Masters are fp32, and moments unless state_dtype
        says otherwise.
    max_grad_norm: clip the global gradient norm inside the step, as torch.nn.utils.clip_grad_norm_ does.
    accumulate: backwards per step; 1 keeps gradients in 16 bit on the host, None or more in fp32.
    max_skipped_steps: steps skipped in a row, for gradients that are not finite, before NonFiniteError.
    overlap: what the optimizer's step overlaps: the next "forward" (exact, with clipping); also "backward", each block
        stepped when its gradient is complete (fp32 and bf16, no clipping, accumulate given, no reentrant checkpoints;
        what then goes wrong before step() fails the session); or nothing ("off"). The bits are the same.
    state_dtype: how Adam's moments are kept: "fp32" (exact), or rounded: "bf16" (stochastically, reproducible; half
        the bytes) or "8bit" (blocks of 256 that share a scale; a quarter).
    checksum: keep a checksum of every chunk on disk and verify it at each read; DiskCorruptionError where it differs.
    process_group: ranks that train one model, each on its part of the batch, and share its weights, gradients and
        state; default: all of torch.distributed where it is initialised. Every rank makes the same calls; losses are
        means, and so are gradients. Weights are those of the first rank.
    reduce_dtype: in which gradients of several ranks are summed: "fp32", or the "working" dtype.
    wait_timeout_s: how long nothing may move on any lane, or a rank be missing, before a wait raises.

    Raises ConfigError, BudgetError, UnsupportedModelError, UnsupportedOptimizerError or DiskError with the remedy; the
    model is then as it was. Where a disk that had the room fails while the weights are written to it, the weights that
    had left the model by then are lost.
    """
    config = make_config(
        device_memory=device_memory, host_memory=host_memory, disk=disk, disk_space=disk_space, precision=precision,
        max_grad_norm=max_grad_norm, accumulate=accumulate, wait_timeout_s=wait_timeout_s,
        max_skipped_steps=max_skipped_steps, state_dtype=state_dtype, checksum=checksum, overlap=overlap,
        reduce_dtype=reduce_dtype,
    )  # fmt: skip

    def ranks_of(chosen: torch.device) -> Ranks:
        return ProcessRanks.join(process_group, device=chosen, wait_timeout_s=config.wait_timeout_s)

    return start(model, optimizer, config, device, ranks_of=ranks_of)


def _single_rank(device: torch.device) -> Ranks:
    return SINGLE_RANK


@contextlib.contextmanager
def _others_named() -> Iterator[None]:
    """An error for want of room names the other open sessions, which have some of it."""
    try:
        yield
    except (BudgetError, DiskFullError) as error:
        if others := open_sessions():
            names = ", ".join(other.describe() for other in others)
            error.args = (f"{error} Room is also held by {names}: close what is done with (offload.close_all()).",)
        raise


def start(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    config: Config,
    device: torch.device | str | None,
    *,
    lanes: Lanes | None = None,
    queue_of: QueueOf = IoQueue,
    device_of: Callable[[torch.device | str | None, Lanes], Device] = make_device,
    plan_of: "PlanOf | None" = None,
    ranks_of: Callable[[torch.device], Ranks] = _single_rank,
) -> Session:
    """As `enable`, from a checked configuration; tests bring their own lanes, device, plan and ranks."""
    collect_dropped()
    _check_free(model)
    with _others_named():
        group_of = check_model(model, optimizer)
        subject = Subject(model=model, optimizer=optimizer, kind=kind_of(optimizer, config.state_dtype))
        check_device(device)
        lanes = lanes if lanes is not None else Lanes(Timeline(), wait_timeout_s=config.wait_timeout_s)
        ranks: Ranks = SINGLE_RANK
        try:
            made = device_of(device, lanes)
            ranks = ranks_of(made.torch_device)
            config = with_defaults(config, made)
            config = shared_budgets(config, ranks, subject.kind)
            partitions = partition_model(
                model, group_of, itemsize=config.precision.dtype.itemsize, align_numel=subject.kind.align_numel,
                world_size=ranks.world_size,
            )  # fmt: skip
            disk = settings_for(config.disk_folders, checksum=config.checksum)
            chosen = (plan_of or make_plan)(partitions, config, made, subject.kind, disk, ranks)
            _check_alike(ranks, chosen, partitions, config, optimizer, subject.kind)
        except BaseException as error:
            lanes.close()
            ranks.note_failure(f"{type(error).__name__} in offload.enable: {error}")
            ranks.close()
            raise
        budgets = {Tier.DEVICE: config.device_bytes, Tier.HOST: config.host_bytes, Tier.DISK: config.disk_bytes}
        runtime = Runtime(
            config=config,
            device=made,
            lanes=lanes,
            ledger=Ledger(budgets),
            partitions=partitions,
            plan=chosen,
            ranks=ranks,
        )
        return Session(runtime, subject, disk, queue_of)


def _check_free(model: nn.Module) -> None:
    """Raise UnsupportedModelError where an open session holds the model."""
    if isinstance(model, nn.Module) and (session := session_of(model)) is not None:
        raise UnsupportedModelError(
            f"another session holds the model: {session.describe()}. Close that first (session.close()); where you "
            "have no name for it any more, offload.close_all() closes every open session."
        )


def shared_budgets(config: Config, ranks: Ranks, kind: OptimizerKind) -> Config:
    """The budgets of each rank: its part of the node's, and the same on all ranks, so that all plan alike.

    Raises ConfigError for what needs one rank.
    """
    if ranks.is_sharded and config.overlap == "backward":
        raise ConfigError(
            'overlap="backward" steps a block before the ranks have agreed which gradients there are: it works on one '
            'rank alone. Use overlap="forward".'
        )
    if ranks.is_sharded and kind.whole:
        raise ConfigError(
            f"{kind.name} steps parameters whole, and with {ranks.world_size} ranks each holds a part of every one. "
            "Use an elementwise optimizer (AdamW, SGD, Lion …), or one rank."
        )
    own = (
        config.device_bytes,
        None if config.host_bytes is None else config.host_bytes // ranks.num_local,
        None if config.disk_bytes is None else config.disk_bytes // ranks.num_local,
    )
    of_all = [json.loads(text) for text in ranks.exchange(json.dumps(own))]
    device, host, disk = (
        min((v for v in values if v is not None), default=None) for values in zip(*of_all, strict=True)
    )
    return dataclasses.replace(config, device_bytes=device, host_bytes=host, disk_bytes=disk)


def _check_alike(
    ranks: Ranks,
    chosen: Plan,
    partitions: Sequence[Partition],
    config: Config,
    optimizer: torch.optim.Optimizer | None,
    kind: OptimizerKind,
) -> None:
    """Ranks that differ would exchange other bytes, or take parts of different values for one: an error now, not a
    hang or a wrong sum later.
    """
    entries = [entry for partition in partitions for entry in partition.entries()]
    layout = [(e.name, e.start, tuple(e.shape), e.index, e.group) for e in entries]
    states = [optimizer.state.get(e.parameter, {}) for e in entries] if optimizer is not None else []
    arguments = dataclasses.replace(config, disk_folders=())  # each may have disks of its own
    own = {
        "the arguments of offload.enable": repr(arguments),
        "the optimizer": f"{kind.name} {kind.moments}",
        "the model, or which of its parameters the optimizer has in which group": repr(layout),
        "what the optimizer knows of earlier steps": repr([(has_begun(s), sorted(map(str, s))) for s in states]),
        "the plan": repr(chosen),
    }
    of_all = [
        json.loads(text)
        for text in ranks.exchange(
            json.dumps({what: hashlib.sha256(text.encode()).hexdigest() for what, text in own.items()})
        )
    ]
    for what in own:
        if differing := [rank for rank, one in enumerate(of_all) if one[what] != of_all[0][what]]:
            raise RanksDivergedError(
                f"ranks {differing} differ from rank 0 in {what}. Build the model and its optimizer alike on every "
                "rank, and call offload.enable with the same arguments."
            )


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
        device_bytes=config.device_bytes if config.device_bytes is not None else device.free_bytes() // 2,
        host_bytes=config.host_bytes if config.host_bytes is not None else default_host_budget(),
        disk_bytes=config.disk_bytes if config.disk_bytes is not None else disk_budget,
    )


def whole_bytes(partition: Partition) -> int:
    """Host memory for stepping the largest parameter whole: fp32 copies of master and gradient, and torch's own."""
    return WHOLE_COPIES * 4 * max((entry.numel for entry in partition.trainable.entries), default=0)


def make_plan(
    partitions: Sequence[Partition],
    config: Config,
    device: Device,
    kind: OptimizerKind,
    disk: DiskSettings,
    ranks: Ranks = SINGLE_RANK,
    *,
    planner: type[Planner] = Planner,
) -> Plan:
    """Homes and ring sizes for these partitions under these budgets."""
    itemsize = config.precision.dtype.itemsize
    at_home, on_device = (
        tuple((state_tensor.name, state_tensor.bytes_per_element) for state_tensor in kind.state_tensors(split=split))
        for split in (splits(config.precision, weights_on_device=there) for there in (False, True))
    )
    encoding = Encoding(
        weight_itemsize=itemsize,
        wire_itemsize=itemsize,
        gradient_itemsize=gradient_precision(config).dtype.itemsize,
        state_tensors=at_home,
        resident_state_tensors=on_device,
        whole_partitions=kind.whole,
        device_workspace_itemsize=0 if device.is_host else DEVICE_WORKSPACE_ITEMSIZE,
    )
    sizes = [
        PartitionSizes(
            id=p.id,
            name=p.name,
            trainable_numel=p.trainable.numel // ranks.world_size,
            frozen_numel=p.frozen.numel // ranks.world_size,
            held_with=p.held_with,
            build_bytes=max(p.build_bytes, whole_bytes(p) if kind.whole else 0) + kind.small_bytes,
        )
        for p in partitions
    ]
    budgets = Budgets(config.device_bytes, config.host_bytes, config.disk_bytes or 0)
    return plan(
        sizes, encoding, budgets, world_size=ranks.world_size, is_sharded=ranks.is_sharded,
        device_state=device.is_host or kind.on_accelerator, spare_slot=device.slots_share_a_block,
        in_flight_bytes=disk.in_flight_bytes, planner=planner,
    )  # fmt: skip
