"""A small executor carries the actions out on lanes at arbitrary interleavings: it never stands still.

Note [Waiting] in offload/concurrency/lanes.py, played with the least of everything: one staging buffer, a ring of slots
as small as it may be, and a step that publishes as late as anything can.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import BudgetError
from offload.weights.schedule import Action, Fetch, Schedule


@dataclass
class Unit:
    """Runs on its lane when it is the first there and `ready`."""

    ready: Callable[[], bool]
    run: Callable[[], None]


class Executor:
    """Lanes `read` (disk to staging buffer), `fetch` (to a slot, and resharding) and `step` (new versions)."""

    def __init__(self, sizes: Sequence[int], capacity_bytes: int, seed: int) -> None:
        self.schedule = Schedule(dict(enumerate(sizes)), capacity_bytes, resident=())
        self._sizes, self._capacity_bytes = sizes, capacity_bytes
        self._lanes: dict[str, deque[Unit]] = {name: deque() for name in ("read", "fetch", "step")}
        self._random = random.Random(seed)
        self._buffers_free = 1
        self._in_buffer: dict[int, int] = {}  # number of the fetch: version read
        self._slots: dict[int, int] = {}  # partition: version of the weights in its slot
        self._issued: dict[int, int] = {}  # partition: number of its latest fetch
        self._done: set[int] = set()
        self._submitted = [0] * len(sizes)
        self._published = [0] * len(sizes)
        self._num_fetches = 0

    def use(self, pid: int) -> None:
        fresh = self.schedule.count(pid) == 0
        self._carry_out(self.schedule.acquire(pid))
        if fresh:
            number = self._issued[pid]
            self._wait(lambda: number in self._done)
            assert self._slots[pid] == self._submitted[pid], "weights of another version"

    def end(self, pid: int) -> None:
        self._carry_out(self.schedule.release(pid))

    def step(self) -> None:
        for pid in range(len(self._sizes)):
            self._submitted[pid] += 1
            self._submit("step", lambda: True, self._publish_unit(pid, self._submitted[pid]))
        self._carry_out(self.schedule.step(range(len(self._sizes))))

    def evaluate(self, on: bool) -> None:
        self._carry_out(self.schedule.begin(evaluating=True) if on else self.schedule.end_evaluation())

    def drain(self) -> None:
        self._wait(lambda: not any(self._lanes.values()))

    def _publish_unit(self, pid: int, version: int) -> Callable[[], None]:
        def publish() -> None:
            self._published[pid] = version

        return publish

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Fetch):
                self._submit_fetch(action.pid, self._submitted[action.pid])
            else:
                self._submit_reshard(action.pid)
        for _ in range(self._random.randrange(4)):
            self._run_one()

    def _submit_fetch(self, pid: int, version: int) -> None:
        self._num_fetches += 1
        number = self._issued[pid] = self._num_fetches

        def read() -> None:
            self._buffers_free -= 1
            self._in_buffer[number] = self._published[pid]

        def fetch() -> None:
            self._slots[pid] = self._in_buffer.pop(number)
            assert sum(self._sizes[p] for p in self._slots) <= self._capacity_bytes
            self._buffers_free += 1
            self._done.add(number)

        self._submit("read", lambda: self._buffers_free > 0 and self._published[pid] >= version, read)
        self._submit("fetch", lambda: number in self._in_buffer, fetch)

    def _submit_reshard(self, pid: int) -> None:
        self._submit("fetch", lambda: True, lambda: self._slots.__delitem__(pid))

    def _submit(self, lane: str, ready: Callable[[], bool], run: Callable[[], None]) -> None:
        self._lanes[lane].append(Unit(ready, run))

    def _run_one(self) -> bool:
        able = [lane for lane, units in self._lanes.items() if units and units[0].ready()]
        if "step" in able and len(able) > 1:
            able.remove("step")  # as late as it may be
        if able:
            self._lanes[self._random.choice(able)].popleft().run()
        return bool(able)

    def _wait(self, done: Callable[[], bool]) -> None:
        while not done():
            assert self._run_one(), "no unit can run"


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    spare=st.integers(0, 5),
    rounds=st.lists(st.sampled_from(["train", "train", "evaluate", "backward only"]), min_size=1, max_size=8),
    seed=st.integers(0, 1_000_000),
)
def test_training_and_evaluation_in_any_order_never_stand_still(
    sizes: list[int], spare: int, rounds: list[str], seed: int
) -> None:
    executor = Executor(sizes, max(sizes) + spare, seed)
    forward = list(range(len(sizes)))
    for kind in rounds:
        if kind == "evaluate":
            executor.evaluate(True)
        for pid in {"train": forward + forward[::-1], "evaluate": forward}.get(kind, forward[::-1]):
            executor.use(pid)
            executor.end(pid)
            executor.schedule.validate()
        if kind == "evaluate":
            executor.evaluate(False)
        if kind == "train":
            executor.step()
    executor.drain()


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 3), min_size=2, max_size=5),
    capacity_bytes=st.integers(3, 8),
    moves=st.lists(
        st.tuples(st.sampled_from(["use", "use", "nest", "end", "step", "evaluate"]), st.integers(0, 4)), max_size=50
    ),
    seed=st.integers(0, 1_000_000),
)
def test_any_program_with_nested_uses_and_steps_inside_never_stands_still(
    sizes: list[int], capacity_bytes: int, moves: list[tuple[str, int]], seed: int
) -> None:
    executor = Executor(sizes, capacity_bytes, seed)
    open_uses: list[int] = []
    for kind, number in moves:
        pid = number % len(sizes)
        if kind in ("use", "nest"):
            in_use = sum(sizes[p] for p in set(open_uses))
            if pid not in open_uses and in_use + sizes[pid] > capacity_bytes:
                with pytest.raises(BudgetError):
                    executor.use(pid)
                continue
            executor.use(pid)
            open_uses.append(pid)
        if kind in ("use", "end") and open_uses:
            executor.end(open_uses.pop())
        if kind == "step":
            executor.step()
        if kind == "evaluate":
            executor.evaluate(number % 2 == 0)
        executor.schedule.validate()
        assert executor.schedule.held_bytes <= capacity_bytes
    executor.drain()
