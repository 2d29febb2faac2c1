"""The step pipeline: the step decision, then chunk after chunk in forward order, each partition published when done.

Owns: the lanes of a step, the step count of every parameter, the publication of new weights.
Does not: decide a step (decision.py), order its chunks (step_queue.py), read (state_reads.py) or step one
(chunk_stepper.py), offload gradients (gradients/) or fetch weights (weights/).
Threads: `submit` on the training thread; the units run on the lanes `step read` and `step`.

Note [Step order]: chunks are stepped in forward order, so the next forward begins while later chunks are still being
stepped: exact with clipping, because the norm is known before the first chunk.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Unit
from offload.device.protocol import Mark
from offload.gradients.intake import GradientIntake
from offload.memory.ring import Ring
from offload.optimizer.chunk_step import ChunkStep, StagedStep, StateChunk
from offload.optimizer.chunk_stepper import ChunkStepper, SubmittedStep
from offload.optimizer.decision import StepDecider, StepDecision, StepResult
from offload.optimizer.device_step import DeviceStepper
from offload.optimizer.kernel_step import Stepper
from offload.optimizer.request import StepRequest
from offload.optimizer.state_reads import StateReads
from offload.optimizer.step_queue import PartitionStep, StepQueue
from offload.runtime import Runtime
from offload.weights.fetch import WeightFetcher


class StepPipeline:
    """Steps the optimizer on lanes of its own."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        chunks: Sequence[Sequence[StateChunk]],
        intake: GradientIntake,
        fetcher: WeightFetcher,
        ring: Ring,
        stepper: Stepper,
        device_stepper: DeviceStepper | None = None,
    ) -> None:
        """`device_stepper`: for state that is resident on an accelerator."""
        self.chunks = chunks
        self.num_steps: dict[int, int] = {}
        """Steps taken by every parameter (Entry.index). Written by the step lane."""
        self._partitions = runtime.partitions
        self._device = runtime.device
        self._intake = intake
        self._fetcher = fetcher
        lanes = self._lanes = runtime.lanes
        self._decider = StepDecider(runtime, [[chunk.gradient for chunk in row] for row in chunks])
        self._chunk_stepper = ChunkStepper(runtime, stepper, device_stepper, self.num_steps)
        self._is_staged = any(chunk.is_staged for row in chunks for chunk in row)
        read_lane = lanes.lane("step read") if self._is_staged else None
        self._step_lane = lanes.lane("step")
        self._read_lane = read_lane or self._step_lane
        self._reads = StateReads(lanes, self._read_lane, ring)
        self.last: Future[Any] = lanes.resolved("nothing stepped")
        """The newest step has ended."""
        self._queues: list[StepQueue] = []
        """Of the steps that are not over, and of the newest."""

    # -------------------------------------------------------------------------------------- training thread

    def submit(self, request: StepRequest) -> StepResult:
        """Submit a step: from now on its weights are the newest, and its gradients may not be overwritten before it."""
        compute_done = self._device.compute.record()
        all_offloaded = self._intake.last_offload
        decision: Future[StepDecision] = self._step_lane.submit(
            partial(self._decider.decide, request, all_offloaded), "norm of the gradients"
        )
        last_fetch = {pid: fetch for pid in request.order if (fetch := self._fetcher.last_fetch.get(pid)) is not None}
        staged = self._reads.take(chunk for pid in request.order for chunk in self.chunks[pid])
        partitions = [
            PartitionStep(
                pid,
                [self._chunk_step(chunk, staged.get(chunk)) for chunk in self.chunks[pid]],
                self._lanes.future(f"publish: {self._partitions[pid].name}"),
            )
            for pid in request.order
        ]
        self._submit_turns(partitions, SubmittedStep(request, decision, all_offloaded, last_fetch, compute_done))
        for partition in partitions:
            by_chunk = [step.done for step in partition.chunks]
            self._partitions[partition.pid].version += 1
            self._fetcher.publish(partition.pid, partition.published, by_chunk)
            self._intake.consumed(partition.pid, by_chunk)
        return StepResult(decision, self._lanes)

    def _chunk_step(self, chunk: StateChunk, staged: StagedStep | None) -> ChunkStep:
        """The step of a chunk, from now on its newest."""
        step = staged or ChunkStep(
            chunk, self._lanes.future(f"step: {chunk.partition} chunk {chunk.gradient.chunk.index}")
        )
        chunk.newest_step = step.done
        return step

    def _submit_turns(self, partitions: Sequence[PartitionStep], submitted: SubmittedStep) -> None:
        """A turn of the step lane for every chunk and publication, and one of the read lane for every chunk to read."""
        queue = StepQueue(partitions)
        self._queues = [*(older for older in self._queues if not older.is_over), queue]
        read = partial(self._next_read, queue, submitted)
        step = partial(self._next_step, queue, submitted)
        for partition in partitions:
            for chunk_step in partition.chunks:
                if isinstance(chunk_step, StagedStep) and chunk_step.is_to_read:
                    self._read_lane.submit_turn(read)
                self._step_lane.submit_turn(step)
            self._step_lane.submit_turn(step)
        self.last = self._step_lane.submit(_nothing, "end of the step") if partitions else submitted.decision

    def prioritize(self, pid: int) -> None:
        """The new weights of this partition are needed before its turn: step it next. See Note [Front]."""
        for queue in self._queues:
            queue.prioritize(pid)

    def forward_order(self) -> list[int]:
        """All partitions, in the order in which the next forward is expected to use them."""
        used = self._fetcher.schedule.first_uses()
        rest = {partition.id for partition in self._partitions}.difference(used)
        return used + sorted(rest)

    def read_ahead(self) -> None:
        """Begin with the reads of the next step, which is expected to step the partitions that the last one did."""
        if self._is_staged and not self._reads.has_read_ahead:
            newest = self._queues[-1] if self._queues else None
            pids = [pid for pid in self.forward_order() if newest is None or newest.covers(pid)]
            self._reads.read_ahead(chunk for pid in pids for chunk in self.chunks[pid])

    def drop_ahead(self) -> None:
        """Drop what is read ahead: somebody else needs the step ring, or writes state. The steps must be done."""
        self._reads.drop()

    def close(self) -> None:
        """Release every staging buffer; no lane runs any more."""
        self._reads.close()
        self._queues.clear()

    # -------------------------------------------------------------------------------------------- the lanes

    def _next_read(self, queue: StepQueue, submitted: SubmittedStep) -> Unit:
        step = queue.take_read()
        return partial(self._reads.read, step, submitted.all_offloaded), step.issued

    def _next_step(self, queue: StepQueue, submitted: SubmittedStep) -> Unit:
        step = queue.take_step()
        if isinstance(step, PartitionStep):
            return partial(self._publish, step.pid, submitted), step.published
        return partial(self._chunk_stepper.step, step, submitted), step.done

    def _publish(self, pid: int, submitted: SubmittedStep) -> Mark | None:
        """All chunks are stepped: count the step. The weights are there, or (a mark) on their way to the device."""
        if not submitted.decision.result().skipped:
            entries = self._partitions[pid].trainable.entries
            for position in submitted.request.offloaded[pid]:
                index = entries[position].index
                self.num_steps[index] = self.num_steps.get(index, 0) + 1
        if any(self._chunk_stepper.writes_on_device(chunk) for chunk in self.chunks[pid]):
            return self._device.h2d.record()
        return None


def _nothing() -> None:
    """A unit that only marks a place in the lane."""
