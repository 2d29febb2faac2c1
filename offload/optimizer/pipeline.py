"""The step pipeline: norm, then kernel, state and weights written behind, in forward order.

Owns: the step count of every parameter, the homes of state, the publication of new weights.
Does not: take the norm (judge.py), read state ahead (state_reads.py), keep the order of a step (jobs.py), land
gradients (gradients/) or fetch weights (weights/).
Threads: `submit` on the training thread; the units run on the lanes `step read` and `step`.

Note [Step order]: pieces are stepped in forward order, so the next forward begins while later pieces are still being
stepped: exact with clipping, because the norm is known before the first piece.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, groupby
from typing import Any

import numpy as np
from torch import Tensor

from offload.config import Precision
from offload.device import Device, Mark
from offload.disk.io_queue import TransferQueue
from offload.homes import Wanted
from offload.lanes import Lanes, Promise, Reason
from offload.memory.region import bits, typed
from offload.memory.ring import Lease, SlabRing
from offload.optimizer.device_step import DeviceStepper
from offload.optimizer.jobs import Board, Job, StatePiece, StepJob, weights_pass_slab
from offload.optimizer.judge import Judge, StepResult, StepVerdict
from offload.optimizer.kernel_step import Run, Stepper
from offload.optimizer.state_reads import StateReads
from offload.optimizer.stored import StoredPiece
from offload.partition import Partition
from offload.ranks.collectives import Ranks
from offload.units import Tier
from offload.weights.fetch import FetchInFlight


class StepPipeline:
    """Steps the optimizer on a lane of its own."""

    def __init__(
        self,
        *,
        partitions: Sequence[Partition],
        pieces: Sequence[Sequence[StatePiece]],
        precision: Precision,
        gradient_home: Precision,
        max_grad_norm: float | None,
        device: Device,
        lanes: Lanes,
        ring: SlabRing,
        queue: TransferQueue | None,
        stepper: Stepper,
        ranks: Ranks | None = None,
        device_stepper: DeviceStepper | None = None,
    ) -> None:
        """`device_stepper`: for state at home on an accelerator."""
        self.pieces = pieces
        self._partitions = partitions
        self._precision = precision
        self._gradient_home = gradient_home
        self._judge = Judge(
            gradients=[[piece.gradient for piece in row] for row in pieces], partitions=partitions, lanes=lanes,
            max_grad_norm=max_grad_norm, ranks=ranks,
        )  # fmt: skip
        self._device = device
        self._lanes = lanes
        self._queue = queue
        self._stepper = stepper
        self._device_stepper = device_stepper
        self._first_numels = list(accumulate((p.trainable.numel for p in partitions), initial=0))
        self._reads = StateReads(
            precision=precision, gradient_home=gradient_home, lanes=lanes, ring=ring, queue=queue,
            lane=lanes.lane("step read") if any(p.needs_slab for ps in pieces for p in ps) else None,
        )  # fmt: skip
        self._step_lane = lanes.lane("step")
        self.num_steps: dict[int, int] = {}
        """Steps taken by every parameter (Entry.index). Written by the step lane."""
        self.last: Promise[Any] = lanes.kept("nothing stepped")
        self._boards: list[Board] = []
        """Of the steps that are not over, and of the newest."""

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
        in_slabs = [piece for pid in order for piece in self.pieces[pid] if piece.needs_slab]
        passages = dict(zip(in_slabs, self._reads.take(in_slabs, all_landed), strict=True))
        jobs: list[Job] = []
        published: dict[int, Promise[Any]] = {}
        consumed: dict[int, list[Promise[Any]]] = {}
        for pid in order:
            steps = [
                StepJob(piece, landed[pid], hypers, verdict, last_fetch.get(pid), compute_done, passages.get(piece))
                for piece in self.pieces[pid]
            ]
            consumed[pid] = [self._stepped(step) for step in steps]
            for step, done in zip(steps, consumed[pid], strict=True):
                jobs.append(Job(pid, done, partial(self._step, step), step.passage))
            published[pid] = self._lanes.promise(f"publish {pid}")
            jobs.append(Job(pid, published[pid], partial(self._publish, pid, landed[pid], verdict), publishes=True))
        self.last = self._begin(jobs) if jobs else verdict
        return StepResult(verdict, self._lanes), published, consumed

    def _begin(self, jobs: Sequence[Job]) -> "Promise[Any]":
        """Submit the jobs of a step; returns the promise of their end."""
        board = Board(jobs, lanes=self._lanes)
        self._boards = [*(one for one in self._boards if not one.is_over), board]
        return board.submit(self._step_lane, self._reads.lane, self._reads.read)[-1]

    def _stepped(self, step: StepJob) -> "Promise[Any]":
        """The promise of this step, from now on the newest of its piece."""
        piece = step.piece.gradient.piece
        name = f"step {piece.partition_id} piece {piece.index}"
        step.piece.stepped = step.passage.done if step.passage is not None else self._lanes.promise(name)
        return step.piece.stepped

    def hurry(self, pid: int) -> None:
        """The new weights of this partition are needed before its turn: step it next. See Note [Front] in jobs.py."""
        for board in self._boards:
            board.hurry(pid)

    def read_ahead(self, order: Callable[[], Sequence[int]]) -> None:
        """Begin with the reads of the next step, expected over those of `order` (forward order) that the last had."""
        if self._reads.may_read_ahead:
            before = self._boards[-1].pids if self._boards else None
            pids = [pid for pid in order() if before is None or pid in before]
            self._reads.ahead(piece for pid in pids for piece in self.pieces[pid])

    def drop_ahead(self) -> None:
        """Let go of what is read ahead: somebody else needs the step ring, or writes state. The steps must be done."""
        self._reads.drop()

    def close(self) -> None:
        """Let go of every slab; no lane runs any more."""
        self._reads.close()
        self._boards.clear()

    # -------------------------------------------------------------------------------------------- the lanes

    def _step(self, job: StepJob) -> None:
        piece, lease = job.piece, None
        if job.passage is not None:
            # The reads do not exist before the lane that submits them has found a slab.
            self._lanes.wait(job.passage.issued, Reason.READ_ISSUED)
            for read in job.passage.reads:
                # Without this the kernel works on what the slab held before.
                self._lanes.wait(read, Reason.STATE_READ)
            lease = job.passage.lease
        verdict = job.verdict.result()
        if verdict.skipped or not self._any_landed(job):
            if lease is not None:
                lease.give_back()
            return
        if job.last_fetch is not None:
            # Without these a copy that still reads the old weights sends half of each to the device.
            self._lanes.wait(job.last_fetch.issued, Reason.WEIGHTS_READ)
            if job.last_fetch.arrived is not None:
                self._lanes.wait(job.last_fetch.arrived.promise, Reason.WEIGHTS_READ)
        record, gradient, weights = self._buffers(piece, lease)
        if self._is_stepped_there(piece):
            self._step_there(job, verdict, record, gradient, weights)
            return
        numel = piece.gradient.piece.numel
        with self._lanes.timeline.work("step", f"kernel {piece.gradient.piece.partition_id}", len(record) + 2 * numel):
            self._lanes.declare(reads=[gradient], writes=[record, weights])
            self._run_kernel(job, verdict, record, gradient, weights)
        self._write_behind(job, lease, record, weights)

    def _is_stepped_there(self, piece: StatePiece) -> bool:
        return piece.state.tier is Tier.DEVICE and self._device_stepper is not None

    def _step_there(
        self, job: StepJob, verdict: StepVerdict, record: Tensor, gradient: Tensor, weights: Tensor
    ) -> None:
        """On an accelerator that all of the piece is at home on."""
        assert self._device_stepper is not None
        piece = job.piece.gradient.piece
        job.piece.gradient.read_by = self._device_stepper.step(
            job.piece.planes, (record, gradient, weights), self._runs(job), job.hypers, numel=piece.numel,
            scale=verdict.scale, compute_done=job.compute_done, name=f"kernel {piece.partition_id}",
        )  # fmt: skip

    def _any_landed(self, job: StepJob) -> bool:
        return not job.landed.isdisjoint(job.piece.gradient.owners)

    def _buffers(self, piece: StatePiece, lease: Lease | None) -> tuple[Tensor, Tensor, Tensor]:
        """State record, gradient and place for the new weights: at home where the kernel can reach it."""
        homes = (piece.state.bytes, piece.gradient.home.bytes, piece.weights.bytes)
        buffers = []
        for home, (start, stop) in zip(homes, self._reads.parts(piece), strict=True):
            if stop > start:
                assert lease is not None
                buffers.append(lease.bytes[start:stop])
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
        if not stored.is_split and weights_pass_slab(job.piece.weights, job.piece.state) and self._lacks_gradient(job):
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

    def _write_behind(self, job: StepJob, lease: Lease | None, record: Tensor, weights: Tensor) -> None:
        piece, pid = job.piece, job.piece.gradient.piece.partition_id
        pending: list[Promise[Any]] = []
        if piece.state.extent is not None and self._queue is not None:
            piece.state.zeros_from = None
            piece.state.written = self._queue.write(piece.state.extent, record, f"state {pid}")
            pending.append(piece.state.written)
        wanted = piece.weights.wanted
        if wanted is not None:
            self._hand_over(wanted, weights)
        if piece.weights.extent is not None and self._queue is not None:
            if piece.weights.written is not None:
                # Without this two writes of one extent overtake each other.
                self._lanes.wait(piece.weights.written, Reason.EXTENT_WRITTEN)
            piece.weights.written = self._queue.write(piece.weights.extent, weights, f"weights {pid}")
            pending.append(piece.weights.written)
        elif piece.weights.tier is Tier.DEVICE and weights_pass_slab(piece.weights, piece.state):
            assert piece.weights.bytes is not None
            destination = piece.weights.bytes[: piece.gradient.piece.numel * self._precision.dtype.itemsize]
            # Without this the copy overwrites weights that the last backward still reads.
            self._device.h2d.after(job.compute_done, Reason.SLOT_RELEASED)
            self._device.h2d.copy(destination, weights[: destination.numel()], f"weights {pid}")
            pending.append(self._device.h2d.record().promise)
        if lease is not None:
            lease.give_back(self._lanes.all_of(pending, f"slab of {pid}") if pending else None)

    def _hand_over(self, wanted: Wanted, weights: Tensor) -> None:
        """New weights straight to the fetch that waits for them, beside their way to the disk."""
        # Long kept, so nobody waits. Without this the place may still be copied from, by the fetch that had it before.
        self._lanes.wait(wanted.asked, Reason.PLACE_FREE)
        with self._lanes.timeline.work("step", "hand over"):
            self._lanes.declare(reads=[weights], writes=[wanted.place])
            np.copyto(bits(wanted.place), bits(weights[: wanted.place.numel()]))
        wanted.filled = True

    def _publish(self, pid: int, landed: set[int], verdict: "Promise[StepVerdict]") -> Mark | None:
        """All pieces are stepped: count the step. The weights are at home, or (a mark) on their way to the device."""
        if not verdict.result().skipped:
            entries = self._partitions[pid].trainable.entries
            for position in landed:
                index = entries[position].index
                self.num_steps[index] = self.num_steps.get(index, 0) + 1
        if any(
            p.weights.tier is Tier.DEVICE and (weights_pass_slab(p.weights, p.state) or self._is_stepped_there(p))
            for p in self.pieces[pid]
        ):
            return self._device.h2d.record()
        return None
