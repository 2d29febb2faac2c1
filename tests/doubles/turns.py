"""Lanes whose threads run one at a time, in an order that a policy decides: the same order every time.

Owns: which participant (a lane, or the training thread) runs next; the switch that skips single waits.
Does not: check accesses (clocks.py) or stand in for a device (stream_device.py).

Every lane keeps its thread, but a thread runs only while it has the turn. The turn changes hands where the training
thread submits, where anybody waits, and where a unit ends. So an order of events is a list of names, any order that the
waits allow can be had, and a run that deadlocks says so at once.
"""

import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import offload
from offload.concurrency.futures import Future
from offload.concurrency.lanes import TRAINING_LANE, Lane, Lanes, Reason, Unit, set_current_lane
from offload.concurrency.timeline import Timeline
from offload.errors import InternalError
from tests.doubles.clocks import Clock, Clocks

Policy = Callable[[list[str]], str]
"""Picks who runs next among those who can."""

SOURCES = Path(offload.__file__).parent


class Reached:
    """What a wait that is switched off returns: a point in a stream that nobody has to wait for."""

    future: Future[Any] = Future("a wait that a test has switched off")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked of a value that nobody has waited for")


Reached.future.resolve()


class ClockedFuture(Future[Any]):
    """A future that remembers what the lane that settled it had seen."""

    __slots__ = ("_clock", "_lanes", "_parts")

    def __init__(self, name: str, lanes: "TurnLanes") -> None:
        super().__init__(name)
        self._lanes = lanes
        self._clock: Clock | None = None
        self._parts: Sequence[Future[Any]] = ()

    def stands_for(self, parts: "Sequence[Future[Any]]") -> None:
        """It comes after all of these, not only after the one that settles it."""
        self._parts = parts

    def clocks(self) -> list[Clock | None]:
        """What whoever waits for it comes after."""
        parts = [part for part in self._parts if isinstance(part, ClockedFuture)]
        return [clock for part in parts for clock in part.clocks()] or [self._clock]

    def _settle(self, value: Any, error: BaseException | None) -> None:
        self._clock = self._lanes.snapshot()
        super()._settle(value, error)


def eager(runnable: list[str]) -> str:
    """Units run as soon as they are submitted: nothing is late."""
    others = [name for name in runnable if name != TRAINING_LANE]
    return others[0] if others else TRAINING_LANE


def slow(*lanes: str) -> Policy:
    """These lanes run only when nobody else can; all others as soon as they can."""

    def choose(runnable: list[str]) -> str:
        fast = [name for name in runnable if name.removesuffix(" 2") not in lanes]
        return eager(fast or runnable)

    return choose


def shuffled(seed: int) -> Policy:
    """Any order, the same for the same seed."""
    generator = random.Random(seed)
    return generator.choice


class TurnLanes(Lanes):
    """Makes lanes that take turns. `skipped_sites`: waits, as (file below offload/, line), that do not happen."""

    def __init__(self, policy: Policy, *, clocks: Clocks | None = None, skipped_sites: Iterable[str] = ()) -> None:
        super().__init__(Timeline(), wait_timeout_s=5.0)
        self.skipped_sites = frozenset(skipped_sites)
        self.sites_reached: set[str] = set()
        self.poison = True
        self._policy = policy
        self._clocks = clocks
        self._training = _Participant(TRAINING_LANE)
        self._participants: dict[str, _Participant] = {TRAINING_LANE: self._training}
        self._running = self._training
        self.deadlock = ""

    def future(self, name: str) -> "Future[Any]":
        return ClockedFuture(name, self)

    def all_of(self, futures: "Sequence[Future[Any]]", name: str) -> "Future[Any]":
        joint = super().all_of(futures, name)
        if isinstance(joint, ClockedFuture) and joint not in futures:
            joint.stands_for(futures)
        return joint

    def _make_lane(self, name: str) -> Lane:
        lane = TurnLane(name, self)
        self._participants[name] = lane.participant
        return lane

    # ------------------------------------------------------------------------------------------------ turns

    @property
    def running(self) -> "_Participant":
        """Who has the turn."""
        return self._running

    def switch(self) -> None:
        """Let the policy choose who goes on; returns when the caller has the turn again."""
        me = self._running
        runnable = [name for name, participant in self._participants.items() if participant.can_run()]
        if not runnable:
            self.deadlock = f"nobody can run: {[p.describe() for p in self._participants.values()]}"
            chosen = self._training
        else:
            chosen = self._participants[self._policy(runnable)]
        if chosen is not me:
            self._running = chosen
            chosen.turn.release()
            me.turn.acquire()
        if self.deadlock and me is self._training:
            raise InternalError(self.deadlock)

    def run_out(self, participant: "_Participant") -> None:
        """Let the others run until this one has nothing left to do."""
        self._running.waits_for = _Idle(participant)
        while not participant.idle():
            self.switch()
        self._running.waits_for = None

    def _block(self, future: "Future[Any]", reason: Reason) -> None:
        me = self._running
        me.waits_for = future
        try:
            while not future.done():
                self.check()
                self.switch()
        finally:
            me.waits_for = None

    def wait(self, future: "Future[Any]", reason: Reason) -> Any:
        if self.skips():
            return Reached()
        try:
            return super().wait(future, reason)
        finally:
            self.joined(future)

    def skips(self) -> bool:
        """The wait in the calling line of offload/ has been switched off."""
        site = calling_site()
        self.sites_reached.add(site)
        return site in self.skipped_sites

    # --------------------------------------------------------------------------------------------- checking

    def snapshot(self) -> Clock | None:
        """What the running lane has seen."""
        return self._clocks.snapshot(self._running.name) if self._clocks else None

    def begin_unit(self, seen: Any) -> None:
        """A unit begins: its lane has seen what its submitter had."""
        if self._clocks:
            self._clocks.join(self._running.name, seen)

    def joined(self, future: "Future[Any]") -> None:
        """The running lane has waited for `future`: it comes after everything that `future` came after."""
        if self._clocks and isinstance(future, ClockedFuture):
            for clock in future.clocks():
                self._clocks.join(self._running.name, clock)

    def declare(self, *, reads: Sequence[Any] = (), writes: Sequence[Any] = (), reclaims: Sequence[Any] = ()) -> None:
        for place in reads if self._clocks else ():
            self._clocks.access(self._running.name, place, is_write=False)
        for place in (*writes, *reclaims) if self._clocks else ():
            self._clocks.access(self._running.name, place, is_write=True)
        for memory in reclaims if self.poison else ():
            memory.fill_(0xFF)  # NaN in every dtype

    def close(self) -> None:
        self._clocks = None  # what happens from here on is the end of everything
        super().close()


class _Participant:
    """The training thread or a lane's."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.turn = threading.Semaphore(0)
        self.units: deque[tuple[Unit | Callable[[], Unit], Any]] | None = None
        self.busy = name == TRAINING_LANE
        self.waits_for: Future[Any] | _Idle | None = None

    def idle(self) -> bool:
        return not self.units and not self.busy

    def can_run(self) -> bool:
        if self.waits_for is not None:
            return self.waits_for.done()
        return self.busy or bool(self.units)

    def describe(self) -> str:
        waits = f"waits for {self.waits_for.name!r}" if self.waits_for else "runs" if self.busy else "idle"
        return f"{self.name} {waits}, {len(self.units or ())} units"


class _Idle:
    """What the training thread waits for when it closes a lane."""

    def __init__(self, participant: _Participant) -> None:
        self.name = f"{participant.name} idle"
        self.done = participant.idle


class TurnLane:
    """A lane with a thread that runs only in its turn."""

    def __init__(self, name: str, lanes: TurnLanes) -> None:
        self.name = name
        self.num_submitted = 0
        self._lanes = lanes
        self.participant = _Participant(name)
        self._units: deque[tuple[Unit | Callable[[], Unit], Any]] = deque()
        self.participant.units = self._units
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"offload-{name}", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Any], name: str, future: "Future[Any] | None" = None) -> "Future[Any]":
        future = future if future is not None else self._lanes.future(name)
        self._append((work, future))
        return future

    def submit_turn(self, take: Callable[[], Unit]) -> None:
        self._append(take)

    def _append(self, unit: Unit | Callable[[], Unit]) -> None:
        self.num_submitted += 1
        self._units.append((unit, self._lanes.snapshot()))
        if self._lanes.running.name == TRAINING_LANE:  # a lane may hold a lock here
            self._lanes.switch()

    def describe(self) -> list[str]:
        return [self.participant.describe()] if self.participant.can_run() else []

    def close(self) -> None:
        self._lanes.run_out(self.participant)
        self._closing = True
        self.participant.turn.release()
        self._thread.join()

    def _run(self) -> None:
        self.participant.turn.acquire()
        set_current_lane(self.name)
        while not self._closing:
            self.participant.busy = True
            unit, seen = self._units.popleft()
            self._lanes.begin_unit(seen)
            work, future = unit if isinstance(unit, tuple) else unit()
            self._lanes.run_unit(work, future)
            self.participant.busy = False
            del unit, work, future, seen
            self._lanes.switch()


def calling_site() -> str:
    """`file:line` of the innermost frame in offload/ that is not offload/lanes.py."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(SOURCES) and path.name != "lanes.py":
            return f"{path.relative_to(SOURCES)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"
