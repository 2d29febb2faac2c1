"""What a step reads from disk: a staging buffer for every chunk that needs one, and its reads, in the order of steps.

Owns: the step ring while the pipeline runs, and what of the next step is read ahead.
Does not: decide the order of chunks (step_queue.py), step them or write them behind (chunk_stepper.py).
Threads: `read_ahead`, `take` and `drop` on the training thread (or autograd's); the units run on the lane `step read`.

Note [Read ahead]: while a backward runs, the step ring is idle. So when one begins, the state of the first chunks of
the step to come is read, of as many as there are staging buffers. `step()` takes over what it begins with; the rest,
and all of it where something else needs the ring, is dropped by a unit of the same lane. Nobody else leases from the
ring before that: a lease that was acquired ahead is released by a unit that is not yet submitted, and nothing may wait
for it. There are no more of these leases than staging buffers, so none of them waits for another.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Lane, Lanes, Reason
from offload.memory.ring import Lease, Ring
from offload.optimizer.chunk_step import Staged, StagedStep, StateChunk, StepState
from offload.storage.homes import DiskHome, Home
from offload.storage.state_tensors import is_split

DROPPED = "chunks read ahead in vain"
"""Counter of the timeline."""


class StateReads:
    """Of one pipeline. `lane` runs the reads, and nothing else where chunks are staged."""

    def __init__(self, lanes: Lanes, lane: Lane, ring: Ring) -> None:
        self._lanes = lanes
        self._lane = lane
        self._ring = ring
        self._ahead: list[StagedStep] = []
        self._last_drop: Future[Any] = lanes.resolved("nothing dropped")

    # -------------------------------------------------------------------------------------- training thread

    @property
    def has_read_ahead(self) -> bool:
        """Something is read ahead that no step has taken over."""
        return bool(self._ahead)

    def read_ahead(self, chunks: Iterable[StateChunk]) -> None:
        """Read the first of `chunks`, which the next step is expected to step in this order. See Note [Read ahead]."""
        for chunk in islice((chunk for chunk in chunks if chunk.is_staged), self._ring.num_buffers):
            step = self._staged_step(chunk, StepState.AHEAD)
            self._lane.submit(partial(self._read_state, step), step.issued.name, step.issued)
            self._ahead.append(step)

    def take(self, chunks: Iterable[StateChunk]) -> dict[StateChunk, StagedStep]:
        """The steps of those of `chunks` that are staged; the first ones were read ahead, as far as they match.

        The others have yet to be read; so have the gradients of the first where they are stored on disk.
        """
        staged = [chunk for chunk in chunks if chunk.is_staged]
        steps = self._take_ahead(staged)
        for chunk in staged[len(steps) :]:
            steps[chunk] = self._staged_step(chunk, StepState.WAITING)
        return steps

    def _take_ahead(self, chunks: Sequence[StateChunk]) -> dict[StateChunk, StagedStep]:
        ahead, self._ahead = self._ahead, []
        taken: dict[StateChunk, StagedStep] = {}
        for chunk in chunks:
            position = next((i for i, step in enumerate(ahead) if step.chunk is chunk), None)
            if position is None:
                break
            self._drop(ahead[:position])
            step = taken[chunk] = ahead[position]
            del ahead[: position + 1]
            step.move(StepState.BEGUN)
            step.ahead = step.issued
            if chunk.stages_gradient:
                step.issued = self._lanes.future(f"read gradient of {step.done.name}")
        self._drop(ahead)
        return taken

    def drop(self) -> None:
        """Nothing is read ahead any more, and the ring is at rest, unless a step is under way: others may lease."""
        ahead, self._ahead = self._ahead, []
        self._drop(ahead)
        # Without this two threads lease from the ring, and what is dropped is still read while others write there.
        self._lanes.wait(self._last_drop, Reason.AHEAD_DROPPED)

    def close(self) -> None:
        """Forget what is read ahead: no lane runs any more."""
        self._ahead.clear()

    def _drop(self, steps: Sequence[StagedStep]) -> None:
        for step in steps:
            step.move(StepState.DROPPED)
            self._last_drop = self._lane.submit(partial(self._release, step), step.done.name, step.done)
            self._lanes.timeline.count(DROPPED)

    def _staged_step(self, chunk: StateChunk, state: StepState) -> StagedStep:
        done = self._lanes.future(f"step: {chunk.partition} chunk {chunk.gradient.chunk.index}")
        issued = self._lanes.future(f"read {done.name}")
        return StagedStep(chunk, done, issued, chunk.newest_step, state=state)

    # --------------------------------------------------------------------------------------------- the lane

    def read(self, step: StagedStep, all_offloaded: "Future[Any]") -> Staged:
        """Submit all that the step reads, or what was not read ahead. `all_offloaded`: the last gradient offload."""
        if step.chunk.stages_gradient:
            # Without this the gradient's record is read before its write has even begun.
            self._lanes.wait(all_offloaded, Reason.OFFLOADED)
        staged = self._read_state(step) if step.ahead is None else step.ahead.result()
        gradient = self._read(step, step.chunk.gradient.home, staged.lease, step.chunk.layout.gradient)
        return Staged(staged.lease, (*staged.reads, *gradient))

    def _read_state(self, step: StagedStep) -> Staged:
        """Acquire a staging buffer, and submit the reads of all that does not depend on the gradient."""
        chunk = step.chunk
        if step.step_before is not None:
            # Without this the state is read again before the step before has written it.
            self._lanes.wait(step.step_before, Reason.STEP_DONE)
        lease = self._ring.acquire(released_by=step.done)
        if step.state is StepState.DROPPED:
            return Staged(lease, ())
        reads = self._read(step, chunk.state, lease, chunk.layout.state)
        if is_split(chunk.state_tensors):  # else a step only writes the weights
            reads += self._read(step, chunk.weights, lease, chunk.layout.weights)
        return Staged(lease, reads)

    def _read(self, step: StagedStep, home: Home, lease: Lease, place: slice) -> "tuple[Future[Any], ...]":
        if not isinstance(home, DiskHome):
            return ()
        return (home.read(lease.bytes[place], step.done.name),)

    def _release(self, step: StagedStep) -> None:
        staged = step.issued.result()  # a unit of the same lane
        for read in staged.reads:
            # Without this the read ends in a staging buffer that is another's, or during a write of the same extent.
            self._lanes.wait(read, Reason.STATE_READ)
        staged.lease.release()
