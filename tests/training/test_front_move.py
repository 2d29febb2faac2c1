"""A partition that is needed out of order is stepped before what has not begun: sooner there, the same bits."""

import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.concurrency.lanes import Lanes, Reason
from offload.memory.ring import Ring
from offload.optimizer.step_queue import Board, Job, Passage
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


# ------------------------------------------------------------------------------------------------- the board


def steps_of_a_board(lanes: Lanes, chosen: random.Random) -> tuple[list[str], list[str], list[str]]:
    """Jobs over a small ring while others are hurried: names in the order submitted, read, and stepped."""
    num_buffers = chosen.randint(1, 3)
    ring = Ring(
        "step", torch.zeros(num_buffers, dtype=torch.uint8), buffer_bytes=1, num_buffers=num_buffers, lanes=lanes
    )
    read_lane, step_lane, training = lanes.lane("step read"), lanes.lane("step"), lanes.lane("something else")
    read: list[str] = []
    stepped: list[str] = []
    gradient_on_host: Any = None

    def take(passage: Passage) -> None:
        read.append(passage.done.name)
        passage.lease = ring.acquire(released_by=passage.done)

    def step(name: str, passage: Passage | None) -> None:
        if passage is not None:
            lanes.wait(passage.issued, Reason.READ_ISSUED)
            assert passage.lease is not None
            passage.lease.release()
        stepped.append(name)

    jobs = []
    for pid in range(chosen.randint(1, 5)):
        for number in range(chosen.randint(1, 4)):
            done = lanes.future(f"{pid}: job {number}")
            passage = None
            if chosen.random() < 0.7:
                passage = Passage(gradient_on_host, done, lanes.future(f"read {done.name}"), None)
            jobs.append(Job(pid, done, partial(step, done.name, passage), passage))
        done = lanes.future(f"{pid}: publish")
        jobs.append(Job(pid, done, partial(step, done.name, None), publishes=True))
    board = Board(jobs, lanes=lanes)
    turns = board.submit(step_lane, read_lane, take)
    for _ in range(chosen.randint(0, 6)):
        board.hurry(chosen.randrange(5))
        training.submit(lambda: None, "somebody else's turn")
    lanes.wait(turns[-1], Reason.STEP_DONE)
    assert all(job.done.done() for job in jobs)
    assert board.is_over
    return [job.done.name for job in jobs], read, stepped


@pytest.mark.parametrize("number", range(25 * MANY))
def test_every_job_is_done_once_and_buffers_are_given_back_in_the_order_they_were_lent(number: int, seed: int) -> None:
    chosen = random.Random(seed)
    lanes = LateLanes() if number % 5 == 0 else TurnLanes(shuffled(seed))
    try:
        submitted, read, stepped = steps_of_a_board(lanes, chosen)
    finally:
        lanes.close()
    assert sorted(stepped) == sorted(submitted)
    assert [name for name in stepped if name in read] == read
    for pid in {name.partition(":")[0] for name in submitted}:
        places = [place for place, name in enumerate(stepped) if name.startswith(f"{pid}:")]
        assert stepped[places[-1]] == f"{pid}: publish"
        assert len(places) == 1 or places[-2] == places[-1] - 1, "a publication is not delayed by others"


def test_a_failed_job_fails_all_that_have_not_begun() -> None:
    for lanes in (LateLanes(), TurnLanes(slow("step")), threads()):
        read_lane, step_lane = lanes.lane("step read"), lanes.lane("step")
        jobs = [Job(pid, lanes.future(f"job {pid}"), lambda pid=pid: 1 // (2 - pid)) for pid in range(5)]
        turns = Board(jobs, lanes=lanes).submit(step_lane, read_lane, lambda passage: None)
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            lanes.wait(turns[-1], Reason.STEP_DONE)
        lanes.close()
        assert [job.done.done() for job in jobs] == [True] * 5
        assert [job.done.result() for job in jobs[:2]] == [0, 1]
        with pytest.raises(ZeroDivisionError):
            jobs[2].done.result()
        for job in jobs[3:]:
            with pytest.raises(Exception, match=r"division|failed"):
                job.done.result()
