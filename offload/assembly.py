"""The components of a session: made once, in the order in which they need each other.

Owns: which component is given which, and the order in which they end: the reverse of that in which they were made.
Does not: train, or know of the calls that a user makes (session.py).
Threads: made and ended by the training thread.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from offload.checkpoint.exports import Exports
from offload.checkpoint.loads import Loads
from offload.checkpoint.model_values import ModelState
from offload.checkpoint.run_state import RunState
from offload.checkpoint.saves import Saves
from offload.checkpoint.session_state import SessionValues
from offload.gradients.agreement import options_of
from offload.gradients.chunks import GradientChunk, gradient_chunk
from offload.gradients.intake import GradientIntake
from offload.gradients.offload import GradientOffload
from offload.gradients.on_device import OFFLOAD_WORKSPACE_ITEMSIZE
from offload.gradients.rank_reduction import RankReduction
from offload.gradients.reduction import LocalReduction, Reduction
from offload.gradients.slots import GradientSlots
from offload.gradients.state import GradientTable
from offload.kernels.workers import Workers
from offload.model.deferred import is_deferred, materialize
from offload.model.hooks import ModuleHooks
from offload.model.partitions import Partition
from offload.model.placeholders import PlaceholderTypes
from offload.optimizer.chunk_step import StateChunk, state_chunk
from offload.optimizer.device_step import DEVICE_WORKSPACE_ITEMSIZE, DeviceStepper
from offload.optimizer.history import StepHistory
from offload.optimizer.in_backward import BackwardSteps
from offload.optimizer.kernel_step import Stepper
from offload.optimizer.kinds import OptimizerKind, splits
from offload.optimizer.pipeline import StepPipeline
from offload.optimizer.torch_hooks import OptimizerHooks, StepSubmission
from offload.optimizer.torch_state import TorchState
from offload.planning.disk_settings import DiskSettings
from offload.planning.hardware import cpus_of, training_threads
from offload.ranks.exchange import ShardExchange
from offload.runtime import Runtime
from offload.storage import chunk_state
from offload.storage.allocation import QueueOf, Storage
from offload.storage.homes import MemoryHome
from offload.storage.state_tensors import StateTensors, is_split
from offload.storage.values import HomeValues
from offload.storage.walk import Walk
from offload.units import Tier
from offload.weights.fetch import WeightFetcher
from offload.weights.parameter_values import SessionParameters
from offload.weights.schedule import Schedule
from offload.weights.slots import Slot

RESIDENT: Final = "resident weights"
SPARE: Final = "spare slot"
SMALL_STATE: Final = "optimizer state that is not of a parameter's shape"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The user's objects that a session works on."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    kind: OptimizerKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """What a session calls."""

    storage: Storage
    fetcher: WeightFetcher
    slots: Sequence[Slot]
    intake: GradientIntake
    pipeline: StepPipeline
    in_backward: BackwardSteps | None
    step_history: StepHistory
    home_values: HomeValues
    torch_state: TorchState
    values: ModelState
    saves: Saves
    loads: Loads
    exports: Exports
    hooks: ModuleHooks
    optimizer_hooks: OptimizerHooks | None
    """None where the session has no optimizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Training:
    """What moves weights, gradients and state in a step."""

    fetcher: WeightFetcher
    slots: Sequence[Slot]
    intake: GradientIntake
    stepper: Stepper
    pipeline: StepPipeline
    in_backward: BackwardSteps | None
    step_history: StepHistory


def assemble(
    runtime: Runtime,
    subject: Subject,
    disk: DiskSettings,
    queue_of: QueueOf,
    ends: ExitStack,
    settle: Callable[[], None],
) -> Components:
    """Make the components. `ends` gets what ends them; where this raises, closing it leaves the model as it was.

    `settle`: waits until no lane writes weights and none leases staging buffers.
    """
    _connect_ranks(runtime, ends)
    workers = _workers(runtime, ends)
    storage = _storage(runtime, subject, disk, queue_of, ends)
    walk = Walk(runtime, storage)
    home_values = HomeValues(runtime, walk)
    parameters = SessionParameters(runtime, home_values, settle)
    training = _training(runtime, subject, storage, parameters, workers, ends)
    runtime.ledger.charge(Tier.HOST, SMALL_STATE, subject.kind.small_bytes)
    ends.callback(runtime.ledger.discharge, Tier.HOST, SMALL_STATE, subject.kind.small_bytes)
    torch_state = TorchState(
        runtime, subject.optimizer, subject.kind, stepper=training.stepper, num_steps=training.pipeline.num_steps,
        values=home_values,
    )  # fmt: skip
    values = ModelState(
        runtime, subject.model, values=home_values, fetcher=training.fetcher, intake=training.intake, settle=settle,
        parameters=parameters,
    )  # fmt: skip
    saves, loads, exports = _saving(runtime, subject, training, walk, home_values, torch_state, values)
    hooks = ModuleHooks(
        subject.model, runtime.partitions, fetcher=training.fetcher, intake=training.intake,
        in_backward=training.in_backward, dtype=runtime.precision.dtype, device=runtime.device.torch_device,
    )  # fmt: skip
    parameters.connect(
        training.fetcher, hooks.is_running, values.invalidate, training.intake.stand_last, hooks.begin_backward
    )
    return Components(
        storage=storage, fetcher=training.fetcher, slots=training.slots, intake=training.intake,
        pipeline=training.pipeline, in_backward=training.in_backward, step_history=training.step_history,
        home_values=home_values, torch_state=torch_state, values=values, saves=saves, loads=loads, exports=exports,
        hooks=hooks, optimizer_hooks=_optimizer_hooks(runtime, subject, training, hooks, settle),
    )  # fmt: skip


def fill(runtime: Runtime, subject: Subject, components: Components, filled: list[Partition]) -> None:
    """Values of the model, and what its optimizer knows, into their homes; then the hooks.

    `filled` gets every partition whose values are in their homes.
    """
    built: set[nn.Module] = set()
    names = {module: name for name, module in subject.model.named_modules()}
    for partition in runtime.partitions:
        runtime.ledger.charge(Tier.HOST, "building", partition.build_bytes)
        for module in partition.modules:
            for owner in module.modules() if module is partition.modules[0] else (module,):
                if owner not in built:
                    built.add(owner)
                    materialize(owner, names.get(owner, partition.name))
        components.home_values.fill(partition, components.torch_state.state_of, subject.kind.names)
        filled.append(partition)
        components.slots[partition.id].leave()
        runtime.ledger.discharge(Tier.HOST, "building", partition.build_bytes)
    for name, module in subject.model.named_modules():
        if is_deferred(module):
            materialize(module, name)
    components.torch_state.take_over(runtime.partitions)
    for buffer in subject.model.buffers():
        runtime.ranks.broadcast(buffer.data)
        buffer.data = buffer.data.to(runtime.device.torch_device)
    components.hooks.attach()
    components.intake.attach()
    components.values.attach()


# ----------------------------------------------------------------------------------------------- one by one


def _connect_ranks(runtime: Runtime, ends: ExitStack) -> None:
    """A failure on any lane is told to the other ranks, and theirs are seen where a wait reports what is in flight."""
    ranks, lanes = runtime.ranks, runtime.lanes
    ends.callback(ranks.close)
    lanes.when_failed = lambda error: ranks.note_failure(f"{type(error).__name__}: {error}")
    lanes.in_flight.append(lambda: [text] if (text := ranks.failed()) is not None else [])


def _storage(runtime: Runtime, subject: Subject, disk: DiskSettings, queue_of: QueueOf, ends: ExitStack) -> Storage:
    with ExitStack() as undo:
        undo.callback(runtime.device.close)
        storage = Storage(runtime, _state_tensors(runtime, subject.kind), disk, queue_of)
        undo.pop_all()
    ends.callback(storage.close)
    ends.callback(runtime.device.close)  # copies may still be under way in the memory of the storage
    return storage


def _training(
    runtime: Runtime,
    subject: Subject,
    storage: Storage,
    parameters: SessionParameters,
    workers: Workers,
    ends: ExitStack,
) -> _Training:
    exchange = _exchange(runtime, storage)
    slots = _slots(runtime, storage, parameters, ends)
    fetcher = _fetcher(runtime, storage, slots, exchange)
    gradients = [
        [gradient_chunk(partition, home) for home in row]
        for partition, row in zip(runtime.partitions, storage.gradients, strict=True)
    ]
    workspace, device_stepper = _device_stepper(runtime, storage)
    intake = _intake(runtime, subject, storage, gradients, workspace, exchange)
    stepper = _stepper(runtime, subject, storage, workers)
    pipeline = StepPipeline(
        runtime, chunks=[_state_chunks(runtime, storage, pid, row) for pid, row in enumerate(gradients)],
        intake=intake, fetcher=fetcher, ring=storage.step_ring, stepper=stepper, device_stepper=device_stepper,
    )  # fmt: skip
    ends.callback(pipeline.close)
    fetcher.when_late(pipeline.prioritize)
    if runtime.config.overlap == "forward":
        intake.when_begun(pipeline.read_ahead)
    return _Training(
        fetcher=fetcher, slots=slots, intake=intake, stepper=stepper, pipeline=pipeline,
        in_backward=_backward_steps(runtime, subject, intake, pipeline, fetcher),
        step_history=StepHistory(runtime.precision, runtime.config.max_skipped_steps),
    )  # fmt: skip


def _saving(
    runtime: Runtime,
    subject: Subject,
    training: _Training,
    walk: Walk,
    home_values: HomeValues,
    torch_state: TorchState,
    model_state: ModelState,
) -> tuple[Saves, Loads, Exports]:
    in_backward = training.in_backward
    values = SessionValues(subject.model, runtime.partitions, walk=walk, num_steps=training.pipeline.num_steps)
    run_state = RunState(
        subject.model, subject.optimizer, subject.kind, stepper=training.stepper, step_history=training.step_history,
        values=values, device=runtime.device.torch_device,
    )  # fmt: skip
    saves = Saves(runtime, values, run_state, in_backward)
    loads = Loads(
        runtime, values, run_state, model_state=model_state, saves=saves, intake=training.intake,
        in_backward=in_backward,
    )  # fmt: skip
    exports = Exports(
        runtime, subject.model, subject.optimizer, values=values, home_values=home_values, torch_state=torch_state,
        saves=saves,
    )  # fmt: skip
    return saves, loads, exports


def _optimizer_hooks(
    runtime: Runtime, subject: Subject, training: _Training, hooks: ModuleHooks, settle: Callable[[], None]
) -> OptimizerHooks | None:
    if subject.optimizer is None:
        return None
    submission = StepSubmission(
        snapshot=partial(subject.kind.snapshot, subject.optimizer), intake=training.intake, fetcher=training.fetcher,
        pipeline=training.pipeline, in_backward=training.in_backward, history=training.step_history,
    )  # fmt: skip
    return OptimizerHooks(
        runtime, subject.optimizer, submission, intake=training.intake, recover=hooks.recover, settle=settle
    )


def _workers(runtime: Runtime, ends: ExitStack) -> Workers:
    workers = Workers(max(1, training_threads() // runtime.ranks.num_local), cpus_of(runtime.device.numa_node))
    ends.callback(workers.close)
    return workers


def _state_tensors(runtime: Runtime, kind: OptimizerKind) -> list[StateTensors]:
    return [
        kind.state_tensors(split=splits(runtime.precision, weights_on_device=homes.weights_on_device))
        for homes in runtime.plan.homes
    ]


def _exchange(runtime: Runtime, storage: Storage) -> ShardExchange | None:
    if not runtime.ranks.is_sharded:
        return None
    return ShardExchange(
        runtime.ranks, received=storage.received, precision=runtime.precision,
        in_fp32=runtime.config.reduce_dtype == "fp32", device=runtime.device, lanes=runtime.lanes,
    )  # fmt: skip


def _slots(runtime: Runtime, storage: Storage, parameters: SessionParameters, ends: ExitStack) -> list[Slot]:
    """The device memory of every partition; resident weights are in theirs from the start."""
    plan, ledger, device = runtime.plan, runtime.ledger, runtime.device
    types = PlaceholderTypes(parameters)
    slots = [
        Slot(partition, [home.chunk for home in row], runtime.precision.dtype, device, ranks=runtime.ranks, types=types)
        for partition, row in zip(runtime.partitions, storage.weights, strict=True)
    ]
    resident = _resident(runtime)
    # What is resident lives as long as something points at it.
    ends.callback(_free_slots, [slot for slot in slots if slot.partition.id not in resident])
    for pid in resident:
        slot = slots[pid]
        ledger.charge(Tier.DEVICE, RESIDENT, slot.num_bytes)
        slot.flat.untyped_storage().resize_(slot.num_bytes)
        for home in storage.weights[pid]:
            if isinstance(home, MemoryHome):
                home.bytes = slot.range(home.chunk.trainable, home.chunk.start, home.chunk.stop)
    ledger.charge(Tier.DEVICE, SPARE, plan.spare_slot_bytes)
    if plan.slot_ring_bytes:
        device.reserve_slots(plan.slot_ring_bytes + plan.spare_slot_bytes)
    return slots


def _resident(runtime: Runtime) -> set[int]:
    """Partitions whose weights are resident in their slots. Of sharded ones only the shard is, outside slots."""
    if runtime.ranks.is_sharded:
        return set()
    return {p.id for p, homes in zip(runtime.partitions, runtime.plan.homes, strict=True) if homes.weights_on_device}


def _free_slots(slots: Sequence[Slot]) -> None:
    for slot in slots:
        slot.flat.untyped_storage().resize_(0)


def _fetcher(
    runtime: Runtime, storage: Storage, slots: Sequence[Slot], exchange: ShardExchange | None
) -> WeightFetcher:
    sizes = {slot.partition.id: slot.num_bytes for slot in slots}
    return WeightFetcher(
        runtime, slots=slots, homes=storage.weights,
        schedule=Schedule(sizes, runtime.plan.slot_ring_bytes, _resident(runtime)), ring=storage.weight_ring,
        exchange=exchange,
    )  # fmt: skip


def _intake(
    runtime: Runtime,
    subject: Subject,
    storage: Storage,
    gradients: Sequence[Sequence[GradientChunk]],
    workspace: Tensor | None,
    exchange: ShardExchange | None,
) -> GradientIntake:
    gradient_offload = GradientOffload(runtime, chunks=gradients, ring=storage.offload_ring, workspace=workspace)
    slots = GradientSlots(runtime, storage.gradient_ring)
    table = GradientTable([len(partition.trainable.entries) for partition in runtime.partitions])
    reduction: Reduction
    if exchange is None:
        reduction = LocalReduction(gradient_offload, slots, table, runtime.device)
    else:
        reduction = RankReduction(
            runtime, gradient_offload, slots, table, exchange=exchange, options=partial(options_of, subject.optimizer)
        )
    return GradientIntake(runtime, gradient_offload, reduction)


def _device_stepper(runtime: Runtime, storage: Storage) -> tuple[Tensor | None, DeviceStepper | None]:
    """For state resident on an accelerator, with the workspace for the gradients that are offloaded next to it."""
    num_bytes = runtime.plan.device_workspace_bytes
    if not num_bytes:
        return None, None
    workspace = storage.on_device("device workspace", num_bytes)
    border = num_bytes // DEVICE_WORKSPACE_ITEMSIZE * OFFLOAD_WORKSPACE_ITEMSIZE
    return workspace[:border], DeviceStepper(
        workspace=workspace[border:], precision=runtime.precision, gradient_home=runtime.gradient_precision,
        device=runtime.device, lanes=runtime.lanes,
    )  # fmt: skip


def _stepper(runtime: Runtime, subject: Subject, storage: Storage, workers: Workers) -> Stepper:
    """With everything compiled that training will need."""
    forms = set(storage.state_tensors)
    stepper = subject.kind.stepper(runtime.gradient_precision, runtime.precision, workers)
    if subject.optimizer is not None:
        for form in forms:
            chunk_state.prepare(form, runtime.precision)
        is_split_by_form = {is_split(form) for form in forms}
        stepper.prepare(
            subject.kind.snapshot(subject.optimizer), split=True in is_split_by_form, plain=False in is_split_by_form
        )
    return stepper


def _backward_steps(
    runtime: Runtime, subject: Subject, intake: GradientIntake, pipeline: StepPipeline, fetcher: WeightFetcher
) -> BackwardSteps | None:
    optimizer, accumulate = subject.optimizer, runtime.config.accumulate
    if runtime.config.overlap != "backward" or optimizer is None or accumulate is None:
        return None
    return BackwardSteps(
        runtime, accumulate=accumulate, snapshot=partial(subject.kind.snapshot, optimizer), intake=intake,
        pipeline=pipeline, fetcher=fetcher,
    )  # fmt: skip


def _state_chunks(runtime: Runtime, storage: Storage, pid: int, gradients: Sequence[GradientChunk]) -> list[StateChunk]:
    trainable = [home for home in storage.weights[pid] if home.chunk.trainable]
    return [
        state_chunk(
            gradient,
            state,
            weights,
            storage.state_tensors[pid],
            precision=runtime.precision,
            gradient_precision=runtime.gradient_precision,
        )
        for gradient, state, weights in zip(gradients, storage.state[pid], trainable, strict=True)
    ]
