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
from offload.concurrency.lanes import TRAINING_LANE, Lane, Lanes, Reason, set_current_lane
from offload.concurrency.timeline import Timeline
from offload.errors import InternalError
from tests.doubles.clocks import Clocks

Policy = Callable[[list[str]], str]
"""Picks who runs next among those who can."""

SOURCES = Path(offload.__file__).parent
NO_VALUE = Future("a wait that a test has switched off")
NO_VALUE.resolve()


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
        if self.skips(reason):
            return None
        return super().wait(future, reason)

    def skips(self, reason: Reason) -> bool:
        """The wait in the calling line of offload/ has been switched off."""
        site = calling_site()
        self.sites_reached.add(site)
        return reason in self.skipped_waits or site in self.skipped_sites

    # --------------------------------------------------------------------------------------------- checking

    def snapshot(self) -> Any:
        """What the running lane has seen."""
        return self._clocks.snapshot(self._running.name) if self._clocks else None

    def begin_unit(self, seen: Any) -> None:
        """A unit begins: its lane has seen what its submitter had."""
        if self._clocks:
            self._clocks.join(self._running.name, seen)

    def stamp(self, future: "Future[Any]", after: "Sequence[Future[Any]] | None" = None) -> None:
        if self._clocks:
            if after is None:
                future.clock = self._clocks.snapshot(self._running.name)
            else:
                future.clock = self._clocks.merged([one.clock for one in after])

    def joined(self, future: "Future[Any]") -> None:
        if self._clocks:
            self._clocks.join(self._running.name, future.clock)

    def declare(self, *, reads: Sequence[Any] = (), writes: Sequence[Any] = ()) -> None:
        if self._clocks:
            for place in reads:
                self._clocks.access(self._running.name, place, is_write=False)
            for place in writes:
                self._clocks.access(self._running.name, place, is_write=True)

    def reclaimed(self, memory: Any) -> None:
        self.declare(writes=[memory])
        if self.poison:
            memory.fill_(0xFF)  # NaN in every dtype

    def close(self) -> None:
        self._clocks = None  # what happens from here on is the end of everything
        super().close()


class _Participant:
    """The training thread or a lane's."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.turn = threading.Semaphore(0)
        self.units: deque[tuple[Callable[[], Any], Future[Any], Any]] | None = None
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
        self._units: deque[tuple[Callable[[], Any], Future[Any], Any]] = deque()
        self.participant.units = self._units
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"offload-{name}", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Any], name: str, future: "Future[Any] | None" = None) -> "Future[Any]":
        future = future if future is not None else self._lanes.future(name)
        self.num_submitted += 1
        self._units.append((work, future, self._lanes.snapshot()))
        if self._lanes.running.name == TRAINING_LANE:  # a lane may hold a lock here
            self._lanes.switch()
        return future

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
            work, future, seen = self._units.popleft()
            self._lanes.begin_unit(seen)
            self._lanes.run_unit(work, future)
            self.participant.busy = False
            del work, future, seen
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
