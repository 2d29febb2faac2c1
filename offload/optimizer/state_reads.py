"""What a step reads from disk: a slab for every piece that needs one, and its reads, in the order of the steps.

Owns: the step ring while the pipeline runs, what of the next step is read ahead, where its parts lie in a slab.
Does not: decide the order of pieces (jobs.py), step them or write them behind (pipeline.py).
Threads: `ahead`, `take` and `drop` on the training thread (or autograd's); the units run on the lane `step read`.

Note [Read ahead]: while a backward runs, the step ring has nothing to do. So when one begins, the state of the first
pieces of the step to come is read, of as many as there are slabs. `step()` takes over what it begins with; the rest,
and all of it where something else needs the ring, is dropped by a unit of the same lane. Nobody else leases from the
ring before that: a lease that was taken ahead is given back by a unit that is not yet submitted, and nothing may wait
for it. There are no more of these leases than slabs, so none of them waits for another.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from offload.config import Precision
from offload.disk.io_queue import TransferQueue
from offload.homes import Home
from offload.lanes import Lane, Lanes, Promise, Reason
from offload.memory.ring import SlabRing
from offload.optimizer.jobs import Passage, StatePiece, weights_pass_slab
from offload.optimizer.planes import is_split, record_bytes
from offload.units import DISK_ALIGN_BYTES, Tier, round_up

DROPPED = "pieces read ahead in vain"
"""Counter of the timeline."""


class StateReads:
    """Of one pipeline."""

    def __init__(
        self,
        *,
        precision: Precision,
        gradient_home: Precision,
        lanes: Lanes,
        lane: Lane | None,
        ring: SlabRing,
        queue: TransferQueue | None,
    ) -> None:
        self._precision = precision
        self._gradient_home = gradient_home
        self._lanes = lanes
        self.lane = lane
        self._ring = ring
        self._queue = queue
        self._ahead: list[Passage] = []
        self._last_drop: Promise[Any] = lanes.kept("nothing dropped")

    # -------------------------------------------------------------------------------------- training thread

    @property
    def may_read_ahead(self) -> bool:
        """Something can be read ahead, and nothing is."""
        return self.lane is not None and not self._ahead

    def ahead(self, pieces: Iterable[StatePiece]) -> None:
        """Read the first of `pieces`, which the next step is expected to step in this order. See Note [Read ahead]."""
        assert self.lane is not None
        for piece in islice((piece for piece in pieces if piece.needs_slab), self._ring.num_slabs):
            passage = self._passage(piece)
            passage.ahead = True
            self.lane.submit(partial(self._read_state, passage), passage.issued.name, passage.issued)
            self._ahead.append(passage)

    def take(self, pieces: Sequence[StatePiece], all_landed: "Promise[Any]") -> list[Passage]:
        """The passages of `pieces`, all of which need a slab: first those that were read ahead, while they match.

        The others have yet to be read, by `read`; so have the gradients of the first where they are at home on disk.
        """
        ahead, self._ahead = self._ahead, []
        passages: list[Passage] = []
        for piece in pieces:
            position = next((i for i, passage in enumerate(ahead) if passage.piece is piece), None)
            if position is None:
                break
            self._drop(ahead[:position])
            passages.append(ahead[position])
            del ahead[: position + 1]
        self._drop(ahead)
        for passage in passages:
            if passage.needs_gradient:
                passage.issued = self._lanes.promise(f"read gradient of {passage.done.name}")
        passages += [self._passage(piece) for piece in pieces[len(passages) :]]
        for passage in passages:
            passage.all_landed = all_landed
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
            self._last_drop = self.lane.submit(partial(self._give_back, passage), passage.done.name, passage.done)
            self._lanes.timeline.count(DROPPED)

    def _passage(self, piece: StatePiece) -> Passage:
        done = self._lanes.promise(f"step {piece.gradient.piece.partition_id} piece {piece.gradient.piece.index}")
        return Passage(piece, done, self._lanes.promise(f"read {done.name}"), piece.stepped)

    # --------------------------------------------------------------------------------------------- the lane

    def read(self, passage: Passage) -> None:
        """All that a step reads, or what was not read ahead."""
        gradient = passage.piece.gradient.home
        if passage.needs_gradient and passage.all_landed is not None:
            # Without this the gradient's record is read before it has been written.
            self._lanes.wait(passage.all_landed, Reason.LANDED)
            if gradient.written is not None:
                # Without this the read overtakes the write of the gradient.
                self._lanes.wait(gradient.written, Reason.EXTENT_WRITTEN)
        if not passage.ahead:
            self._read_state(passage)
        if passage.needs_gradient:
            self._read(passage, gradient, self.parts(passage.piece)[1])

    def _read_state(self, passage: Passage) -> None:
        """Take a slab, and read into it all that does not depend on the gradient."""
        piece = passage.piece
        if passage.stepped_before is not None:
            # Without this the state is read again before the step before has written it.
            self._lanes.wait(passage.stepped_before, Reason.STEP_DONE)
        state, _, weights = self.parts(piece)
        needed = [(piece.state, state)]
        if is_split(piece.planes):
            needed.append((piece.weights, weights))  # else a step only writes them
        for home, _ in needed:
            if home.written is not None:
                # Without this the read overtakes the last write of the same extent.
                self._lanes.wait(home.written, Reason.EXTENT_WRITTEN)
        passage.lease = self._ring.lease(returned_by=passage.done)
        for home, part in needed if not passage.dropped else ():
            self._read(passage, home, part)

    def _read(self, passage: Passage, home: Home, part: tuple[int, int]) -> None:
        if home.extent is not None and self._queue is not None:
            assert passage.lease is not None
            place = passage.lease.bytes[slice(*part)]
            passage.reads.append(self._queue.read(home.stored, place[: home.stored.num_bytes], passage.done.name))
            if home.zeros_from is not None:
                self._lanes.declare(writes=[place[home.zeros_from :]])
                place[home.zeros_from :].zero_()

    def _give_back(self, passage: Passage) -> None:
        for read in passage.reads:
            # Without this the read ends in a slab that is another's, or beside a write of the same extent.
            self._lanes.wait(read, Reason.STATE_READ)
        assert passage.lease is not None
        passage.lease.give_back()

    # ------------------------------------------------------------------------------------------------- slabs

    def parts(self, piece: StatePiece) -> list[tuple[int, int]]:
        """Where state record, gradient and new weights lie in a slab; empty where they are addressable at home."""
        numel = piece.gradient.piece.numel
        gradient_bytes = round_up(numel * self._gradient_home.dtype.itemsize, DISK_ALIGN_BYTES)
        weights_bytes = round_up(numel * self._precision.dtype.itemsize, DISK_ALIGN_BYTES)
        sizes = (
            record_bytes(piece.planes, numel) if piece.state.tier is Tier.DISK else 0,
            gradient_bytes if piece.gradient.home.tier is Tier.DISK else 0,
            weights_bytes if weights_pass_slab(piece.weights, piece.state) else 0,
        )
        stops = np.cumsum(sizes).tolist()
        return [(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
