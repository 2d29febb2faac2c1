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


@dataclass(slots=True, eq=False)
class FetchInFlight:
    """One fetch, from submission to the resharding of its slot."""

    partition_id: int
    issued: "Future[Any]"
    """All copies have been handed to the link."""
    publication: "Future[Any]"
    """Of the weights that are fetched."""
    arrived: Mark | None = None
    """What is at home has been copied to the device; set before `issued` resolves."""
    gathered: "Future[Mark] | None" = None
    """With ranks: the others' shards are there, too, at this mark."""
    released: Mark | None = None
    """The last use on the device; set at release."""


@dataclass(slots=True, eq=False)
class _Arriving:
    """One chunk on its way from disk through a staging buffer."""

    home: DiskHome
    submitted: "Future[Any] | None" = None
    lease: Lease | None = None
    """Lease and read are set before `submitted` resolves."""
    read: "Future[Any] | None" = None


class WeightFetcher:
    """Brings weights to the device and takes them away again."""

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
        self._read_lane = None
        if any(isinstance(home, DiskHome) for row in homes for home in row):
            self._read_lane = runtime.lanes.lane("fetch read")
        self._current: dict[int, FetchInFlight] = {}
        self.published: list[Future[Any]] = [runtime.lanes.resolved("weights filled") for _ in slots]
        """Of the newest weights of every partition, whole; see `publish`."""
        self._by_chunk: list[Sequence[Future[Any]]] = [() for _ in slots]
        """The same chunk by chunk, of the trainable ones; empty where nothing is under way."""
        self.last_fetch: dict[int, FetchInFlight] = {}
        self._when_late: Callable[[int], None] = lambda pid: None
        self._warned = False

    # -------------------------------------------------------------------------------------- training thread

    def publish(self, pid: int, whole: "Future[Any]", by_chunk: "Sequence[Future[Any]]") -> None:
        """New weights are on their way: the partition is there with `whole`, its trainable chunks one by one."""
        self.published[pid] = whole
        self._by_chunk[pid] = by_chunk

    def when_late(self, callback: Callable[[int], None]) -> None:
        """Call `callback(pid)` when a use of a partition begins whose weights are not yet published."""
        self._when_late = callback

    def acquire(self, pid: int) -> None:
        """Use begins: the parameters point at their weights. Counted."""
        self._lanes.check()
        first = self.schedule.count(pid) == 0
        if first:
            self._slots[pid].check_placeholders()  # before anything is counted: training may go on after its error
        if first and not self.published[pid].done():
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
        """New weights of `covered` are on their way: `published` holds their futures. Old slots go."""
        self.carry_out(self.schedule.step(covered))

    def renew(self, pid: int) -> None:
        """New weights of one partition are on their way, before the step that ends the cycle: its slot goes."""
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
        slot = self._slots[pid]
        fetch = self._current.get(pid)
        if fetch is not None:
            if fetch.publication is not self.published[pid]:
                raise InternalError(f"the slot of partition {pid} holds weights from before a step. Please report it.")
            # The event that `arrived` names does not exist before the copies have been issued.
            self._lanes.wait(fetch.issued, Reason.FETCH_ISSUED)
            arrived = fetch.arrived
            if fetch.gathered is not None:
                # Nor does the event of the gather.
                arrived = self._lanes.wait(fetch.gathered, Reason.GATHER_ISSUED)
        else:  # at home on the device: the step lane writes it there
            arrived = self._lanes.wait(self.published[pid], Reason.PUBLISHED)
        if arrived is not None:
            # Without this the module computes with what the slot held before.
            self._device.compute.after(arrived, Reason.WEIGHTS_ARRIVED)
        slot.show()

    def _hide(self, pid: int) -> None:
        self._slots[pid].hide()
        fetch = self._current.get(pid)
        if fetch is not None:
            fetch.released = self._device.compute.record()

    def _submit_fetch(self, pid: int) -> None:
        fetch = FetchInFlight(pid, self._lanes.future(f"fetch {pid}"), self.published[pid])
        self._current[pid] = self.last_fetch[pid] = fetch
        from_memory = [(h, self._publication(h.chunk)) for h in self._homes[pid] if isinstance(h, MemoryHome)]
        arriving = [_Arriving(home) for home in self._homes[pid] if isinstance(home, DiskHome)]
        copied = [self._lanes.future(f"fetch {pid} chunk {a.home.chunk.index}") for a in arriving]
        if arriving and self._read_lane is not None:
            for one, done in zip(arriving, copied, strict=True):
                work = partial(self._read, one, done, self._publication(one.home.chunk))
                one.submitted = self._read_lane.submit(work, f"fetch read {pid}")
        self._fetch_lane.submit(partial(self._begin, pid, from_memory), f"fetch {pid} begin")
        for one, done in zip(arriving, copied, strict=True):
            self._fetch_lane.submit(partial(self._pass_on, pid, one), done.name, done)
        self._fetch_lane.submit(partial(self._end, fetch), fetch.issued.name, fetch.issued)
        if self._exchange is not None:
            slot = self._slots[pid]
            fetch.gathered = self._exchange.gather(slot.partition.name, slot.shards, fetch.issued)

    def _publication(self, chunk: Chunk) -> "Future[Any] | None":
        """Of one chunk's newest weights; None where they are there."""
        by_chunk = self._by_chunk[chunk.partition_id]
        return by_chunk[chunk.index] if chunk.trainable and by_chunk else None

    def _submit_reshard(self, pid: int) -> None:
        fetch = self._current.pop(pid)
        self._fetch_lane.submit(partial(self._reshard, pid, fetch), f"reshard {pid}")

    # -------------------------------------------------------------------------------------------- the lanes

    def _read(self, one: _Arriving, copied: "Future[Any]", published: "Future[Any] | None") -> None:
        # Leased before the publication, so that the step can fill it. No cycle: that wait is for a unit submitted
        # before, and the step lane takes no staging buffer of this ring.
        one.lease = self._ring.acquire(released_by=copied)
        if published is None:
            one.read = one.home.read(one.lease.bytes, copied.name)
        else:
            one.read = one.home.read_published(one.lease.bytes, copied.name, published)

    def _begin(self, pid: int, from_memory: "Sequence[tuple[MemoryHome, Future[Any] | None]]") -> None:
        slot = self._slots[pid]
        self._ledger.charge(Tier.DEVICE, SLOTS, slot.num_bytes)
        self._device.h2d.resize(slot.flat, slot.num_bytes)
        for home, published in from_memory:
            if published is not None:
                # Without this last step's weights are copied, or half of the new ones.
                self._lanes.wait(published, Reason.PUBLISHED)
            destination = slot.range(home.chunk.trainable, home.chunk.start, home.chunk.stop)
            from_host = home.tier is Tier.HOST
            source = home.bytes[: destination.numel()]
            self._device.h2d.copy(destination, source, f"weights {pid}", crosses_link=from_host)

    def _pass_on(self, pid: int, one: _Arriving) -> None:
        assert one.submitted is not None
        # The read does not exist before the lane that submits it has found a staging buffer.
        self._lanes.wait(one.submitted, Reason.READ_ISSUED)
        assert one.lease is not None
        assert one.read is not None
        # Without this the staging buffer holds the weights of another chunk.
        self._lanes.wait(one.read, Reason.READ)
        destination = self._slots[pid].range(one.home.chunk.trainable, one.home.chunk.start, one.home.chunk.stop)
        self._device.h2d.copy(destination, one.lease.bytes[: destination.numel()], f"weights {pid}")
        one.lease.release(self._device.h2d.record().future)

    def _end(self, fetch: FetchInFlight) -> Mark:
        fetch.arrived = self._device.h2d.record()
        return fetch.arrived

    def _reshard(self, pid: int, fetch: FetchInFlight) -> None:
        slot = self._slots[pid]
        if fetch.gathered is not None:
            # The event of the gather does not exist before it has been issued.
            gathered = self._lanes.wait(fetch.gathered, Reason.GATHER_ISSUED)
            if gathered is not None:
                # Without this the memory goes to other weights while shards still arrive in it.
                self._device.h2d.after(gathered, Reason.SLOT_GATHERED)
        if fetch.released is not None:
            # Without this the memory is given to other weights while a kernel still reads these.
            self._device.h2d.after(fetch.released, Reason.SLOT_RELEASED)
        self._device.h2d.resize(slot.flat, 0)
        self._ledger.discharge(Tier.DEVICE, SLOTS, slot.num_bytes)
