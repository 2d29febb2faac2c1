"""The parts of a session: everything that moves its data, composed once and let go at the end.

Owns: which part is given which, the first filling of the homes, the order in which parts end.
Does not: train, or know of the calls that a user makes (session.py).
Threads: made, asked and ended by the training thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from offload.checkpoint.model_values import ModelState
from offload.checkpoint.persistence import Persistence
from offload.concurrency.lanes import Lanes, Reason
from offload.config import Config, gradient_precision
from offload.device.protocol import Device
from offload.errors import SessionClosedError
from offload.gradients.agreement import options_of
from offload.gradients.intake import GradientIntake, IntakeParts
from offload.gradients.offload import GradientChunk, GradientOffload, gradient_chunk
from offload.gradients.on_device import OFFLOAD_WORKSPACE_ITEMSIZE
from offload.gradients.ranked import RankedIntake
from offload.kernels.workers import Workers
from offload.memory.ledger import Ledger
from offload.model.deferred import is_deferred, materialize
from offload.model.hooks import ModuleHooks
from offload.model.partitions import Partition
from offload.optimizer.device_step import DEVICE_WORKSPACE_ITEMSIZE, DeviceStepper
from offload.optimizer.history import StepHistory
from offload.optimizer.in_backward import BackwardSteps
from offload.optimizer.kernel_step import Stepper
from offload.optimizer.kinds import OptimizerKind, splits
from offload.optimizer.pipeline import StepPipeline
from offload.optimizer.step_queue import StateChunk, weights_are_staged
from offload.optimizer.torch_state import Handover
from offload.planning.disk_settings import DiskSettings
from offload.planning.hardware import cpus_of, training_threads
from offload.planning.planner import Plan
from offload.ranks.collectives import Ranks
from offload.ranks.exchange import Exchange
from offload.storage import chunk_state as stored
from offload.storage.allocation import QueueOf, Storage
from offload.storage.state_tensors import is_split
from offload.storage.values import Filler
from offload.units import Tier
from offload.weights.fetch import WeightFetcher, WeightHome
from offload.weights.schedule import Schedule
from offload.weights.slots import Slot

RESIDENT: Final = "weights at home"
SPARE: Final = "spare slot"

COMPOSED: Final = (
    "fetcher", "intake", "pipeline", "in_backward", "filler", "handover", "values", "persistence", "hooks",
    "_slots", "_stepper", "_device_stepper",
)  # fmt: skip
"""Parts that hold memory, or what holds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a session is made of."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    kind: OptimizerKind
    config: Config
    disk: DiskSettings
    plan: Plan
    partitions: Sequence[Partition]
    device: Device
    lanes: Lanes
    ranks: Ranks | None
    queue_of: QueueOf

    def close(self) -> None:
        """End what runs."""
        self.lanes.close()
        self.device.close()
        if self.ranks is not None:
            self.ranks.close()


class Parts:
    """Of one session. What it raises while it is made leaves the model as it was."""

    def __init__(self, given: Given) -> None:
        config, ranks = given.config, given.ranks
        self.given = given
        self.closed = False
        self.step_history = StepHistory(config.precision, config.max_skipped_steps)
        self.ledger = Ledger(
            {Tier.DEVICE: config.device_bytes, Tier.HOST: config.host_bytes, Tier.DISK: config.disk_bytes}
        )
        if ranks is not None:
            given.lanes.when_failed = lambda error: ranks.note_failure(f"{type(error).__name__}: {error}")
            given.lanes.in_flight.append(lambda: [text] if (text := ranks.failed()) is not None else [])
        num_threads = max(1, training_threads() // (1 if ranks is None else ranks.num_local))
        self._workers = Workers(num_threads, cpus_of(given.device.numa_node))
        try:
            self.storage = self._make_storage()
        except BaseException:  # a folder or memory that cannot be had: nothing yet for release() to give back
            given.close()
            self._workers.close()
            raise
        self._filled: list[Partition] = []
        self._slots: list[Slot] = []
        self._resident: set[int] = set()

    def _make_storage(self) -> Storage:
        given = self.given
        state_tensors = [
            given.kind.state_tensors(split=splits(given.config.precision, weights_on_device=homes.weights_on_device))
            for homes in given.plan.homes
        ]
        return Storage(
            given.plan, given.partitions, state_tensors=state_tensors, precision=given.config.precision,
            gradient_home=gradient_precision(given.config), folders=given.config.disk_folders, disk=given.disk,
            device=given.device, lanes=given.lanes, ledger=self.ledger, timeline=given.lanes.timeline,
            ranks=given.ranks, queue_of=given.queue_of,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ composition

    def compose(self) -> None:
        """Make the parts, in the order in which they need each other."""
        exchange = self._make_exchange()
        self._compose_weights(exchange)
        gradients = self._compose_gradients(exchange)
        self._compose_step(gradients)
        self._compose_rest()

    def _compose_weights(self, exchange: Exchange | None) -> None:
        given, storage, plan = self.given, self.storage, self.given.plan
        self._slots = [
            Slot(partition, [chunk for chunk, _ in row], given.config.precision.dtype, given.device, ranks=given.ranks)
            for partition, row in zip(given.partitions, storage.weights, strict=True)
        ]
        if given.ranks is None:  # with them what is at home is a shard, beside the slots
            self._resident = {
                p.id for p, homes in zip(given.partitions, plan.homes, strict=True) if homes.weights_on_device
            }
        for pid in self._resident:
            slot = self._slots[pid]
            self.ledger.charge(Tier.DEVICE, RESIDENT, slot.num_bytes)
            slot.flat.untyped_storage().resize_(slot.num_bytes)
            for chunk, home in storage.weights[pid]:
                home.bytes = slot.range(chunk.trainable, chunk.start, chunk.stop)
        self.ledger.charge(Tier.DEVICE, SPARE, plan.spare_slot_bytes)
        if plan.slot_ring_bytes:
            given.device.reserve_slots(plan.slot_ring_bytes + plan.spare_slot_bytes)
        schedule = Schedule({s.partition.id: s.num_bytes for s in self._slots}, plan.slot_ring_bytes, self._resident)
        self.fetcher = WeightFetcher(
            slots=self._slots,
            homes=[[WeightHome(chunk, home) for chunk, home in row] for row in storage.weights],
            schedule=schedule, device=given.device, lanes=given.lanes, ledger=self.ledger,
            ring=storage.weight_ring, queue=storage.queue, exchange=exchange,
        )  # fmt: skip

    def _compose_gradients(self, exchange: Exchange | None) -> list[list[GradientChunk]]:
        given, storage = self.given, self.storage
        chunks = [
            [gradient_chunk(partition, chunk, home) for chunk, home in row]
            for partition, row in zip(given.partitions, storage.gradients, strict=True)
        ]
        offload_workspace, self._device_stepper = self._make_device_stepper()
        gradient_offload = GradientOffload(
            chunks=chunks, wire=given.config.precision, home=gradient_precision(given.config), device=given.device,
            lanes=given.lanes, ring=storage.offload_ring, queue=storage.queue, workspace=offload_workspace,
        )  # fmt: skip
        parts = IntakeParts(
            partitions=given.partitions, gradient_offload=gradient_offload, ring=storage.gradient_ring,
            num_slots=given.plan.gradient_slots, dtype=given.config.precision.dtype, device=given.device,
            lanes=given.lanes, timeline=given.lanes.timeline,
        )  # fmt: skip
        self.intake = GradientIntake(parts)
        if exchange is not None:
            self.intake = RankedIntake(parts, exchange, partial(options_of, given.optimizer))
        return chunks

    def _compose_step(self, gradients: Sequence[Sequence[GradientChunk]]) -> None:
        given, storage = self.given, self.storage
        self._stepper = self._make_stepper()
        self.pipeline = StepPipeline(
            partitions=given.partitions, chunks=[self._state_chunks(pid, row) for pid, row in enumerate(gradients)],
            precision=given.config.precision, gradient_home=gradient_precision(given.config),
            max_grad_norm=given.config.max_grad_norm, device=given.device, lanes=given.lanes, ring=storage.step_ring,
            queue=storage.queue, stepper=self._stepper, ranks=given.ranks, device_stepper=self._device_stepper,
        )  # fmt: skip
        self.fetcher.when_late(self.pipeline.hurry)
        if given.config.overlap == "forward":
            self.intake.when_begun(partial(self.pipeline.read_ahead, self.forward_order))
        self.in_backward = self._make_backward_steps()

    def _compose_rest(self) -> None:
        given, dtype = self.given, self.given.config.precision.dtype
        self.filler = Filler(
            self.storage, precision=given.config.precision, device=given.device, lanes=given.lanes,
            ranks=given.ranks,
        )  # fmt: skip
        self.handover = Handover(
            given.optimizer, given.kind, stepper=self._stepper, num_steps=self.pipeline.num_steps, filler=self.filler,
            ranks=given.ranks,
        )  # fmt: skip
        self.values = ModelState(
            given.model, given.partitions, filler=self.filler, fetcher=self.fetcher, intake=self.intake,
            gradient_dtype=gradient_precision(given.config).dtype, settle=self.settle, ranks=given.ranks,
        )  # fmt: skip
        self.persistence = Persistence(
            given.model, given.partitions, given.optimizer, given.kind, storage=self.storage, filler=self.filler,
            stepper=self._stepper, step_history=self.step_history, num_steps=self.pipeline.num_steps, handover=self.handover,
            model_state=self.values, intake=self.intake, in_backward=self.in_backward, device=given.device.torch_device,
            dtype=dtype, lanes=given.lanes, ledger=self.ledger, ranks=given.ranks,
        )  # fmt: skip
        self.hooks = ModuleHooks(
            given.model, given.partitions, fetcher=self.fetcher, intake=self.intake, in_backward=self.in_backward, dtype=dtype,
            device=given.device.torch_device,
        )  # fmt: skip

    def _make_exchange(self) -> Exchange | None:
        given = self.given
        if given.ranks is None:
            return None
        return Exchange(
            given.ranks, received=self.storage.received, precision=given.config.precision,
            in_fp32=given.config.reduce_dtype == "fp32", device=given.device, lanes=given.lanes,
        )  # fmt: skip

    def _make_device_stepper(self) -> tuple[Tensor | None, DeviceStepper | None]:
        """For state at home on an accelerator, with the workspace for the gradients that land beside it."""
        given, num_bytes = self.given, self.given.plan.device_workspace_bytes
        if not num_bytes:
            return None, None
        workspace = self.storage.on_device("device workspace", num_bytes)
        border = num_bytes // DEVICE_WORKSPACE_ITEMSIZE * OFFLOAD_WORKSPACE_ITEMSIZE
        return workspace[:border], DeviceStepper(
            workspace=workspace[border:], precision=given.config.precision,
            gradient_home=gradient_precision(given.config), device=given.device, lanes=given.lanes,
        )  # fmt: skip

    def _make_stepper(self) -> Stepper:
        given, state_tensors = self.given, set(self.storage.state_tensors)
        stepper = given.kind.stepper(gradient_precision(given.config), given.config.precision, self._workers)
        if given.optimizer is not None:
            for one in state_tensors:
                stored.prepare(one, given.config.precision)
            forms = {is_split(one) for one in state_tensors}
            stepper.prepare(given.kind.snapshot(given.optimizer), split=True in forms, plain=False in forms)
        return stepper

    def _make_backward_steps(self) -> BackwardSteps | None:
        given, optimizer = self.given, self.given.optimizer
        if given.config.overlap != "backward" or optimizer is None or given.config.accumulate is None:
            return None
        return BackwardSteps(
            accumulate=given.config.accumulate, snapshot=lambda: given.kind.snapshot(optimizer),
            partitions=given.partitions, intake=self.intake, pipeline=self.pipeline, fetcher=self.fetcher,
            lanes=given.lanes,
        )  # fmt: skip

    def _state_chunks(self, pid: int, gradients: Sequence[GradientChunk]) -> list[StateChunk]:
        trainable = [home for chunk, home in self.storage.weights[pid] if chunk.trainable]
        chunks = []
        for gradient, (_, state), weights in zip(gradients, self.storage.state[pid], trainable, strict=True):
            on_disk = Tier.DISK in (state.tier, gradient.home.tier)
            is_staged = on_disk or weights_are_staged(weights, state)
            chunks.append(StateChunk(gradient, state, weights, self.storage.state_tensors[pid], is_staged))
        return chunks

    def fill(self) -> None:
        """Values of the model, and what its optimizer knows, into their homes; hooks after that."""
        given = self.given
        built: set[nn.Module] = set()
        names = {module: name for name, module in given.model.named_modules()}
        for partition in given.partitions:
            self.ledger.charge(Tier.HOST, "building", partition.build_bytes)
            for module in partition.modules:
                for owner in module.modules() if module is partition.modules[0] else (module,):
                    if owner not in built:
                        built.add(owner)
                        materialize(owner, names.get(owner, partition.name))
            self.filler.fill(partition, self.handover.state_of, given.kind.names)
            self._filled.append(partition)
            self._slots[partition.id].hide()
            self.ledger.discharge(Tier.HOST, "building", partition.build_bytes)
        for name, module in given.model.named_modules():
            if is_deferred(module):
                materialize(module, name)
        self.handover.take_over(given.partitions)
        for buffer in given.model.buffers():
            if given.ranks is not None:
                given.ranks.broadcast(buffer.data)
            buffer.data = buffer.data.to(given.device.torch_device)
        self.hooks.attach()
        self.intake.attach()
        self.values.attach()

    # -------------------------------------------------------------------------------------------- training

    def forward_order(self) -> list[int]:
        """All partitions, in the order in which the next forward is expected to use them."""
        used = self.fetcher.schedule.first_uses()
        return used + [p.id for p in self.given.partitions if p.id not in set(used)]

    def settle(self) -> None:
        """Wait until no lane writes weights and none leases staging buffers. Raises where the session is closed or has failed."""
        self.check_open()
        self.given.lanes.check()
        self.wait_idle()

    def wait_idle(self) -> None:
        """As `settle`, whatever the session's state."""
        lanes = self.given.lanes
        # Without this the reader sees weights of which half are stepped.
        lanes.wait(self.pipeline.last, Reason.STEP_DONE)
        self.pipeline.drop_ahead()
        for fetch in list(self.fetcher.last_fetch.values()):
            # Without this two threads lease from one ring.
            lanes.wait(fetch.issued, Reason.DRAIN)
        lanes.wait(self.given.device.h2d.record().future, Reason.DRAIN)

    def check_open(self) -> None:
        """Raise SessionClosedError after the end."""
        if self.closed:
            raise SessionClosedError("the session is closed; call offload.enable again.")

    # ---------------------------------------------------------------------------------------------- ending

    def end(self, *, give_back: bool) -> BaseException | None:
        """Take the hooks away and give back what was taken; returns the error of a save that nobody has seen."""
        if not hasattr(self, "hooks"):
            return None
        unsaved = self.persistence.end_saves()
        self.hooks.detach()
        self.values.detach()
        self.intake.detach()
        if give_back:
            self.hooks.recover()
            self.wait_idle()
            self.handover.give_back(self._filled)
        return unsaved

    def release(self) -> None:
        """Let everything go. Nothing of it can be used any more but the ledger and what the storage tells."""
        self.closed = True
        self.given.lanes.close()
        for slot in self._slots:
            if slot.partition.id not in self._resident:  # those live as long as something points at them
                slot.flat.untyped_storage().resize_(0)
        self.given.device.close()  # after the slots: their memory goes back to the driver with it
        self._workers.close()
        if self.given.ranks is not None:
            self.given.ranks.close()
        if hasattr(self, "pipeline"):
            self.pipeline.close()
        for name in COMPOSED:
            self.__dict__.pop(name, None)
        self.storage.close()
