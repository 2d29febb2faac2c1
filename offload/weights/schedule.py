"""Which partitions' weights are on the device: what to fetch, keep and reshard.

Owns: the state of every partition's slot, the recorded order of use, the prediction made from it.
Does not: copy, wait or allocate (fetch.py carries out the actions), size the slot ring (planning/plan.py).
Threads: the training thread alone. Pure: a function of the calls so far, never of timing, so that ranks decide alike.

Note [Evaluation]: a forward without gradients has an order of its own, from one outermost call to the next, so that
evaluation between, before or within training passes neither costs nor changes what training does next.

Note [Cycle]: training visits the same partitions in the same cycle. What was acquired between the two latest calls of
`step` is the prediction for what comes until the next one. Nothing beyond its end is fetched before `step` is called:
a fetch waits for the publication of its weights, and a step not yet submitted must not be waited for (Note [Waiting]
in concurrency/lanes.py). A wrong prediction costs transfers, never correctness: an acquire may reshard whatever is not
acquired, so it succeeds whenever the acquired partitions fit the ring.
"""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from offload.errors import BudgetError, IllegalMove, InternalError
from offload.units import format_bytes
from offload.weights.cycle import Pass

MAX_RECORDED: Final = 65_536
"""Longest cycle that is recorded, in acquisitions: 300 training rounds over 100 blocks, or 600 generated tokens. The
indices of a longer one would cost more host time at each `step` than its prefetches save."""

HISTORY_LENGTH: Final = 12
"""Moves of a partition that are kept for the message of IllegalMove: about two rounds of forward and backward."""


class SlotState(StrEnum):
    """Where a partition's weights are, as the training thread sees it."""

    ABSENT = "absent"
    PREFETCHED = "prefetched"
    ACQUIRED = "acquired"
    KEPT = "kept"
    RESIDENT = "resident"


LEGAL: Final[Mapping[SlotState, frozenset[SlotState]]] = {
    SlotState.ABSENT: frozenset({SlotState.PREFETCHED, SlotState.ACQUIRED}),
    SlotState.PREFETCHED: frozenset({SlotState.ACQUIRED, SlotState.ABSENT}),
    SlotState.ACQUIRED: frozenset({SlotState.KEPT}),
    SlotState.KEPT: frozenset({SlotState.ACQUIRED, SlotState.ABSENT}),
    SlotState.RESIDENT: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring the weights of `pid` to the device. `planned`: the prediction named it."""

    pid: int
    planned: bool


@dataclass(frozen=True, slots=True)
class Reshard:
    """Free the slot of `pid`; nothing uses it."""

    pid: int


Action = Fetch | Reshard


class _Entry:
    """What is known of one partition."""

    __slots__ = ("count", "history", "num_bytes", "pid", "stale", "state")

    def __init__(self, pid: int, num_bytes: int, state: SlotState) -> None:
        self.pid = pid
        self.num_bytes = num_bytes
        self.state = state
        self.count = 0
        self.stale = False  # acquired while a step gave it new weights: the slot must not outlive this use
        self.history: deque[tuple[SlotState, SlotState, str]] = deque(maxlen=HISTORY_LENGTH)


class Schedule:
    """Decides which partitions' weights are on the device; returns what to do, in order.

    `slot_bytes`: bytes of each partition's slot. `capacity_bytes`: the slot ring. `resident`: partitions whose
    weights are resident. `keep_bytes_free`: what prefetching leaves free for acquires it does not foresee.
    """

    def __init__(
        self,
        slot_bytes: Mapping[int, int],
        capacity_bytes: int,
        resident: Collection[int],
        keep_bytes_free: int = 0,
    ) -> None:
        residents = frozenset(resident)
        self._entries = {
            pid: _Entry(pid, slot_bytes.get(pid, 0), SlotState.RESIDENT if pid in residents else SlotState.ABSENT)
            for pid in sorted(residents.union(slot_bytes))
        }
        self._capacity_bytes = capacity_bytes
        self._prefetch_bytes = capacity_bytes - keep_bytes_free
        self._held_bytes = 0
        self._acquired_bytes = 0
        self._kept: set[int] = set()
        self._prefetched: set[int] = set()
        self._training = Pass()
        self._evaluation = Pass()
        self._now = self._training
        self._first_used: dict[int, None] = {}
        self._first_uses: tuple[int, ...] = ()
        self.unplanned_fetches = 0
        """Fetches that an acquire had to make for a partition other than the predicted one."""
        self.late_fetches = 0
        """Fetches that an acquire had to make for the predicted partition: there was no room before."""
        self.unrecorded_acquires = 0
        """Acquires beyond MAX_RECORDED in one cycle; the prediction ends before them."""

    # ------------------------------------------------------------------------------------------- what is known

    @property
    def held_bytes(self) -> int:
        """Slot bytes in use now; never more than the capacity."""
        return self._held_bytes

    @property
    def order(self) -> tuple[int, ...]:
        """The predicted cycle: every first acquire of a partition that is not resident, in order."""
        return self._now.cycle.order

    def first_uses(self) -> list[int]:
        """Forward order: all partitions used, by their first acquire in the prediction, else in this cycle so far."""
        return list(self._first_uses or self._first_used)

    @property
    def expected(self) -> int | None:
        """The partition that should be acquired next, of those not resident; None: none is predicted."""
        return self._now.cycle.predicted()

    @property
    def evaluating(self) -> bool:
        """Uses are those of a forward without gradients."""
        return self._now is self._evaluation

    def state(self, pid: int) -> SlotState:
        """Where the weights of `pid` are."""
        return self._entries[pid].state

    def count(self, pid: int) -> int:
        """How many uses of `pid` are under way."""
        return self._entries[pid].count

    # ---------------------------------------------------------------------------------------------- decisions

    def acquire(self, pid: int) -> list[Action]:
        """A use of `pid` begins. Raises BudgetError, and changes nothing, where the acquired ones exceed the ring."""
        entry = self._entries[pid]
        if entry.count:
            entry.count += 1
            return []
        if entry.state is SlotState.RESIDENT:
            entry.count = 1
            if self._now is self._training:
                self._first_used.setdefault(pid)
            return []
        if self._acquired_bytes + entry.num_bytes > self._capacity_bytes:
            raise self._too_small(entry)
        expected = self.expected == pid
        self._record(pid, expected)
        actions: list[Action] = []
        if entry.state is SlotState.ABSENT:
            self._make_room(entry.num_bytes, actions)
            actions.append(Fetch(pid, planned=expected))
            self._count_fetch(expected)
            self._held_bytes += entry.num_bytes
        self._move(entry, SlotState.ACQUIRED, "acquire")
        entry.count = 1
        self._acquired_bytes += entry.num_bytes
        self._prefetch(actions)
        return actions

    def release(self, pid: int) -> list[Action]:
        """A use of `pid` ends; its slot is kept until somebody needs the bytes. Raises IllegalMove if there is none."""
        entry = self._entries[pid]
        if entry.count > 1 or (entry.count and entry.state is SlotState.RESIDENT):
            entry.count -= 1
            return []
        if not entry.count:
            raise self._illegal(entry, "released more often than acquired")
        actions: list[Action] = []
        self._end_use(entry, "release", actions)
        self._prefetch(actions)
        return actions

    def step(self, covered: Collection[int]) -> list[Action]:
        """The cycle ends with a step that gives `covered` new weights: drop the old ones, predict, fetch ahead.

        Slots acquired meanwhile (a step inside a forward) keep the old weights until their use ends. An empty
        `covered` just ends a cycle, as of a forward pass that no step will follow.
        """
        actions: list[Action] = []
        for pid in sorted(covered):
            self._drop(self._entries[pid], actions)
        self._training.restart()
        self._now = self._training
        if self._first_used:
            self._first_uses = tuple(self._first_used)
            self._first_used = {}
        self._prefetch(actions)
        return actions

    def renew(self, pid: int) -> list[Action]:
        """A step gives `pid` new weights before the cycle ends: drop the old ones."""
        actions: list[Action] = []
        self._drop(self._entries[pid], actions)
        self._prefetch(actions)
        return actions

    def _drop(self, entry: _Entry, actions: list[Action]) -> None:
        if entry.state is SlotState.ACQUIRED:
            entry.stale = True
        elif entry.state in (SlotState.KEPT, SlotState.PREFETCHED):
            self._reshard(entry.pid, "step", actions)

    def begin(self, *, evaluating: bool) -> list[Action]:
        """A pass begins: a forward without gradients, or anything else. See Note [Evaluation]."""
        if evaluating or self._now is self._evaluation:
            self._evaluation.restart()
        return self._turn_to(self._evaluation if evaluating else self._training)

    def end_evaluation(self) -> list[Action]:
        """A forward without gradients has ended: training goes on, or where nothing trains the next one is expected."""
        self._evaluation.restart()
        trains = self._training.cycle.order or self._training.recorded
        return self._turn_to(self._training if trains else self._evaluation)

    def _turn_to(self, kind: Pass) -> list[Action]:
        actions: list[Action] = []
        self._now = kind
        kind.walked = kind.cycle.cursor  # the other kind may have taken what this one had on the device
        self._prefetch(actions)
        return actions

    def reset(self) -> list[Action]:
        """Forward or backward raised: all uses end. The cursor stays; the next acquire finds its place again."""
        actions: list[Action] = []
        for entry in self._entries.values():
            if entry.state is SlotState.ACQUIRED:
                self._end_use(entry, "reset", actions)
            entry.count = 0
        return actions

    # ------------------------------------------------------------------------------------------ prediction

    def _record(self, pid: int, expected: bool) -> None:
        if self._now is self._training:
            self._first_used.setdefault(pid)
        if len(self._now.recorded) < MAX_RECORDED:
            self._now.recorded.append(pid)
        else:
            self.unrecorded_acquires += 1
        if expected:
            self._now.cycle.cursor += 1
        elif self._now.cycle.order:
            position = self._now.cycle.find(self._now.previous, pid)
            self._now.cycle.cursor = self._now.walked = len(self._now.cycle.order) if position is None else position + 1
        self._now.previous = pid

    def _count_fetch(self, expected: bool) -> None:
        if expected:
            self.late_fetches += 1
        elif self._now.cycle.order:
            self.unplanned_fetches += 1

    def _prefetch(self, actions: list[Action]) -> None:
        """Fetch what the cycle needs next while bytes are free, or are kept for something needed later."""
        order = self._now.cycle.order
        position = max(self._now.walked, self._now.cycle.cursor)
        while position < len(order):
            entry = self._entries[order[position]]
            if entry.state is SlotState.ABSENT:
                if not self._make_room_for(position, entry.num_bytes, actions):
                    break
                actions.append(Fetch(entry.pid, planned=True))
                self._held_bytes += entry.num_bytes
                self._move(entry, SlotState.PREFETCHED, "prefetch")
            position += 1
        self._now.walked = position

    # ------------------------------------------------------------------------------------------------ room

    def _make_room(self, num_bytes: int, actions: list[Action]) -> None:
        """For an acquire: reshard what is needed last, kept or prefetched."""
        while self._held_bytes + num_bytes > self._capacity_bytes:
            self._reshard(self._needed_last(self._kept | self._prefetched)[0], "acquire needs room", actions)

    def _make_room_for(self, position: int, num_bytes: int, actions: list[Action]) -> bool:
        """For a prefetch: reshard only what is kept and needed after `position`; nothing where that is not enough."""
        missing_bytes = self._held_bytes + num_bytes - self._prefetch_bytes
        victims = []
        if missing_bytes > 0:
            for pid in self._needed_last(self._kept):
                if missing_bytes <= 0 or self._now.cycle.next_use(pid) <= position:
                    break
                victims.append(pid)
                missing_bytes -= self._entries[pid].num_bytes
        if missing_bytes > 0:
            return False
        for pid in victims:
            self._reshard(pid, "prefetch needs room", actions)
        return True

    def _needed_last(self, pids: set[int]) -> list[int]:
        """Farthest next use first; of two equally far (or unknown) the greater id. Few: the ring holds some slots."""
        return sorted(pids, key=lambda pid: (self._now.cycle.next_use(pid), pid), reverse=True)

    def _reshard(self, pid: int, why: str, actions: list[Action]) -> None:
        entry = self._entries[pid]
        self._move(entry, SlotState.ABSENT, why)
        self._held_bytes -= entry.num_bytes
        self._now.walked = min(self._now.walked, self._now.cycle.next_use(pid))
        actions.append(Reshard(pid))

    def _end_use(self, entry: _Entry, why: str, actions: list[Action]) -> None:
        self._move(entry, SlotState.KEPT, why)
        entry.count = 0
        self._acquired_bytes -= entry.num_bytes
        if entry.stale:
            entry.stale = False
            self._reshard(entry.pid, "a step gave it new weights", actions)

    def _move(self, entry: _Entry, new: SlotState, why: str) -> None:
        old = entry.state
        if new not in LEGAL[old]:
            raise self._illegal(entry, f"{why}: cannot become {new}")
        self._kept.discard(entry.pid)
        self._prefetched.discard(entry.pid)
        entry.history.append((old, new, why))
        entry.state = new
        if new is SlotState.KEPT:
            self._kept.add(entry.pid)
        elif new is SlotState.PREFETCHED:
            self._prefetched.add(entry.pid)

    # ---------------------------------------------------------------------------------------------- errors

    def _illegal(self, entry: _Entry, what: str) -> IllegalMove:
        moves = "\n  ".join(f"{old} -> {new} ({why})" for old, new, why in entry.history) or "never moved"
        return IllegalMove(
            f"partition {entry.pid} is {entry.state} with {entry.count} uses: {what}. Please report it. "
            f"Its latest moves, oldest first:\n  {moves}"
        )

    def _too_small(self, wanted: _Entry) -> BudgetError:
        acquired = [entry for entry in self._entries.values() if entry.state is SlotState.ACQUIRED]
        names = ", ".join(f"{entry.pid} ({entry.num_bytes} bytes)" for entry in acquired) or "none"
        needed_bytes = self._acquired_bytes + wanted.num_bytes
        return BudgetError(
            f"partition {wanted.pid} needs a slot of {wanted.num_bytes} bytes while these are in use: {names}. The "
            f"slot ring has {self._capacity_bytes} bytes ({format_bytes(self._capacity_bytes)}); the smallest that "
            f"would do has {needed_bytes} ({format_bytes(needed_bytes)}). Raise device_memory, or make partitions "
            "smaller."
        )

    def validate(self) -> None:
        """Check every invariant; raises InternalError with what is broken."""
        entries = self._entries.values()
        acquired = {e.pid: e.num_bytes for e in entries if e.state is SlotState.ACQUIRED}
        kept = {e.pid: e.num_bytes for e in entries if e.state is SlotState.KEPT}
        prefetched = {e.pid: e.num_bytes for e in entries if e.state is SlotState.PREFETCHED}
        order, cursor = self._now.cycle.order, self._now.cycle.cursor
        walked_absent = [p for p in order[cursor : self._now.walked] if self._entries[p].state is SlotState.ABSENT]
        counted = {e.pid for e in entries if e.count and e.state is not SlotState.RESIDENT}
        laws = {
            "held bytes": self._held_bytes == sum((*acquired.values(), *kept.values(), *prefetched.values())),
            "capacity": self._held_bytes <= self._capacity_bytes,
            "acquired bytes": self._acquired_bytes == sum(acquired.values()),
            "counts": counted == acquired.keys() and min((e.count for e in entries), default=0) >= 0,
            "stale": all(e.state is SlotState.ACQUIRED for e in entries if e.stale),
            "cursor": 0 <= cursor <= len(order),
            "walked": not walked_absent,
            "recorded": len(self._now.recorded) <= MAX_RECORDED,
            "kept": self._kept == kept.keys(),
            "prefetched": self._prefetched == prefetched.keys(),
        }
        broken = [name for name, holds in laws.items() if not holds]
        if broken:
            states = [(e.pid, str(e.state), e.count) for e in entries]
            raise InternalError(f"the schedule broke its laws {broken}; (partition, state, uses): {states}.")
