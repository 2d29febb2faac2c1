"""A session: one model and its optimizer, offloaded.

Owns: the composition of all parts, and their lifetime.
Does not: do the work of any of them.
Threads: the training thread.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from offload import metrics
from offload.collectives import Ranks
from offload.config import Config, Precision, gradient_precision
from offload.deferred import is_deferred, materialize
from offload.device import Device
from offload.disk.io_queue import IoQueue
from offload.errors import SessionClosedError
from offload.exchange import Exchange
from offload.fill import Filler
from offload.gradients.device_landing import LAND_WORKSPACE_ITEMSIZE
from offload.gradients.intake import GradientIntake
from offload.gradients.landing import Landings, gradient_piece
from offload.gradients.ranked import RankedIntake
from offload.handover import Handover
from offload.hooks import ModuleHooks
from offload.kernels.workers import Workers
from offload.lanes import Lanes, Reason
from offload.memory.ledger import Ledger
from offload.model_state import ModelState
from offload.optimizer import stored
from offload.optimizer.device_step import DEVICE_WORKSPACE_ITEMSIZE, DeviceStepper
from offload.optimizer.early import EarlySteps
from offload.optimizer.jobs import StatePiece, weights_pass_slab
from offload.optimizer.judge import StepResult
from offload.optimizer.kernel_step import Stepper
from offload.optimizer.kinds import OptimizerKind, splits
from offload.optimizer.outcomes import Outcomes
from offload.optimizer.pipeline import StepPipeline
from offload.optimizer.planes import Planes, is_split
from offload.partition import Partition
from offload.persistence import Exported, LoadResult, Persistence, SaveResult
from offload.placement.disk_settings import DiskSettings
from offload.placement.hardware import cpus_of, training_threads
from offload.placement.plan import Plan
from offload.schedule import Schedule
from offload.storage import QueueOf, Storage
from offload.timeline import Timeline
from offload.units import Tier
from offload.weights.fetch import WeightFetcher, WeightHome
from offload.weights.slots import Slot

RESIDENT: Final = "weights at home"


class Session:
    """What `offload.enable` returns. A context manager; the model trains inside it."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        kind: OptimizerKind,
        config: Config,
        disk: DiskSettings,
        plan: Plan,
        partitions: Sequence[Partition],
        device: Device,
        lanes: Lanes,
        timeline: Timeline,
        ranks: Ranks | None = None,
        queue_of: QueueOf = IoQueue,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.plan = plan
        self._kind = kind
        self._config = config
        self._partitions = partitions
        self._device = device
        self._lanes = lanes
        self._ranks = ranks
        if ranks is not None:
            lanes.when_failed = lambda error: ranks.note_failure(f"{type(error).__name__}: {error}")
            lanes.in_flight.append(lambda: [text] if (text := ranks.failed()) is not None else [])
        self._timeline = timeline
        self._closed = False
        self._hooked: list[Any] = []
        self._last_result: StepResult | None = None
        self._outcomes = Outcomes(config.precision, config.max_skipped_steps)
        self._unplanned: list[int] = []
        self._unplanned_before = 0
        self._ledger = Ledger(
            {Tier.DEVICE: config.device_bytes, Tier.HOST: config.host_bytes, Tier.DISK: config.disk_bytes}
        )
        num_threads = max(1, training_threads() // (1 if ranks is None else ranks.num_local))
        self._workers = Workers(num_threads, cpus_of(device.numa_node))
        gradient_home = gradient_precision(config)
        try:
            self._storage = Storage(
                plan, partitions, planes=[
                    kind.planes(split=splits(config.precision, weights_on_device=homes.weights_on_device))
                    for homes in plan.homes
                ], precision=config.precision, gradient_home=gradient_home, folders=config.disk_folders,
                disk=disk,
                device=device, lanes=lanes, ledger=self._ledger, timeline=timeline, ranks=ranks, queue_of=queue_of,
            )  # fmt: skip
        except BaseException:  # a folder or memory that cannot be had: nothing yet for close() to give back
            lanes.close()
            device.close()
            self._workers.close()
            if ranks is not None:
                ranks.close()
            raise
        self._filled: list[Partition] = []
        self._resident: set[int] = set()
        try:
            self._compose(gradient_home)
            self._fill()
            self._attach()
        except BaseException:
            self.close()  # the model is as it was
            raise

    # ------------------------------------------------------------------------------------------ composition

    def _compose(self, gradient_home: Precision) -> None:
        config, plan, storage, device, lanes = self._config, self.plan, self._storage, self._device, self._lanes
        dtype = config.precision.dtype
        self._slots = [
            Slot(partition, [piece for piece, _ in row], dtype, device, ranks=self._ranks)
            for partition, row in zip(self._partitions, storage.weights, strict=True)
        ]
        resident = self._resident = {
            p.id
            for p, homes in zip(self._partitions, plan.homes, strict=True)
            if homes.weights_on_device and self._ranks is None
        }
        for pid in resident:
            slot = self._slots[pid]
            self._ledger.charge(Tier.DEVICE, RESIDENT, slot.num_bytes)
            slot.flat.untyped_storage().resize_(slot.num_bytes)
            for piece, home in storage.weights[pid]:
                home.bytes = slot.range(piece.trainable, piece.start, piece.stop)
        gradients = [
            [gradient_piece(partition, piece, home) for piece, home in row]
            for partition, row in zip(self._partitions, storage.gradients, strict=True)
        ]
        exchange = self._make_exchange()
        schedule = Schedule({s.partition.id: s.num_bytes for s in self._slots}, plan.slot_ring_bytes, resident)
        self._fetcher = WeightFetcher(
            slots=self._slots,
            homes=[[WeightHome(piece, home) for piece, home in row] for row in storage.weights],
            schedule=schedule, device=device, lanes=lanes, ledger=self._ledger,
            ring=storage.weight_ring, queue=storage.queue, exchange=exchange,
        )  # fmt: skip
        land_workspace, device_stepper = self._make_device_stepper(gradient_home)
        landings = Landings(
            pieces=gradients, wire=config.precision, home=gradient_home, device=device, lanes=lanes,
            ring=storage.land_ring, queue=storage.queue, workspace=land_workspace,
        )  # fmt: skip
        self._landings = landings
        intake_of = GradientIntake if exchange is None else partial(RankedIntake, exchange=exchange)
        self._intake = intake_of(
            partitions=self._partitions, landings=landings, ring=storage.gradient_ring,
            num_slots=plan.gradient_slots, dtype=dtype, device=device, lanes=lanes, timeline=self._timeline,
        )  # fmt: skip
        stepper = self._make_stepper(gradient_home)
        self._pipeline = StepPipeline(
            partitions=self._partitions,
            pieces=[self._state_pieces(pid, row) for pid, row in enumerate(gradients)],
            precision=config.precision, gradient_home=gradient_home,
            max_grad_norm=config.max_grad_norm, device=device, lanes=lanes,
            ring=storage.step_ring, queue=storage.queue, stepper=stepper, ranks=self._ranks,
            device_stepper=device_stepper,
        )  # fmt: skip
        self._fetcher.when_late(self._pipeline.hurry)
        if config.overlap == "forward":
            self._intake.when_begun(partial(self._pipeline.read_ahead, self._forward_order))
        self._filler = Filler(
            storage, self._slots, precision=config.precision, device=device, lanes=lanes, ranks=self._ranks
        )
        self._handover = Handover(
            self.optimizer, self._kind, stepper=stepper, num_steps=self._pipeline.num_steps, filler=self._filler,
            ranks=self._ranks,
        )  # fmt: skip
        self._values = ModelState(
            self.model,
            self._partitions,
            filler=self._filler,
            fetcher=self._fetcher,
            intake=self._intake,
            gradient_dtype=gradient_home.dtype,
            settle=self._settle,
            ranks=self._ranks,
        )
        self._early = self._make_early()
        self._persistence = Persistence(
            self.model, self._partitions, self.optimizer, self._kind, storage=storage, filler=self._filler,
            stepper=stepper, outcomes=self._outcomes, num_steps=self._pipeline.num_steps, handover=self._handover,
            model_state=self._values, intake=self._intake, early=self._early, device=device.torch_device,
            dtype=dtype, lanes=lanes, ledger=self._ledger, ranks=self._ranks,
        )  # fmt: skip
        self._hooks = ModuleHooks(
            self.model, self._partitions, fetcher=self._fetcher, intake=self._intake, early=self._early,
            dtype=dtype, device=device.torch_device,
        )  # fmt: skip

    def _make_exchange(self) -> Exchange | None:
        if self._ranks is None:
            return None
        return Exchange(
            self._ranks, received=self._storage.received, precision=self._config.precision,
            in_fp32=self._config.reduce_dtype == "fp32", device=self._device, lanes=self._lanes,
        )  # fmt: skip

    def _make_early(self) -> EarlySteps | None:
        optimizer = self.optimizer
        if self._config.overlap != "backward" or optimizer is None or self._config.accumulate is None:
            return None
        return EarlySteps(
            accumulate=self._config.accumulate, snapshot=lambda: self._kind.snapshot(optimizer),
            partitions=self._partitions, intake=self._intake, pipeline=self._pipeline, fetcher=self._fetcher,
            lanes=self._lanes,
        )  # fmt: skip

    def _make_device_stepper(self, gradient_home: Precision) -> tuple[Tensor | None, DeviceStepper | None]:
        """For state at home on an accelerator, with the workspace for the gradients that land beside it."""
        num_bytes = self.plan.device_workspace_bytes
        if not num_bytes:
            return None, None
        workspace = self._storage.on_device("device workspace", num_bytes)
        border = num_bytes // DEVICE_WORKSPACE_ITEMSIZE * LAND_WORKSPACE_ITEMSIZE
        return workspace[:border], DeviceStepper(
            workspace=workspace[border:], precision=self._config.precision, gradient_home=gradient_home,
            device=self._device, lanes=self._lanes,
        )  # fmt: skip

    def _make_stepper(self, gradient_home: Precision) -> Stepper:
        stepper = self._kind.stepper(gradient_home, self._config.precision, self._workers)
        if self.optimizer is not None:
            for planes in set(self._storage.planes):
                stored.prepare(planes, self._config.precision)
            forms = {is_split(planes) for planes in self._storage.planes}
            stepper.prepare(self._kind.snapshot(self.optimizer), split=True in forms, plain=False in forms)
        return stepper

    def _state_pieces(self, pid: int, gradients: Sequence[Any]) -> list[StatePiece]:
        trainable = [home for piece, home in self._storage.weights[pid] if piece.trainable]
        pieces = []
        for gradient, (_, state), weights in zip(gradients, self._storage.state[pid], trainable, strict=True):
            on_disk = Tier.DISK in (state.tier, gradient.home.tier)
            needs_slab = on_disk or weights_pass_slab(weights, state)
            pieces.append(StatePiece(gradient, state, weights, self._storage.planes[pid], needs_slab))
        return pieces

    def _fill(self) -> None:
        built: set[nn.Module] = set()
        names = {module: name for name, module in self.model.named_modules()}
        for partition in self._partitions:
            self._ledger.charge(Tier.HOST, "building", partition.build_bytes)
            for module in partition.modules:
                for owner in module.modules() if module is partition.modules[0] else (module,):
                    if owner not in built:
                        built.add(owner)
                        materialize(owner, names.get(owner, partition.name))
            self._filler.fill(partition, self._handover.state_of, self._kind.names)
            self._filled.append(partition)
            self._slots[partition.id].hide()
            self._ledger.discharge(Tier.HOST, "building", partition.build_bytes)
        for name, module in self.model.named_modules():
            if is_deferred(module):
                materialize(module, name)
        self._handover.take_over(self._partitions)
        for buffer in self.model.buffers():
            if self._ranks is not None:
                self._ranks.broadcast(buffer.data)
            buffer.data = buffer.data.to(self._device.torch_device)

    def _attach(self) -> None:
        self._hooks.attach()
        self._intake.attach()
        if self.optimizer is not None:
            self._hooked.append(self.optimizer.register_step_pre_hook(self._before_step))
            self._hooked.append(self.optimizer.register_step_post_hook(self._after_step))
        self._values.attach()
        self._lanes.timeline.restart()
        self._ledger.restart_peaks()

    # --------------------------------------------------------------------------------------------- training

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, with the loss multiplied by the loss scale in fp16."""
        self._check_open()
        self._outcomes.scaled(loss).backward()

    def step(self) -> StepResult:
        """`optimizer.step()`, with what it did."""
        self._check_open()
        if self.optimizer is None:
            raise SessionClosedError("this session has no optimizer; pass one to offload.enable to train.")
        self.optimizer.step()
        assert self._last_result is not None
        return self._last_result

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        # torch hands over the arguments of the unbound method: the optimizer itself comes first.
        positional = len(args) > 1
        closure: Callable[[], Any] | None = args[1] if positional else kwargs.get("closure")
        changed = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

            def evaluated() -> Any:
                return loss  # torch's own step calls it once more, for its return value

            changed = ((args[0], evaluated), kwargs) if positional else (args, kwargs | {"closure": evaluated})
        self._step()
        return changed

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._intake.hand_out()
        if self._config.overlap == "off":
            self._wait_idle()

    def _step(self) -> None:
        self._check_open()
        self._lanes.check()
        self._hooks.recover()
        self._outcomes.absorb()
        self._outcomes.check_scaled()
        assert self.optimizer is not None
        landed = dict(enumerate(self._intake.collect_for_step()))
        hypers = self._kind.snapshot(self.optimizer)
        stepped = self._early.settle(landed, hypers) if self._early is not None else []
        judged = [pid for pid in self._forward_order() if landed[pid]]
        covered = [pid for pid in judged if pid not in stepped]
        result, published, consumed = self._pipeline.submit(
            order=covered, judged=judged, landed=landed, hypers=hypers, all_landed=self._landings.last,
            loss_scale=self._outcomes.loss_scale, last_fetch=self._fetcher.last_fetch, strict=bool(stepped),
        )  # fmt: skip
        for pid in covered:
            self._partitions[pid].version += 1
            self._fetcher.published[pid] = published[pid]
            self._intake.consumed(pid, consumed[pid])
        for pid in stepped:
            # The norm still reads their sums: no landing before it.
            self._intake.consumed(pid, [result.judged] * len(self._pipeline.pieces[pid]))
        self._fetcher.step(covered)
        self._last_result = result
        self._outcomes.submitted(result)
        now = self._fetcher.schedule.unplanned_fetches
        self._unplanned.append(now - self._unplanned_before)
        self._unplanned_before = now

    def _forward_order(self) -> list[int]:
        used = self._fetcher.schedule.first_uses()
        return used + [p.id for p in self._partitions if p.id not in set(used)]

    # --------------------------------------------------------------------------------------- reading weights

    def gathered(self, module: nn.Module | None = None) -> AbstractContextManager[dict[str, Tensor]]:
        """fp32 master weights of `module`'s parameters (default: all) by name, on the host.

        An edit of a trainable parameter is taken over at the end of the context. Waits for the step in flight.
        """
        self._check_open()
        return self._values.gathered(module or self.model)

    def gathered_gradients(self, module: nn.Module | None = None) -> dict[str, Tensor]:
        """Gradients of `module`'s parameters (default: all) by name, fp32 copies on the host, before clipping.

        Those that a backward has left since they were last dropped; a parameter without one is not in it.
        """
        self._check_open()
        return self._values.gradients(module or self.model)

    def weights_sha256(self) -> str:
        """SHA-256 of the working weights (16 bit or fp32), in parameter order."""
        self._check_open()
        return self._values.sha256()

    # --------------------------------------------------------------------------------------- save and load

    def save(
        self, path: str | Path, *, step: int | None = None, extra: Mapping[str, Any] | None = None,
        keep: int | None = None, wait: bool = True,
    ) -> SaveResult:  # fmt: skip
        """A checkpoint in the folder `path`, named by `step` (default: steps taken). An error keeps what was there.

        Weights, moments, options, random states and `extra` (JSON and tensors); no gradients. `keep`: how many stay.
        `wait=False`: go on training meanwhile, where the disk can clone files or the host budget has room for a copy;
        else as with True. Its result tells when it is durable; an error that nobody read there, the next save or close.
        """
        self._settle()
        return self._persistence.save(Path(path), step=step, extra=extra, keep=keep, wait=wait)

    def load(self, path: str | Path, *, strict: bool = True) -> LoadResult:
        """Go on from a checkpoint, the newest in a folder, or weights of Hugging Face or torch. Drops gradients.

        `strict`: refuse one of another optimizer or other groups; False keeps the options that the groups have.
        Whatever is refused leaves the session as it was.
        """
        self._settle()
        self._hooks.recover()
        return self._persistence.load(Path(path), strict=strict)

    def export(self, out: str | Path, format: str = "hf", *, dtype: str | None = None) -> Exported:
        """Write the model to the folder `out`: "hf" (safetensors), "dcp" (torch.distributed.checkpoint; with moments).

        `dtype`: "fp32", "bf16" or "fp16"; None keeps that of each parameter before the session.
        """
        self._settle()
        return self._persistence.export(Path(out), to=format, dtype=dtype)

    def state_dict(self, *, optimizer: bool = True) -> dict[str, Any]:
        """`model` and `optimizer` as torch's own `state_dict` would be outside the session. For small models."""
        self._settle()
        return self._persistence.state_dict(with_optimizer=optimizer)

    def _settle(self) -> None:
        """Wait until no lane writes weights and none leases slabs."""
        self._check_open()
        self._lanes.check()
        self._wait_idle()

    def _wait_idle(self) -> None:
        # Without this the reader sees weights of which half are stepped.
        self._lanes.wait(self._pipeline.last, Reason.STEP_DONE)
        self._pipeline.drop_ahead()
        for fetch in list(self._fetcher.last_fetch.values()):
            # Without this two threads lease from one ring.
            self._lanes.wait(fetch.issued, Reason.DRAIN)
        self._lanes.wait(self._device.h2d.record().promise, Reason.DRAIN)

    # -------------------------------------------------------------------------------------------- reporting

    def metrics(self) -> dict[str, Any]:
        """Numbers since training began: bytes and seconds by lane, peaks against budgets, homes.

        Waits for the step in flight and its writes, so that its bytes count, where the session is open and has not
        failed.
        """
        if not self._closed and self._lanes.failure is None:
            self._wait_idle()
            for write in self._storage.newest_writes():
                # Without this bytes that are still on their way to the disk do not count.
                self._lanes.wait(write, Reason.DRAIN)
        return metrics.collect(
            self._timeline, self._ledger, self.plan, unplanned_fetches=self._unplanned,
            disk_mode=self._storage.disk_mode,
        )  # fmt: skip

    def report(self) -> str:
        """Bytes, rates and waits by lane, and peaks against budgets, as text."""
        return metrics.as_text(self.metrics(), self._timeline)

    def state_planes(self, partition_id: int) -> Planes:
        """What is kept of each trainable parameter of a partition, beside its working weights."""
        return self._storage.planes[partition_id]

    @property
    def timeline(self) -> Timeline:
        """Spans, waits and counters since training began."""
        return self._timeline

    # ----------------------------------------------------------------------------------------------- ending

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is not None and self._ranks is not None:
            self._ranks.note_failure(f"{type(error).__name__}: {error}")
        # Among ranks all must take part in giving back, and who knows where the others are after an exception.
        self.close(give_back=error is None or self._ranks is None)

    def close(self, *, give_back: bool = True) -> None:
        """End the session: parameters back on their original device in their original dtype, swap files removed.

        `give_back=False`: leave placeholders, for models that do not fit anywhere else. Idempotent. Raises the error of
        a save beside training that nobody has seen, once all is given back.
        """
        if self._closed:
            return
        failure, unsaved = self._lanes.failure, None
        try:
            for handle in self._hooked:
                handle.remove()
            if hasattr(self, "_hooks"):
                unsaved = self._persistence.end_saves()
                self._hooks.detach()
                self._values.detach()
                self._intake.detach()
                if give_back and failure is None:
                    self._hooks.recover()
                    self._wait_idle()
                    self._handover.give_back(self._filled)
        finally:
            self._closed = True
            self._release()
        if unsaved is not None and sys.exception() is None:  # it would hide what ended the run
            raise unsaved

    def _release(self) -> None:
        self._lanes.close()
        self._device.close()
        self._workers.close()
        if self._ranks is not None:
            self._ranks.close()
        if hasattr(self, "_fetcher"):
            self._free_slots()
        if hasattr(self, "_pipeline"):
            self._pipeline.close()
        composed = "_fetcher _landings _intake _pipeline _filler _handover _early _hooks _values _slots _persistence"
        for name in composed.split():
            self.__dict__.pop(name, None)
        self._storage.close()

    def _free_slots(self) -> None:
        for slot in self._slots:
            if slot.partition.id not in self._resident:  # those live as long as something points at them
                slot.flat.untyped_storage().resize_(0)

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError("the session is closed; call offload.enable again.")
