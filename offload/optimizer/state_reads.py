"""What a step reads from disk: a staging buffer for every chunk that needs one, and its reads, in the order of the steps.

Owns: the step ring while the pipeline runs, what of the next step is read ahead, where its parts lie in a staging buffer.
Does not: decide the order of chunks (jobs.py), step them or write them behind (pipeline.py).
Threads: `ahead`, `take` and `drop` on the training thread (or autograd's); the units run on the lane `step read`.

Note [Read ahead]: while a backward runs, the step ring has nothing to do. So when one begins, the state of the first
chunks of the step to come is read, of as many as there are staging buffers. `step()` takes over what it begins with; the rest,
and all of it where something else needs the ring, is dropped by a unit of the same lane. Nobody else leases from the
ring before that: a lease that was taken ahead is given back by a unit that is not yet submitted, and nothing may wait
for it. There are no more of these leases than staging buffers, so none of them waits for another.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Lane, Reason
from offload.memory.ring import Ring
from offload.optimizer.step_queue import Passage, StateChunk, weights_are_staged
from offload.runtime import Runtime
from offload.storage.homes import DiskHome, Home
from offload.storage.state_tensors import is_split, record_bytes
from offload.units import DISK_ALIGN_BYTES, Tier, round_up

DROPPED = "chunks read ahead in vain"
"""Counter of the timeline."""


class StateReads:
    """Of one pipeline."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        lane: Lane | None,
        ring: Ring,
    ) -> None:
        self._precision = runtime.precision
        self._gradient_home = runtime.gradient_precision
        self._lanes = runtime.lanes
        self.lane = lane
        self._ring = ring
        self._ahead: list[Passage] = []
        self._last_drop: Future[Any] = runtime.lanes.resolved("nothing dropped")

    # -------------------------------------------------------------------------------------- training thread

    @property
    def may_read_ahead(self) -> bool:
        """Something can be read ahead, and nothing is."""
        return self.lane is not None and not self._ahead

    def ahead(self, chunks: Iterable[StateChunk]) -> None:
        """Read the first of `chunks`, which the next step is expected to step in this order. See Note [Read ahead]."""
        assert self.lane is not None
        for chunk in islice((chunk for chunk in chunks if chunk.is_staged), self._ring.num_buffers):
            passage = self._passage(chunk)
            passage.ahead = True
            self.lane.submit(partial(self._read_state, passage), passage.issued.name, passage.issued)
            self._ahead.append(passage)

    def take(self, chunks: Sequence[StateChunk], all_offloaded: "Future[Any]") -> list[Passage]:
        """The passages of `chunks`, all of which need a staging buffer: first those that were read ahead, while they match.

        The others have yet to be read, by `read`; so have the gradients of the first where they are at home on disk.
        """
        ahead, self._ahead = self._ahead, []
        passages: list[Passage] = []
        for chunk in chunks:
            position = next((i for i, passage in enumerate(ahead) if passage.chunk is chunk), None)
            if position is None:
                break
            self._drop(ahead[:position])
            passages.append(ahead[position])
            del ahead[: position + 1]
        self._drop(ahead)
        for passage in passages:
            if passage.needs_gradient:
                passage.issued = self._lanes.future(f"read gradient of {passage.done.name}")
        passages += [self._passage(chunk) for chunk in chunks[len(passages) :]]
        for passage in passages:
            passage.all_offloaded = all_offloaded
        return passages

    def drop(self) -> None:
        """Nothing is read ahead any more, and the ring is at rest, unless a step is under way: others may lease."""
        ahead, self._ahead = self._ahead, []
        self._drop(ahead)
        # Without this two threads lease from one ring, and what is dropped is still read while others write there.
        self._lanes.wait(self._last_drop, Reason.AHEAD_DROPPED)

    def close(self) -> None:
        """Forget what is read ahead: no lane runs any more."""
        self._ahead.clear()

    def _drop(self, passages: Sequence[Passage]) -> None:
        for passage in passages:
            assert self.lane is not None
            passage.dropped = True
            self._last_drop = self.lane.submit(partial(self._release, passage), passage.done.name, passage.done)
            self._lanes.timeline.count(DROPPED)

    def _passage(self, chunk: StateChunk) -> Passage:
        done = self._lanes.future(f"step {chunk.gradient.chunk.partition_id} chunk {chunk.gradient.chunk.index}")
        return Passage(chunk, done, self._lanes.future(f"read {done.name}"), chunk.stepped)

    # --------------------------------------------------------------------------------------------- the lane

    def read(self, passage: Passage) -> None:
        """All that a step reads, or what was not read ahead."""
        if passage.needs_gradient and passage.all_offloaded is not None:
            # Without this the gradient's record is read before its write has even begun.
            self._lanes.wait(passage.all_offloaded, Reason.OFFLOADED)
        if not passage.ahead:
            self._read_state(passage)
        if passage.needs_gradient:
            self._read(passage, passage.chunk.gradient.home, self.parts(passage.chunk)[1])

    def _read_state(self, passage: Passage) -> None:
        """Take a staging buffer, and read into it all that does not depend on the gradient."""
        chunk = passage.chunk
        if passage.stepped_before is not None:
            # Without this the state is read again before the step before has written it.
            self._lanes.wait(passage.stepped_before, Reason.STEP_DONE)
        state, _, weights = self.parts(chunk)
        needed = [(chunk.state, state)]
        if is_split(chunk.state_tensors):
            needed.append((chunk.weights, weights))  # else a step only writes them
        passage.lease = self._ring.acquire(released_by=passage.done)
        for home, part in needed if not passage.dropped else ():
            self._read(passage, home, part)

    def _read(self, passage: Passage, home: Home, part: tuple[int, int]) -> None:
        if isinstance(home, DiskHome):
            assert passage.lease is not None
            passage.reads.append(home.read(passage.lease.bytes[slice(*part)], passage.done.name))

    def _release(self, passage: Passage) -> None:
        for read in passage.reads:
            # Without this the read ends in a staging buffer that is another's, or beside a write of the same extent.
            self._lanes.wait(read, Reason.STATE_READ)
        assert passage.lease is not None
        passage.lease.release()

    # ------------------------------------------------------------------------------------------------- staging buffers

    def parts(self, chunk: StateChunk) -> list[tuple[int, int]]:
        """Where state record, gradient and new weights lie in a staging buffer; empty where they are addressable at home."""
        numel = chunk.gradient.chunk.numel
        gradient_bytes = round_up(numel * self._gradient_home.dtype.itemsize, DISK_ALIGN_BYTES)
        weights_bytes = round_up(numel * self._precision.dtype.itemsize, DISK_ALIGN_BYTES)
        sizes = (
            record_bytes(chunk.state_tensors, numel) if chunk.state.tier is Tier.DISK else 0,
            gradient_bytes if chunk.gradient.home.tier is Tier.DISK else 0,
            weights_bytes if weights_are_staged(chunk.weights, chunk.state) else 0,
        )
        stops = np.cumsum(sizes).tolist()
        return [(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
