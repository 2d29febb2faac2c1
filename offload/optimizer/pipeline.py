"""The step pipeline: norm, then kernel, state and weights written behind, in forward order.

Owns: the step count of every parameter, the homes of state, the publication of new weights.
Does not: take the norm (judge.py), read state ahead (state_reads.py), keep the order of a step (jobs.py), land
gradients (gradients/) or fetch weights (weights/).
Threads: `submit` on the training thread; the units run on the lanes `step read` and `step`.

Note [Step order]: chunks are stepped in forward order, so the next forward begins while later chunks are still being
stepped: exact with clipping, because the norm is known before the first chunk.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, groupby
from typing import Any

from torch import Tensor

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Reason
from offload.device.protocol import Mark
from offload.memory.region import typed
from offload.memory.ring import Lease, Ring
from offload.optimizer.decision import StepDecider, StepDecision, StepResult
from offload.optimizer.device_step import DeviceStepper
from offload.optimizer.kernel_step import Run, Stepper
from offload.optimizer.state_reads import StateReads
from offload.optimizer.step_queue import Board, Job, StateChunk, StepJob, weights_are_staged
from offload.runtime import Runtime
from offload.storage.chunk_state import ChunkState
from offload.storage.homes import DiskHome
from offload.units import Tier
from offload.weights.fetch import FetchInFlight


class StepPipeline:
    """Steps the optimizer on a lane of its own."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        chunks: Sequence[Sequence[StateChunk]],
        ring: Ring,
        stepper: Stepper,
        device_stepper: DeviceStepper | None = None,
    ) -> None:
        """`device_stepper`: for state at home on an accelerator."""
        self.chunks = chunks
        self._partitions = runtime.partitions
        self._precision = runtime.precision
        self._gradient_home = runtime.gradient_precision
        self._decider = StepDecider(runtime, [[chunk.gradient for chunk in row] for row in chunks])
        self._device = runtime.device
        lanes = self._lanes = runtime.lanes
        self._stepper = stepper
        self._device_stepper = device_stepper
        self._first_numels = list(accumulate((p.trainable.numel for p in runtime.partitions), initial=0))
        self._reads = StateReads(
            runtime, ring=ring,
            lane=lanes.lane("step read") if any(p.is_staged for ps in chunks for p in ps) else None,
        )  # fmt: skip
        self._step_lane = lanes.lane("step")
        self.num_steps: dict[int, int] = {}
        """Steps taken by every parameter (Entry.index). Written by the step lane."""
        self.last: Future[Any] = lanes.resolved("nothing stepped")
        self._boards: list[Board] = []
        """Of the steps that are not over, and of the newest."""

    # -------------------------------------------------------------------------------------- training thread

    def submit(
        self,
        *,
        order: Sequence[int],
        in_norm: Sequence[int],
        offloaded: Mapping[int, set[int]],
        hypers: tuple[Any, ...],
        all_offloaded: "Future[Any]",
        loss_scale: float,
        last_fetch: dict[int, FetchInFlight],
        strict: bool = False,
    ) -> "tuple[StepResult, dict[int, Future[Any]], dict[int, list[Future[Any]]]]":
        """Submit a step over the partitions `order` (forward order).

        `in_norm`: the partitions whose gradients make the norm. `offloaded`: by partition, the entries that have a
        gradient; `all_offloaded`: the last gradient offload. `strict`: a gradient that is not finite is an error, not a skip.
        Returns the result, the publication of every partition, and the units that read each chunk's gradient.
        """
        compute_done = self._device.compute.record()
        decision: Future[StepDecision] = self._step_lane.submit(
            partial(self._decider.decide, in_norm, offloaded, all_offloaded, loss_scale, strict),
            "norm of the gradients",
        )
        staged = [chunk for pid in order for chunk in self.chunks[pid] if chunk.is_staged]
        passages = dict(zip(staged, self._reads.take(staged, all_offloaded), strict=True))
        jobs: list[Job] = []
        published: dict[int, Future[Any]] = {}
        consumed: dict[int, list[Future[Any]]] = {}
        for pid in order:
            steps = [
                StepJob(chunk, offloaded[pid], hypers, decision, last_fetch.get(pid), compute_done, passages.get(chunk))
                for chunk in self.chunks[pid]
            ]
            consumed[pid] = [self._stepped(step) for step in steps]
            for step, done in zip(steps, consumed[pid], strict=True):
                jobs.append(Job(pid, done, partial(self._step, step), step.passage))
            published[pid] = self._lanes.future(f"publish {pid}")
            jobs.append(Job(pid, published[pid], partial(self._publish, pid, offloaded[pid], decision), publishes=True))
        self.last = self._begin(jobs) if jobs else decision
        return StepResult(decision, self._lanes), published, consumed

    def _begin(self, jobs: Sequence[Job]) -> "Future[Any]":
        """Submit the jobs of a step; returns the future of their end."""
        board = Board(jobs, lanes=self._lanes)
        self._boards = [*(one for one in self._boards if not one.is_over), board]
        return board.submit(self._step_lane, self._reads.lane, self._reads.read)[-1]

    def _stepped(self, step: StepJob) -> "Future[Any]":
        """The future of this step, from now on the newest of its chunk."""
        chunk = step.chunk.gradient.chunk
        name = f"step {chunk.partition_id} chunk {chunk.index}"
        step.chunk.stepped = step.passage.done if step.passage is not None else self._lanes.future(name)
        return step.chunk.stepped

    def hurry(self, pid: int) -> None:
        """The new weights of this partition are needed before its turn: step it next. See Note [Front] in jobs.py."""
        for board in self._boards:
            board.hurry(pid)

    def read_ahead(self, order: Callable[[], Sequence[int]]) -> None:
        """Begin with the reads of the next step, expected over those of `order` (forward order) that the last had."""
        if self._reads.may_read_ahead:
            before = self._boards[-1].pids if self._boards else None
            pids = [pid for pid in order() if before is None or pid in before]
            self._reads.ahead(chunk for pid in pids for chunk in self.chunks[pid])

    def drop_ahead(self) -> None:
        """Let go of what is read ahead: somebody else needs the step ring, or writes state. The steps must be done."""
        self._reads.drop()

    def close(self) -> None:
        """Let go of every staging buffer; no lane runs any more."""
        self._reads.close()
        self._boards.clear()

    # -------------------------------------------------------------------------------------------- the lanes

    def _step(self, job: StepJob) -> None:
        chunk, lease = job.chunk, None
        if job.passage is not None:
            # The reads do not exist before the lane that submits them has found a staging buffer.
            self._lanes.wait(job.passage.issued, Reason.READ_ISSUED)
            for read in job.passage.reads:
                # Without this the kernel works on what the staging buffer held before.
                self._lanes.wait(read, Reason.STATE_READ)
            lease = job.passage.lease
        decision = job.decision.result()
        if decision.skipped or not self._any_offloaded(job):
            if lease is not None:
                lease.release()
            return
        if job.last_fetch is not None:
            # Without these a copy that still reads the old weights sends half of each to the device.
            copied = self._lanes.wait(job.last_fetch.issued, Reason.WEIGHTS_READ)
            self._lanes.wait(copied.future, Reason.WEIGHTS_READ)
        record, gradient, weights = self._buffers(chunk, lease)
        if self._is_stepped_there(chunk):
            self._step_there(job, decision, record, gradient, weights)
            return
        numel = chunk.gradient.chunk.numel
        with self._lanes.timeline.work("step", f"kernel {chunk.gradient.chunk.partition_id}", len(record) + 2 * numel):
            self._lanes.declare(reads=[gradient], writes=[record, weights])
            self._run_kernel(job, decision, record, gradient, weights)
        self._write_behind(job, lease, record, weights)

    def _is_stepped_there(self, chunk: StateChunk) -> bool:
        return chunk.state.tier is Tier.DEVICE and self._device_stepper is not None

    def _step_there(
        self, job: StepJob, decision: StepDecision, record: Tensor, gradient: Tensor, weights: Tensor
    ) -> None:
        """On an accelerator that all of the chunk is at home on."""
        assert self._device_stepper is not None
        chunk = job.chunk.gradient.chunk
        job.chunk.gradient.read_by = self._device_stepper.step(
            job.chunk.state_tensors, (record, gradient, weights), self._runs(job), job.hypers, numel=chunk.numel,
            scale=decision.scale, compute_done=job.compute_done, name=f"kernel {chunk.partition_id}",
        )  # fmt: skip

    def _any_offloaded(self, job: StepJob) -> bool:
        return not job.offloaded.isdisjoint(job.chunk.gradient.owners)

    def _buffers(self, chunk: StateChunk, lease: Lease | None) -> tuple[Tensor, Tensor, Tensor]:
        """State record, gradient and place for the new weights: at home where the kernel can reach it."""
        homes = (chunk.state, chunk.gradient.home, chunk.weights)
        buffers = []
        for home, (start, stop) in zip(homes, self._reads.parts(chunk), strict=True):
            if stop > start:
                assert lease is not None
                buffers.append(lease.bytes[start:stop])
            else:
                buffers.append(home.bytes)
        return buffers[0], buffers[1], buffers[2]

    def _run_kernel(
        self, job: StepJob, decision: StepDecision, record: Tensor, gradient: Tensor, weights: Tensor
    ) -> None:
        chunk = job.chunk.gradient.chunk
        dtype = self._gradient_home.dtype
        stored = ChunkState(job.chunk.state_tensors, record, weights, numel=chunk.numel, precision=self._precision)
        if not stored.is_split and weights_are_staged(job.chunk.weights, job.chunk.state) and self._lacks_gradient(job):
            # Entries that are not stepped keep their weights: those of the master, which never went away.
            stored.round_weights()
        self._stepper.step(
            stored, typed(gradient[: chunk.numel * dtype.itemsize], dtype), self._runs(job), job.hypers,
            scale=decision.scale, first=self._first_numels[chunk.partition_id] + chunk.start, borders_from=chunk.start,
        )  # fmt: skip

    def _lacks_gradient(self, job: StepJob) -> bool:
        return not job.offloaded >= job.chunk.gradient.owners

    def _runs(self, job: StepJob) -> list[Run]:
        """The parts of the chunk that are stepped: one for each parameter that has a gradient, in order."""
        gradient = job.chunk.gradient
        entries = self._partitions[gradient.chunk.partition_id].trainable.entries
        runs: list[Run] = []
        for position, segments in groupby(range(len(gradient.entries)), key=lambda i: int(gradient.entries[i])):
            if position in job.offloaded:
                entry, numbers = entries[position], list(segments)
                start, stop = int(gradient.starts[numbers[0]]), int(gradient.stops[numbers[-1]])
                num_steps = self.num_steps.get(entry.index, 0) + 1
                in_parameter = gradient.chunk.start + start - entry.start
                shape = tuple(entry.shape)
                runs.append(Run(start, stop, entry.group or 0, num_steps, entry.index, shape, in_parameter))
        return runs

    def _write_behind(self, job: StepJob, lease: Lease | None, record: Tensor, weights: Tensor) -> None:
        chunk, pid = job.chunk, job.chunk.gradient.chunk.partition_id
        pending: list[Future[Any]] = []
        if isinstance(chunk.state, DiskHome):
            pending.append(chunk.state.write(record, f"state {pid}"))
        if isinstance(chunk.weights, DiskHome):
            pending.append(chunk.weights.write(weights, f"weights {pid}"))
        elif chunk.weights.tier is Tier.DEVICE and weights_are_staged(chunk.weights, chunk.state):
            destination = chunk.weights.bytes[: chunk.gradient.chunk.numel * self._precision.dtype.itemsize]
            # Without this the copy overwrites weights that the last backward still reads.
            self._device.h2d.after(job.compute_done, Reason.SLOT_RELEASED)
            self._device.h2d.copy(destination, weights[: destination.numel()], f"weights {pid}")
            pending.append(self._device.h2d.record().future)
        if lease is not None:
            lease.release(self._lanes.all_of(pending, f"staging buffer of {pid}") if pending else None)

    def _publish(self, pid: int, offloaded: set[int], decision: "Future[StepDecision]") -> Mark | None:
        """All chunks are stepped: count the step. The weights are at home, or (a mark) on their way to the device."""
        if not decision.result().skipped:
            entries = self._partitions[pid].trainable.entries
            for position in offloaded:
                index = entries[position].index
                self.num_steps[index] = self.num_steps.get(index, 0) + 1
        if any(
            p.weights.tier is Tier.DEVICE and (weights_are_staged(p.weights, p.state) or self._is_stepped_there(p))
            for p in self.chunks[pid]
        ):
            return self._device.h2d.record()
        return None
