"""A partition that is needed out of order is stepped before what has not begun: sooner there, the same bits."""

import os
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.concurrency.lanes import Lanes, Reason
from offload.errors import SessionFailedError
from offload.memory.ring import Ring
from offload.optimizer.chunk_step import BufferLayout, ChunkStep, Staged, StagedStep, StateChunk, StepState
from offload.optimizer.step_queue import PartitionStep, StepQueue
from offload.units import Tier
from tests.doubles.clocks import Clocks
from tests.doubles.late import LateLanes
from tests.doubles.turns import TurnLanes, shuffled, slow
from tests.training.programs import NUM_BLOCKS, Run, running, threads

HEAD = NUM_BLOCKS
"""Partition of the head; those of the blocks have their numbers."""

MANY = 40 if os.environ.get("OFFLOAD_STRESS") else 4

ORDERS: dict[str, Callable[[], Any]] = {
    "late": LateLanes,
    "slow steps": lambda: TurnLanes(slow("step", "step read", "read"), clocks=Clocks()),
}


def published_in_forward(run: Run, order: list[int]) -> list[int]:
    """In which order partitions are published when, after a step, blocks are called in this order."""
    run.train()
    found: list[int] = []
    published = [publication.whole for publication in run.session._components.fetcher.publications]
    assert not any(future.done() for future in published)
    for pid, future in enumerate(published):
        future.when_done(lambda pid=pid: found.append(pid))
    run.forward(order=order)
    return found


@pytest.mark.parametrize("lanes", ORDERS)
@pytest.mark.parametrize(
    ("home", "step_buffers"), [("host", 0), ("state on disk", 1), ("all on disk", 1), ("all on disk", 2)]
)
def test_a_block_called_first_for_once_is_published_before_those_that_come_before_it(
    home: str, step_buffers: int, lanes: str, tmp_path: Path
) -> None:
    with running(ORDERS[lanes](), home, tmp_path, step_buffers=step_buffers) as run:
        run.train()
        as_ever = published_in_forward(run, [0, 1, 2, 3, 4])
        run.session.gathered_gradients()  # all is done
        other = published_in_forward(run, [4, 0, 1, 2, 3])
    assert as_ever == [0, 1, 2, 3, 4, HEAD]
    # What a staging buffer has been taken for is stepped first; that is not yet published before block 4.
    before = other[: other.index(4)]
    assert len(before) <= step_buffers
    assert [pid for pid in other if pid != 4] == [0, 1, 2, 3, HEAD]


def outcome(lanes: Lanes, home: str, folder: Path, orders: list[list[int]], **options: Any) -> tuple[list[float], str]:
    with running(lanes, home, folder, **options) as run:
        for number, order in enumerate(orders):
            run.train(order=order)
            if number % 3 == 2:
                run.step_twice()
        return run.seen, run.session.weights_sha256()


@pytest.mark.parametrize("number", range(MANY))
def test_blocks_in_any_order_in_any_order_of_events_neither_hang_nor_change_bits(
    number: int, seed: int, tmp_path: Path
) -> None:
    chosen = random.Random(seed)
    orders = [chosen.sample(range(NUM_BLOCKS), chosen.randint(1, NUM_BLOCKS)) for _ in range(7)]
    home = chosen.choice(["host", "state on disk", "all on disk"])
    options: Any = {"step_buffers": chosen.choice([1, 2, 3]), "max_grad_norm": 1.0}
    expected = outcome(threads(), home, tmp_path, orders, overlap="off", **options)
    assert outcome(threads(), home, tmp_path, orders, **options) == expected
    assert outcome(TurnLanes(shuffled(seed), clocks=Clocks()), home, tmp_path, orders, **options) == expected


# ------------------------------------------------------------------------------------------------- the queue


def chunk_of(pid: int, *, gradient_on_disk: bool = False) -> StateChunk:
    """A chunk of which the queue looks at nothing but its partition and whether its gradient is on disk."""
    tier = Tier.DISK if gradient_on_disk else Tier.HOST
    gradient: Any = SimpleNamespace(
        chunk=SimpleNamespace(partition_id=pid, partition=str(pid), numel=1), home=SimpleNamespace(tier=tier)
    )
    unused: Any = None
    nothing = slice(0, 0)
    return StateChunk(gradient, unused, unused, (), BufferLayout(nothing, nothing, nothing))


class NamedSteps:
    """Steps of chunks and partitions, whose futures have names."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes

    def direct(self, pid: int, number: int) -> ChunkStep:
        return ChunkStep(chunk_of(pid), self._lanes.future(f"{pid}: chunk {number}"))

    def staged(self, pid: int, number: int, *, ahead: bool = False, gradient_on_disk: bool = False) -> StagedStep:
        done = self._lanes.future(f"{pid}: chunk {number}")
        chunk = chunk_of(pid, gradient_on_disk=gradient_on_disk)
        step = StagedStep(chunk, done, self._lanes.future(f"read {done.name}"), None)
        if ahead:
            step.state, step.ahead = StepState.BEGUN, step.issued
        return step

    def partition(self, pid: int, chunks: list[ChunkStep]) -> PartitionStep:
        return PartitionStep(pid, chunks, self._lanes.future(f"{pid}: publish"))


def submit(queue: StepQueue, partitions: list[PartitionStep], lanes: Lanes, work: Any) -> Any:
    """As many turns as there are units, of lanes that call `work.read` and `work.step`; the future of their end."""
    read_lane, step_lane = lanes.lane("step read"), lanes.lane("step")

    def next_read() -> Any:
        step = queue.take_read()
        return partial(work.read, step), step.issued

    def next_step() -> Any:
        step = queue.take_step()
        return partial(work.step, step), step.published if isinstance(step, PartitionStep) else step.done

    for partition in partitions:
        for step in partition.chunks:
            if isinstance(step, StagedStep) and step.is_to_read:
                read_lane.submit_turn(next_read)
            step_lane.submit_turn(next_step)
        step_lane.submit_turn(next_step)
    return step_lane.submit(lambda: None, "end")


class RingWork:
    """Reads acquire buffers of a small ring, and steps release them."""

    def __init__(self, lanes: Lanes, num_buffers: int) -> None:
        memory = torch.zeros(num_buffers, dtype=torch.uint8)
        self._ring = Ring("step", memory, buffer_bytes=1, num_buffers=num_buffers, lanes=lanes)
        self._lanes = lanes
        self.was_read: list[str] = []
        self.stepped: list[str] = []

    def read(self, step: StagedStep) -> Staged:
        self.was_read.append(step.done.name)
        return Staged(self._ring.acquire(released_by=step.done), ())

    def step(self, step: ChunkStep | PartitionStep) -> None:
        if isinstance(step, StagedStep):
            self._lanes.wait(step.issued, Reason.READ_ISSUED).lease.release()
        self.stepped.append(step.published.name if isinstance(step, PartitionStep) else step.done.name)


def steps_of_a_queue(lanes: Lanes, chosen: random.Random) -> tuple[list[str], RingWork]:
    """Steps over a small ring while partitions are moved to the front: all names, and what was done."""
    work = RingWork(lanes, chosen.randint(1, 3))
    steps = NamedSteps(lanes)
    partitions = [
        steps.partition(
            pid,
            [
                (steps.staged if chosen.random() < 0.7 else steps.direct)(pid, number)
                for number in range(chosen.randint(1, 4))
            ],
        )
        for pid in range(chosen.randint(1, 5))
    ]
    queue = StepQueue(partitions)
    training = lanes.lane("something else")
    end = submit(queue, partitions, lanes, work)
    for _ in range(chosen.randint(0, 6)):
        queue.prioritize(chosen.randrange(5))
        training.submit(lambda: None, "somebody else's turn")
    lanes.wait(end, Reason.STEP_DONE)
    assert queue.is_over
    chunks = [step.done for partition in partitions for step in partition.chunks]
    published = [partition.published for partition in partitions]
    assert all(future.done() for future in chunks + published)
    return [future.name for future in chunks + published], work


@pytest.mark.parametrize("number", range(25 * MANY))
def test_every_step_is_done_once_and_buffers_are_released_in_the_order_they_were_acquired(
    number: int, seed: int
) -> None:
    chosen = random.Random(seed)
    lanes = LateLanes() if number % 5 == 0 else TurnLanes(shuffled(seed))
    try:
        submitted, work = steps_of_a_queue(lanes, chosen)
    finally:
        lanes.close()
    assert sorted(work.stepped) == sorted(submitted)
    assert [name for name in work.stepped if name in work.was_read] == work.was_read
    for pid in {name.partition(":")[0] for name in submitted}:
        places = [place for place, name in enumerate(work.stepped) if name.startswith(f"{pid}:")]
        assert work.stepped[places[-1]] == f"{pid}: publish"
        assert len(places) == 1 or places[-2] == places[-1] - 1, "a publication is not delayed by others"


class FailingWork:
    """The step of the third partition fails."""

    def step(self, step: ChunkStep | PartitionStep) -> float:
        return 1 / (2 - step.chunk.pid) if isinstance(step, ChunkStep) else 0.0


def test_a_failed_step_fails_all_that_have_not_begun() -> None:
    for lanes in (LateLanes(), TurnLanes(slow("step")), threads()):
        steps = NamedSteps(lanes)
        partitions = [steps.partition(pid, [steps.direct(pid, 0)]) for pid in range(5)]
        with pytest.raises(SessionFailedError, match="division"):
            lanes.wait(submit(StepQueue(partitions), partitions, lanes, FailingWork()), Reason.STEP_DONE)
        lanes.close()
        futures = [future for each in partitions for future in (each.chunks[0].done, each.published)]
        assert all(future.done() for future in futures)
        assert [future.result() for future in futures[:4]] == [0.5, 0.0, 1.0, 0.0]
        with pytest.raises(ZeroDivisionError):
            futures[4].result()
        for future in futures[5:]:
            with pytest.raises(SessionFailedError):
                future.result()


# ------------------------------------------------------------------------------------- the order, against a sort


class SortedQueue:
    """The same order by sorting all that is left at each move: what `StepQueue` must give, at a greater cost."""

    def __init__(self, partitions: list[PartitionStep]) -> None:
        self._steps: list[Any] = [unit for each in partitions for unit in (*each.chunks, each)]
        self._reads = [
            step for each in partitions for step in each.chunks if isinstance(step, StagedStep) and step.is_to_read
        ]
        self._begun = {step for each in partitions for step in each.chunks if step.state is StepState.BEGUN}

    def prioritize(self, pid: int) -> None:
        self._steps, self._reads = self._with_front(self._steps, pid), self._with_front(self._reads, pid)

    def take_read(self) -> StagedStep:
        step = self._reads.pop(0)
        self._begun.add(step)
        return step

    def take_step(self) -> ChunkStep | PartitionStep:
        step = self._steps.pop(0)
        self._begun.add(step)
        return step

    def reads_left(self) -> int:
        return len(self._reads)

    def steps_left(self) -> int:
        return len(self._steps)

    def _with_front(self, units: list[Any], pid: int) -> list[Any]:
        def section(step: ChunkStep) -> int:
            if step in self._begun:
                return 1
            if step.chunk.pid != pid:
                return 3
            return 2 if isinstance(step, StagedStep) else 0

        chunks = sorted((unit for unit in units if isinstance(unit, ChunkStep)), key=section)
        publications = {unit.pid: unit for unit in units if isinstance(unit, PartitionStep)}
        last = {step.chunk.pid: step for step in chunks}
        front: list[Any] = [publications.pop(each) for each in list(publications) if each not in last]
        for step in chunks:
            front.append(step)
            if step is last[step.chunk.pid] and step.chunk.pid in publications:
                front.append(publications[step.chunk.pid])
        return front


Kinds = list[list[str]]
"""By partition, of every chunk: `direct` or `staged`, its gradient in memory or `on disk`."""


def partitions_of(kinds: Kinds, num_ahead: int) -> list[PartitionStep]:
    """The first `num_ahead` of the staged chunks were read ahead."""
    steps, num_staged = NamedSteps(threads()), 0
    partitions = []
    for pid, row in enumerate(kinds):
        chunks: list[ChunkStep] = []
        for number, kind in enumerate(row):
            if kind == "direct":
                chunks.append(steps.direct(pid, number))
                continue
            ahead = num_staged < num_ahead
            chunks.append(steps.staged(pid, number, ahead=ahead, gradient_on_disk=kind == "on disk"))
            num_staged += 1
        partitions.append(steps.partition(pid, chunks))
    return partitions


def name_of(step: Any) -> str:
    name: str = step.published.name if isinstance(step, PartitionStep) else step.done.name
    return name


@given(
    kinds=st.lists(st.lists(st.sampled_from(["direct", "staged", "on disk"]), min_size=1, max_size=4), max_size=6),
    num_ahead=st.integers(0, 3),
    calls=st.lists(st.one_of(st.integers(0, 7), st.sampled_from(["read", "step", "step"])), max_size=60),
)
def test_the_order_is_that_of_sorting_all_that_is_left_at_every_move(
    kinds: Kinds, num_ahead: int, calls: list[int | str]
) -> None:
    expected = SortedQueue(partitions_of(kinds, num_ahead))
    queue = StepQueue(partitions_of(kinds, num_ahead))
    for call in [*calls, *["read", "step"] * (sum(map(len, kinds)) + len(kinds))]:
        if call == "read" and expected.reads_left():
            assert name_of(queue.take_read()) == name_of(expected.take_read())
        elif call == "step" and expected.steps_left():
            assert name_of(queue.take_step()) == name_of(expected.take_step())
        elif isinstance(call, int):
            queue.prioritize(call)
            if call < len(kinds):
                expected.prioritize(call)
    assert queue.is_over
    assert expected.steps_left() == expected.reads_left() == 0


@pytest.mark.parametrize("num_partitions", [10, 1000])
def test_a_move_costs_as_many_calls_among_ten_partitions_as_among_a_thousand(num_partitions: int) -> None:
    queue = StepQueue(partitions_of([["staged"]] * num_partitions, 0))
    num_calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal num_calls
        num_calls += event == "call"

    sys.setprofile(count)
    queue.prioritize(num_partitions - 1)
    sys.setprofile(None)
    assert num_calls <= 6
