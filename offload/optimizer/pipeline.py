"""The step pipeline: norm, then state read ahead, kernel, state and weights written behind, in forward order.

Owns: the step count of every parameter, the homes of state, the publication of new weights.
Does not: land gradients (gradients/) or fetch weights (weights/).
Threads: `submit` on the training thread; the units run on the lanes `step read` and `step`.

Note [Step order]: pieces are stepped in forward order, so the next forward begins while later pieces are still being
stepped: exact with clipping, because the norm is known before the first piece.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, groupby
from typing import Any

import numpy as np
from torch import Tensor

from offload.collectives import Ranks
from offload.config import Precision
from offload.device import Device, Mark
from offload.disk.io_queue import TransferQueue
from offload.gradients.landing import GradientPiece
from offload.homes import Home
from offload.lanes import Lanes, Promise, Reason
from offload.memory.region import typed
from offload.memory.ring import Lease, SlabRing
from offload.optimizer.judge import Judge, StepResult, StepVerdict
from offload.optimizer.kernel_step import Run, Stepper
from offload.optimizer.planes import Planes, is_split, record_bytes
from offload.optimizer.stored import StoredPiece
from offload.partition import Partition
from offload.units import DISK_ALIGN_BYTES, Tier, round_up
from offload.weights.fetch import FetchInFlight
from offload.weights.slots import Slot


@dataclass(slots=True, eq=False)
class StatePiece:
    """One piece of trainable elements with the homes of all its kinds."""

    gradient: GradientPiece
    state: Home
    weights: Home
    planes: Planes
    needs_slab: bool
    """Something of it is not addressable by the kernel: it passes through a slab of the step ring."""
    stepped: "Promise[Any] | None" = None
    """Its newest step unit. Set by the training thread."""


@dataclass(slots=True, eq=False)
class StepJob:
    """One step of one piece."""

    piece: StatePiece
    landed: set[int]
    hypers: tuple[Any, ...]
    verdict: "Promise[StepVerdict]"
    last_fetch: FetchInFlight | None
    compute_done: Mark
    all_landed: "Promise[Any]"
    stepped_before: "Promise[Any] | None"
    """The step unit of the same piece in the step before."""
    read_submitted: "Promise[Any] | None" = None
    """None where nothing passes a slab; lease and reads are set before it resolves."""
    lease: Lease | None = None
    reads: "list[Promise[Any]]" = field(default_factory=list)


class StepPipeline:
    """Steps the optimizer on a lane of its own."""

    def __init__(
        self,
        *,
        partitions: Sequence[Partition],
        pieces: Sequence[Sequence[StatePiece]],
        slots: Sequence[Slot],
        precision: Precision,
        gradient_home: Precision,
        max_grad_norm: float | None,
        device: Device,
        lanes: Lanes,
        ring: SlabRing,
        queue: TransferQueue | None,
        stepper: Stepper,
        ranks: Ranks | None = None,
    ) -> None:
        self.pieces = pieces
        self._partitions = partitions
        self._slots = slots
        self._precision = precision
        self._gradient_home = gradient_home
        self._judge = Judge(
            gradients=[[piece.gradient for piece in row] for row in pieces], partitions=partitions, lanes=lanes,
            max_grad_norm=max_grad_norm, ranks=ranks,
        )  # fmt: skip
        self._device = device
        self._lanes = lanes
        self._ring = ring
        self._queue = queue
        self._stepper = stepper
        self._first_numels = list(accumulate((p.trainable.numel for p in partitions), initial=0))
        self._read_lane = lanes.lane("step read") if any(p.needs_slab for ps in pieces for p in ps) else None
        self._step_lane = lanes.lane("step")
        self.num_steps: dict[int, int] = {}
        """Steps taken by every parameter (Entry.index). Written by the step lane."""
        self.last: Promise[Any] = lanes.kept("nothing stepped")

    # -------------------------------------------------------------------------------------- training thread

    def submit(
        self,
        *,
        order: Sequence[int],
        judged: Sequence[int],
        landed: Mapping[int, set[int]],
        hypers: tuple[Any, ...],
        all_landed: "Promise[Any]",
        loss_scale: float,
        last_fetch: dict[int, FetchInFlight],
        strict: bool = False,
    ) -> "tuple[StepResult, dict[int, Promise[Any]], dict[int, list[Promise[Any]]]]":
        """Submit a step over the partitions `order` (forward order).

        `judged`: the partitions whose gradients make the norm. `landed`: by partition, the entries that have a
        gradient; `all_landed`: the last landing. `strict`: a gradient that is not finite is an error, not a skip.
        Returns the result, the publication of every partition, and the units that read each piece's gradient.
        """
        compute_done = self._device.compute.record()
        verdict: Promise[StepVerdict] = self._step_lane.submit(
            partial(self._judge.judge, judged, landed, all_landed, loss_scale, strict), "norm of the gradients"
        )
        published: dict[int, Promise[Any]] = {}
        consumed: dict[int, list[Promise[Any]]] = {}
        for pid in order:
            jobs = [
                StepJob(
                    piece, landed[pid], hypers, verdict, last_fetch.get(pid), compute_done, all_landed, piece.stepped
                )
                for piece in self.pieces[pid]
            ]
            units = [self._lanes.promise(f"step {pid} piece {job.piece.gradient.piece.index}") for job in jobs]
            for job, unit in zip(jobs, units, strict=True):
                if job.piece.needs_slab and self._read_lane is not None:
                    work = partial(self._read, job, unit)
                    job.read_submitted = self._read_lane.submit(work, f"read {unit.name}")
            for job, unit in zip(jobs, units, strict=True):
                job.piece.stepped = self._step_lane.submit(partial(self._step, job), unit.name, unit)
            consumed[pid] = units
            published[pid] = self._step_lane.submit(partial(self._publish, pid, landed[pid], verdict), f"publish {pid}")
        self.last = published[order[-1]] if order else verdict
        return StepResult(verdict, self._lanes), published, consumed

    # -------------------------------------------------------------------------------------------- the lanes

    def _read(self, job: StepJob, unit: "Promise[Any]") -> None:
        piece = job.piece
        if piece.gradient.home.tier is Tier.DISK:
            # Without this the gradient's record is read before it has been written.
            self._lanes.wait(job.all_landed, Reason.LANDED)
        if job.stepped_before is not None:
            # Without this the state is read again before the step before has written it.
            self._lanes.wait(job.stepped_before, Reason.STEP_DONE)
        needed = list(zip((piece.state, piece.gradient.home, piece.weights), self._parts(piece), strict=True))
        if not is_split(piece.planes):
            needed.pop()  # a step only writes them
        for home, _ in needed:
            if home.written is not None:
                # Without this the read overtakes the last write of the same extent.
                self._lanes.wait(home.written, Reason.EXTENT_WRITTEN)
        job.lease = self._ring.lease(returned_by=unit)
        for home, (start, stop) in needed:
            if home.extent is not None and self._queue is not None:
                place = job.lease.bytes[start:stop]
                job.reads.append(self._queue.read(home.stored, place[: home.stored.num_bytes], unit.name))
                if home.zeros_from is not None:
                    self._lanes.declare(writes=[place[home.zeros_from :]])
                    place[home.zeros_from :].zero_()

    def _parts(self, piece: StatePiece) -> list[tuple[int, int]]:
        """Where state record, gradient and new weights lie in a slab; empty where they are addressable at home."""
        numel = piece.gradient.piece.numel
        gradient_bytes = round_up(numel * self._gradient_home.dtype.itemsize, DISK_ALIGN_BYTES)
        weights_bytes = round_up(numel * self._precision.dtype.itemsize, DISK_ALIGN_BYTES)
        sizes = (
            record_bytes(piece.planes, numel) if piece.state.tier is Tier.DISK else 0,
            gradient_bytes if piece.gradient.home.tier is Tier.DISK else 0,
            weights_bytes if self._weights_pass_slab(piece) else 0,
        )
        stops = np.cumsum(sizes).tolist()
        return [(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]

    def _weights_pass_slab(self, piece: StatePiece) -> bool:
        return weights_pass_slab(piece.weights, piece.state)

    def _step(self, job: StepJob) -> None:
        piece = job.piece
        if job.read_submitted is not None:
            # The reads do not exist before the lane that submits them has found a slab.
            self._lanes.wait(job.read_submitted, Reason.READ_ISSUED)
        for read in job.reads:
            # Without this the kernel works on what the slab held before.
            self._lanes.wait(read, Reason.STATE_READ)
        verdict = job.verdict.result()
        if verdict.skipped or not self._any_landed(job):
            if job.lease is not None:
                job.lease.give_back()
            return
        if job.last_fetch is not None:
            # Without these a copy that still reads the old weights sends half of each to the device.
            self._lanes.wait(job.last_fetch.issued, Reason.WEIGHTS_READ)
            if job.last_fetch.arrived is not None:
                self._lanes.wait(job.last_fetch.arrived.promise, Reason.WEIGHTS_READ)
        record, gradient, weights = self._buffers(job)
        numel = piece.gradient.piece.numel
        with self._lanes.timeline.work("step", f"kernel {piece.gradient.piece.partition_id}", len(record) + 2 * numel):
            self._lanes.declare(reads=[gradient], writes=[record, weights])
            self._run_kernel(job, verdict, record, gradient, weights)
        self._write_behind(job, record, weights)

    def _any_landed(self, job: StepJob) -> bool:
        return not job.landed.isdisjoint(job.piece.gradient.owners)

    def _buffers(self, job: StepJob) -> tuple[Tensor, Tensor, Tensor]:
        """State record, gradient and place for the new weights: at home where the kernel can reach it."""
        piece = job.piece
        homes = (piece.state.bytes, piece.gradient.home.bytes, piece.weights.bytes)
        buffers = []
        for home, (start, stop) in zip(homes, self._parts(piece), strict=True):
            if stop > start:
                assert job.lease is not None
                buffers.append(job.lease.bytes[start:stop])
            else:
                assert home is not None
                buffers.append(home)
        return buffers[0], buffers[1], buffers[2]

    def _run_kernel(
        self, job: StepJob, verdict: StepVerdict, record: Tensor, gradient: Tensor, weights: Tensor
    ) -> None:
        piece = job.piece.gradient.piece
        dtype = self._gradient_home.dtype
        stored = StoredPiece(job.piece.planes, record, weights, numel=piece.numel, precision=self._precision)
        if not stored.is_split and self._weights_pass_slab(job.piece) and self._lacks_gradient(job):
            # Entries that are not stepped keep their weights: those of the master, which never went away.
            stored.round_weights()
        self._stepper.step(
            stored, typed(gradient[: piece.numel * dtype.itemsize], dtype), self._runs(job), job.hypers,
            scale=verdict.scale, first=self._first_numels[piece.partition_id] + piece.start, borders_from=piece.start,
        )  # fmt: skip

    def _lacks_gradient(self, job: StepJob) -> bool:
        return not job.landed >= job.piece.gradient.owners

    def _runs(self, job: StepJob) -> list[Run]:
        """The parts of the piece that are stepped: one for each parameter that has a gradient, in order."""
        gradient = job.piece.gradient
        entries = self._partitions[gradient.piece.partition_id].trainable.entries
        runs: list[Run] = []
        for position, segments in groupby(range(len(gradient.entries)), key=lambda i: int(gradient.entries[i])):
            if position in job.landed:
                entry, numbers = entries[position], list(segments)
                start, stop = int(gradient.starts[numbers[0]]), int(gradient.stops[numbers[-1]])
                num_steps = self.num_steps.get(entry.index, 0) + 1
                in_parameter = gradient.piece.start + start - entry.start
                shape = tuple(entry.shape)
                runs.append(Run(start, stop, entry.group or 0, num_steps, entry.index, shape, in_parameter))
        return runs

    def _write_behind(self, job: StepJob, record: Tensor, weights: Tensor) -> None:
        piece, pid = job.piece, job.piece.gradient.piece.partition_id
        pending: list[Promise[Any]] = []
        if piece.state.extent is not None and self._queue is not None:
            piece.state.zeros_from = None
            piece.state.written = self._queue.write(piece.state.extent, record, f"state {pid}")
            pending.append(piece.state.written)
        if piece.weights.extent is not None and self._queue is not None:
            if piece.weights.written is not None:
                # Without this two writes of one extent overtake each other.
                self._lanes.wait(piece.weights.written, Reason.EXTENT_WRITTEN)
            piece.weights.written = self._queue.write(piece.weights.extent, weights, f"weights {pid}")
            pending.append(piece.weights.written)
        elif piece.weights.tier is Tier.DEVICE and self._weights_pass_slab(piece):
            assert piece.weights.bytes is not None
            destination = piece.weights.bytes[: piece.gradient.piece.numel * self._precision.dtype.itemsize]
            # Without this the copy overwrites weights that the last backward still reads.
            self._device.h2d.after(job.compute_done, Reason.SLOT_RELEASED)
            self._device.h2d.copy(destination, weights[: destination.numel()], f"weights {pid}")
            pending.append(self._device.h2d.record().promise)
        if job.lease is not None:
            job.lease.give_back(self._lanes.all_of(pending, f"slab of {pid}") if pending else None)

    def _publish(self, pid: int, landed: set[int], verdict: "Promise[StepVerdict]") -> Mark | None:
        """All pieces are stepped: count the step. The weights are at home, or (a mark) on their way to the device."""
        if not verdict.result().skipped:
            entries = self._partitions[pid].trainable.entries
            for position in landed:
                index = entries[position].index
                self.num_steps[index] = self.num_steps.get(index, 0) + 1
        if any(p.weights.tier is Tier.DEVICE and self._weights_pass_slab(p) for p in self.pieces[pid]):
            return self._device.h2d.record()
        return None


def weights_pass_slab(weights: Home, state: Home) -> bool:
    """New weights of a piece go through a slab: to disk, or to a device whose state is elsewhere."""
    return weights.tier is Tier.DISK or (weights.tier is Tier.DEVICE and state.tier is not Tier.DEVICE)
