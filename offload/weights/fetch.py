"""Fetches: weights from their homes to the device, ahead of use; acquire and release.

Owns: which fetch filled each slot, and the publication of every partition's current weights.
Does not: decide what to fetch or reshard (schedule.py), or write new weights (optimizer/).
Threads: `acquire`, `release`, `step` and `reset` on the training thread; the units run on `fetch` and `fetch read`.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Reason
from offload.device.protocol import Mark
from offload.errors import InternalError
from offload.memory.ring import Lease, Ring
from offload.ranks.exchange import ShardExchange
from offload.runtime import Runtime
from offload.storage.homes import Chunk, DiskHome, Home, MemoryHome
from offload.units import Tier
from offload.weights.schedule import Action, Fetch, Schedule
from offload.weights.slots import Slot

SLOTS = "weight slots"

log = logging.getLogger("offload")


@dataclass(frozen=True, slots=True, eq=False)
class Publication:
    """New weights of one partition become readable."""

    whole: "Future[Any]"
    by_chunk: "Sequence[Future[Any]]" = ()
    """The same chunk by chunk, of the trainable ones; empty where they have been readable from the start."""

    def of(self, chunk: Chunk) -> "Future[Any] | None":
        """Of one chunk; None where it is readable."""
        return self.by_chunk[chunk.index] if chunk.trainable and self.by_chunk else None


@dataclass(slots=True, eq=False)
class FetchInFlight:
    """One fetch, from submission to the resharding of its slot."""

    publication: Publication
    """Of the weights that are fetched."""
    issued: "Future[Mark]"
    """Every copy has been submitted: to the mark at which this rank's weights are on the device."""
    complete: "Future[Mark]"
    """To the mark at which those of all ranks are; the same future where there is one rank."""
    last_use: Mark | None = None
    """Set when the parameters become placeholders again."""


@dataclass(frozen=True, slots=True, eq=False)
class _StagedRead:
    """A read from disk that has been submitted."""

    lease: Lease
    arrived: "Future[Any]"
    """The staging buffer holds the chunk."""


@dataclass(frozen=True, slots=True, eq=False)
class _ChunkFromDisk:
    """One chunk on its way from disk through a staging buffer."""

    home: DiskHome
    read: "Future[_StagedRead]"
    copied: "Future[None]"
    """The copy has been submitted, and the staging buffer released."""


class WeightFetcher:
    """Brings weights to the device and frees their slots again."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        slots: Sequence[Slot],
        homes: Sequence[Sequence[Home]],
        schedule: Schedule,
        ring: Ring,
        exchange: ShardExchange | None = None,
    ) -> None:
        self._exchange = exchange
        self._slots = slots
        self._homes = homes
        self.schedule = schedule
        self._device = runtime.device
        self._lanes = runtime.lanes
        self._ledger = runtime.ledger
        self._ring = ring
        self._fetch_lane = runtime.lanes.lane("fetch")
        on_disk = any(isinstance(home, DiskHome) for row in homes for home in row)
        self._read_lane = runtime.lanes.lane("fetch read") if on_disk else self._fetch_lane
        self._current: dict[int, FetchInFlight] = {}
        self.publications = [Publication(runtime.lanes.resolved("weights filled")) for _ in slots]
        """Of the newest weights of every partition."""
        self.last_fetch: dict[int, FetchInFlight] = {}
        self._when_late: Callable[[int], None] = lambda pid: None
        self._warned = False

    # -------------------------------------------------------------------------------------- training thread

    def publish(self, pid: int, whole: "Future[Any]", by_chunk: "Sequence[Future[Any]]") -> None:
        """New weights will be readable: the partition with `whole`, its trainable chunks one by one."""
        self.publications[pid] = Publication(whole, by_chunk)

    def when_late(self, callback: Callable[[int], None]) -> None:
        """Call `callback(pid)` when a use of a partition begins whose weights are not yet published."""
        self._when_late = callback

    def acquire(self, pid: int) -> None:
        """Use begins: the parameters point at their weights. Counted."""
        self._lanes.check()
        first = self.schedule.count(pid) == 0
        if first:
            self._slots[pid].check_placeholders()  # before anything is counted: training may go on after its error
        if first and not self.publications[pid].whole.done():
            self._when_late(pid)
        expected, num_unplanned = self.schedule.expected, self.schedule.unplanned_fetches
        actions = self.schedule.acquire(pid)
        if actions:
            self.carry_out(actions)
        if self.schedule.unplanned_fetches > num_unplanned and not self._warned:
            self._warn_of_new_order(expected, pid)
        if first:
            self._show(pid)

    def release(self, pid: int) -> None:
        """Use ends."""
        last = self.schedule.count(pid) == 1
        if last:
            self._hide(pid)
        actions = self.schedule.release(pid)
        if actions:
            self.carry_out(actions)

    def check_weights(self, pid: int) -> None:
        """Raise ParameterWritten where a use that has just ended changed the weights."""
        self._slots[pid].check_weights()

    def reset(self) -> None:
        """Every use has ended, by an exception."""
        for pid in range(len(self._slots)):
            if self.schedule.count(pid) > 0:
                self._hide(pid)
        self.carry_out(self.schedule.reset())

    def step(self, covered: Collection[int]) -> None:
        """New weights of `covered` have been announced by `publish`: the slots of the old ones are freed."""
        self.carry_out(self.schedule.step(covered))

    def renew(self, pid: int) -> None:
        """As `step`, for one partition that is stepped before the cycle ends."""
        self.carry_out(self.schedule.renew(pid))

    def num_uses(self, pid: int) -> int:
        """How many uses of a partition are under way."""
        return self.schedule.count(pid)

    @property
    def evaluating(self) -> bool:
        """Uses are those of a forward without gradients."""
        return self.schedule.evaluating

    def begin(self, *, evaluating: bool) -> None:
        """A pass begins: a forward without gradients, which has an order of its own, or anything else."""
        self.carry_out(self.schedule.begin(evaluating=evaluating))

    def end_evaluation(self) -> None:
        """A forward without gradients has ended."""
        self.carry_out(self.schedule.end_evaluation())

    def carry_out(self, actions: Iterable[Action]) -> None:
        """Submit the units of these actions, in order."""
        for action in actions:
            if isinstance(action, Fetch):
                self._submit_fetch(action.pid)
            else:
                self._submit_reshard(action.pid)

    def _warn_of_new_order(self, expected: int | None, pid: int) -> None:
        """Once in a session: a loop that goes another way each time would say nothing else."""
        self._warned = True
        known = "nothing more" if expected is None else repr(self._slots[expected].partition.name)
        log.warning(
            "partition %r was used where the recorded order has %s: its weights were not fetched ahead, and this use "
            "waits for them. The order is recorded anew. Such fetches are counted, step by step, as "
            "'unplanned_fetches' in session.metrics(), and not told of again.",
            self._slots[pid].partition.name, known,
        )  # fmt: skip

    def _show(self, pid: int) -> None:
        arrived = self._weights_mark(pid)
        if arrived is not None:
            # Without this the module computes with what the slot held before.
            self._device.compute.after(arrived, Reason.WEIGHTS_ARRIVED)
        self._slots[pid].show()

    def _weights_mark(self, pid: int) -> Mark | None:
        """The mark at which the newest weights are on the device; None where they are."""
        fetch, publication = self._current.get(pid), self.publications[pid]
        if fetch is None:
            # Resident weights are written by the lane `step`: without this the last step's are used.
            resident: Mark | None = self._lanes.wait(publication.whole, Reason.PUBLISHED)
            return resident
        if fetch.publication is not publication:
            name = self._slots[pid].partition.name
            raise InternalError(f"the slot of partition {name!r} holds weights from before a step. Please report it.")
        # The mark does not exist before the copies have been submitted.
        return self._lanes.wait(fetch.complete, Reason.FETCH_ISSUED)

    def _hide(self, pid: int) -> None:
        self._slots[pid].hide()
        fetch = self._current.get(pid)
        if fetch is not None:
            fetch.last_use = self._device.compute.record()

    def _submit_fetch(self, pid: int) -> None:
        """Submit the units of one fetch, in the order in which they run."""
        slot, publication, homes = self._slots[pid], self.publications[pid], self._homes[pid]
        name = slot.partition.name
        in_memory = [home for home in homes if isinstance(home, MemoryHome)]
        staged = [self._submit_read(home, publication, name) for home in homes if isinstance(home, DiskHome)]
        self._fetch_lane.submit(partial(self._begin, slot, in_memory, publication), f"fetch: {name} begins")
        for chunk in staged:
            self._fetch_lane.submit(partial(self._copy_staged, slot, chunk), chunk.copied.name, chunk.copied)
        issued = self._fetch_lane.submit(self._device.h2d.record, f"fetch: {name}")
        complete = issued if self._exchange is None else self._exchange.gather(name, slot.shards, issued)
        self._current[pid] = self.last_fetch[pid] = FetchInFlight(publication, issued, complete)

    def _submit_read(self, home: DiskHome, publication: Publication, name: str) -> _ChunkFromDisk:
        copied: Future[None] = self._lanes.future(f"fetch: {name} chunk {home.chunk.index}")
        work = partial(self._read, home, publication.of(home.chunk), f"weights read: {name}", copied)
        return _ChunkFromDisk(home, self._read_lane.submit(work, f"fetch read: {name}"), copied)

    def _submit_reshard(self, pid: int) -> None:
        slot, fetch = self._slots[pid], self._current.pop(pid)
        slot.leave()
        self._fetch_lane.submit(partial(self._reshard, slot, fetch), f"reshard: {slot.partition.name}")

    # -------------------------------------------------------------------------------------------- the lanes

    def _read(self, home: DiskHome, published: "Future[Any] | None", name: str, copied: "Future[None]") -> _StagedRead:
        # Acquired before the wait for the publication, so that the step can fill the buffer. No cycle: that wait is for
        # a unit submitted before, and the lane `step` acquires no staging buffer of this ring.
        lease = self._ring.acquire(released_by=copied)
        if published is None:
            return _StagedRead(lease, home.read(lease.bytes, name))
        return _StagedRead(lease, home.read_published(lease.bytes, name, published))

    def _begin(self, slot: Slot, homes: Sequence[MemoryHome], publication: Publication) -> None:
        """Give the slot its memory, and copy the chunks that are stored in memory."""
        self._ledger.charge(Tier.DEVICE, SLOTS, slot.num_bytes)
        self._device.h2d.resize(slot.flat, slot.num_bytes)
        for home in homes:
            published = publication.of(home.chunk)
            if published is not None:
                # Without this last step's weights are copied, or half of the new ones.
                self._lanes.wait(published, Reason.PUBLISHED)
            self._copy(slot, home.chunk, home.bytes, crosses_link=home.tier is Tier.HOST)

    def _copy_staged(self, slot: Slot, chunk: _ChunkFromDisk) -> None:
        # The read does not exist before the lane that submits it has acquired a staging buffer.
        read = self._lanes.wait(chunk.read, Reason.READ_ISSUED)
        # Without this the staging buffer holds the weights of another chunk.
        self._lanes.wait(read.arrived, Reason.READ)
        self._copy(slot, chunk.home.chunk, read.lease.bytes, crosses_link=True)
        read.lease.release(self._device.h2d.record().future)

    def _copy(self, slot: Slot, chunk: Chunk, source: Tensor, *, crosses_link: bool) -> None:
        destination = slot.range(chunk.trainable, chunk.start, chunk.stop)
        name = f"weights h2d: {slot.partition.name}"
        self._device.h2d.copy(destination, source[: destination.numel()], name, crosses_link=crosses_link)

    def _reshard(self, slot: Slot, fetch: FetchInFlight) -> None:
        if fetch.complete is not fetch.issued:
            # The mark of the gather does not exist before it has been submitted.
            gathered = self._lanes.wait(fetch.complete, Reason.GATHER_ISSUED)
            # Without this the memory goes to other weights while shards still arrive in it.
            self._device.h2d.after(gathered, Reason.SLOT_GATHERED)
        if fetch.last_use is not None:
            # Without this the memory goes to other weights while a kernel still reads these.
            self._device.h2d.after(fetch.last_use, Reason.SLOT_RELEASED)
        self._device.h2d.resize(slot.flat, 0)
        self._ledger.discharge(Tier.DEVICE, SLOTS, slot.num_bytes)
