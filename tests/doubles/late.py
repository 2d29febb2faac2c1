"""Lanes that run everything as late as is legal: only when somebody waits for it, in the waiting thread."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Lane, Lanes, Reason, Unit, set_current_lane
from offload.concurrency.timeline import Timeline

TAKE_TURNS = ("step", "step read")
"""Lanes whose turns settle futures that were submitted to no lane: those of a step's chunks and publications."""


class LateFuture(Future[Any]):
    """A future that knows which work settles it, where anybody can know."""

    __slots__ = ("lane", "parts")

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.lane: LateLane | None = None
        self.parts: Sequence[Future[Any]] = ()


class LateLane:
    """A lane without a thread."""

    def __init__(self, name: str, lanes: "LateLanes") -> None:
        self.name = name
        self.num_submitted = 0
        self._lanes = lanes
        self._units: deque[Unit | Callable[[], Unit]] = deque()
        self._is_running = False

    def submit(self, work: Callable[[], Any], name: str, future: "Future[Any] | None" = None) -> "Future[Any]":
        future = future if future is not None else self._lanes.future(name)
        if isinstance(future, LateFuture):
            future.lane = self
        self.num_submitted += 1
        self._units.append((work, future))
        return future

    def submit_turn(self, take: Callable[[], Unit]) -> None:
        self.num_submitted += 1
        self._units.append(take)

    def describe(self) -> list[str]:
        return [f"{self.name}: {len(self._units)} waiting"] if self._units else []

    def close(self) -> None:
        while self._units:
            self.run_one()

    def can_run(self) -> bool:
        """It has a unit that has not begun, and none that has."""
        return bool(self._units) and not self._is_running

    def run_one(self) -> None:
        """Run the next unit, in this thread."""
        unit = self._units.popleft()
        work, future = unit if isinstance(unit, tuple) else unit()
        before = set_current_lane(self.name)
        was_running, self._is_running = self._is_running, True
        try:
            with _disable_current_modes():  # of the waiting thread: a unit is not one of its operations
                self._lanes.run_unit(work, future)
        finally:
            set_current_lane(before)
            self._is_running = was_running


class LateLanes(Lanes):
    """Makes late lanes. Everything runs in one thread: the same order of events every time."""

    def __init__(self) -> None:
        super().__init__(Timeline(), wait_timeout_s=5.0)

        self._late_lanes: dict[str, LateLane] = {}

    def future(self, name: str) -> "Future[Any]":
        return LateFuture(name)

    def all_of(self, futures: "Sequence[Future[Any]]", name: str) -> "Future[Any]":
        joint = super().all_of(futures, name)
        if isinstance(joint, LateFuture) and joint not in futures:
            joint.parts = futures
        return joint

    def _make_lane(self, name: str) -> Lane:
        self._late_lanes[name] = lane = LateLane(name, self)
        return lane

    def _block(self, future: "Future[Any]", reason: Reason) -> None:
        if isinstance(future, LateFuture):
            self._run_until(future)
        super()._block(future, reason)

    def _run_until(self, future: LateFuture) -> None:
        """Run what `future` needs and no more: only the units in front of it, of the lane that settles it."""
        for part in future.parts:
            if isinstance(part, LateFuture):
                self._run_until(part)
        while not future.done():
            in_turns = [self._late_lanes[name] for name in TAKE_TURNS if name in self._late_lanes]
            candidates = in_turns if future.lane is None else [future.lane]
            lane = next((lane for lane in candidates if lane.can_run()), None)
            if lane is None:
                raise AssertionError(f"{future.name!r} is running already: a unit waits for itself or for a later one")
            lane.run_one()
