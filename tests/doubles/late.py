"""Lanes that run everything as late as is legal: only when somebody waits for it, in the waiting thread."""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Lane, Lanes, set_current_lane
from offload.concurrency.timeline import Timeline


class LateLane:
    """A lane without a thread."""

    def __init__(self, name: str, lanes: "LateLanes") -> None:
        self.name = name
        self.num_submitted = 0
        self._lanes = lanes
        self._units: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    def submit(self, work: Callable[[], Any], name: str, future: "Future[Any] | None" = None) -> "Future[Any]":
        future = future if future is not None else self._lanes.future(name)
        future.force = partial(self._run_until, future)
        self.num_submitted += 1
        self._units.append((work, future))
        return future

    def describe(self) -> list[str]:
        return [f"{self.name}: {len(self._units)} waiting"] if self._units else []

    def close(self) -> None:
        while self._units:
            self._run_one()

    def _run_until(self, future: "Future[Any]") -> None:
        while not future.done():
            if not self._units:
                raise AssertionError(f"{future.name!r} is running already: a unit waits for itself or for a later one")
            self._run_one()

    def _run_one(self) -> None:
        work, future = self._units.popleft()
        before = set_current_lane(self.name)
        try:
            with _disable_current_modes():  # of the waiting thread: a unit is not one of its operations
                self._lanes.run_unit(work, future)
        finally:
            set_current_lane(before)


class LateLanes(Lanes):
    """Makes late lanes. Everything runs in one thread: the same order of events every time."""

    def __init__(self) -> None:
        super().__init__(Timeline(), wait_timeout_s=5.0)

    def _make_lane(self, name: str) -> Lane:
        return LateLane(name, self)
