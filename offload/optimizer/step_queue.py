"""The jobs of one step: what is stepped and published, and in which order.

Owns: the order of the jobs, and what may still be moved to its front.
Does not: read, step or publish (state_reads.py, pipeline.py).
Threads: made by the training thread; `next_read` on the lane `step read`, `next_step` on `step`, `hurry` on the
training thread.

Note [Front]: each lane has one turn for every job of a step, and takes the next job only when its turn comes. So the
training thread may move a partition that it needs out of order to the front of what has not begun. A job has begun when
either lane has taken it, or what it needs was read ahead: those keep their order. So the two lanes take what passes
through staging buffers in the same order, and staging buffers are given back in the order in which they were lent (Note [Ring order] in
memory/ring.py). All that a job waits for outside its step was submitted before the step: within it any order can run.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Lane, Lanes
from offload.device.protocol import Mark
from offload.gradients.chunks import GradientChunk
from offload.memory.ring import Lease
from offload.optimizer.decision import StepDecision
from offload.storage.homes import Home
from offload.storage.state_tensors import StateTensors
from offload.units import Tier
from offload.weights.fetch import FetchInFlight


@dataclass(slots=True, eq=False)
class StateChunk:
    """One chunk of trainable elements with the homes of all its kinds."""

    gradient: GradientChunk
    state: Home
    weights: Home
    state_tensors: StateTensors
    is_staged: bool
    """Something of it is not addressable by the kernel: it passes through a staging buffer of the step ring."""
    stepped: "Future[Any] | None" = None
    """Its newest step. Set by the training thread."""


def weights_are_staged(weights: Home, state: Home) -> bool:
    """New weights of a chunk go through a staging buffer: to disk, or to a device whose state is elsewhere."""
    return weights.tier is Tier.DISK or (weights.tier is Tier.DEVICE and state.tier is not Tier.DEVICE)


@dataclass(slots=True, eq=False)
class Passage:
    """One chunk on its way through a staging buffer of the step ring."""

    chunk: StateChunk
    done: "Future[Any]"
    """The staging buffer has been given back: by the step of the chunk, or by whoever drops what was read ahead."""
    issued: "Future[Any]"
    """Lease and reads are set before it resolves."""
    stepped_before: "Future[Any] | None"
    """The newest step of the same chunk, of those submitted before."""
    lease: Lease | None = None
    reads: "list[Future[Any]]" = field(default_factory=list)
    all_offloaded: "Future[Any] | None" = None
    """The last gradient offload, once the step is submitted."""
    ahead: bool = False
    """It was read ahead, all but the gradient."""
    dropped: bool = False
    """It was read ahead, and no step takes it over: nothing of it needs to be read any more."""

    @property
    def needs_gradient(self) -> bool:
        """The gradient passes through the staging buffer: it is read when it has offloaded."""
        return self.chunk.gradient.home.tier is Tier.DISK

    @property
    def is_to_read(self) -> bool:
        """Something is to be read once the step is submitted."""
        return not self.ahead or self.needs_gradient


@dataclass(slots=True, eq=False)
class Job:
    """Something that a step does to one partition, in its turn."""

    pid: int
    done: "Future[Any]"
    work: Callable[[], Any]
    passage: Passage | None = None
    publishes: bool = False
    """It is what comes after all chunks of the partition."""
    begun: bool = False
    """It keeps its place: see Note [Front]."""


@dataclass(slots=True, eq=False)
class StepJob:
    """One step of one chunk."""

    chunk: StateChunk
    offloaded: set[int]
    hypers: tuple[Any, ...]
    decision: "Future[StepDecision]"
    last_fetch: FetchInFlight | None
    compute_done: Mark
    passage: Passage | None
    """None where everything is addressable at home."""


class Board:
    """The jobs of one step, in the order in which they will be done."""

    def __init__(self, jobs: Sequence[Job], *, lanes: Lanes) -> None:
        self._lanes = lanes
        self._lock = threading.Lock()
        self._steps = deque(jobs)
        self._reads = deque(job for job in jobs if job.passage is not None and job.passage.is_to_read)
        self.pids = {job.pid for job in jobs}
        for job in jobs:
            job.begun = job.passage is not None and job.passage.ahead

    def submit(self, step_lane: Lane, read_lane: Lane | None, read: Callable[[Passage], Any]) -> "list[Future[Any]]":
        """Submit a turn of the step lane for every job, and one of the read lane for what is to be read by `read`.

        Returns the turns of the step lane.
        """
        jobs, waiting = list(self._steps), set(self._reads)
        step_turns: list[Future[Any]] = []
        for job in jobs:
            if job in waiting and job.passage is not None and read_lane is not None:
                turn = read_lane.submit(partial(self._read_next, read), f"turn to read for {job.done.name}")
                turn.when_done(partial(self._read_turn_over, turn))
            turn = step_lane.submit(self._step_next, f"turn of {job.done.name}")
            turn.when_done(partial(self._step_turn_over, turn))
            step_turns.append(turn)
        return step_turns

    def hurry(self, pid: int) -> None:
        """Move what has not begun of a partition to the front of all that has not begun. See Note [Front]."""
        if pid in self.pids:
            with self._lock:
                self._steps = _with_front(self._steps, pid)
                self._reads = _with_front(self._reads, pid)

    @property
    def is_over(self) -> bool:
        """Every job has begun."""
        return not self._steps

    # -------------------------------------------------------------------------------------------- the lanes

    def _read_next(self, read: Callable[[Passage], Any]) -> None:
        with self._lock:
            job = self._reads.popleft()
            job.begun = True
        assert job.passage is not None
        self._lanes.run_unit(partial(read, job.passage), job.passage.issued)
        job.passage.issued.result()

    def _step_next(self) -> None:
        with self._lock:
            job = self._steps.popleft()
            job.begun = True
        self._lanes.run_unit(job.work, job.done)
        job.done.result()

    def _read_turn_over(self, turn: "Future[Any]") -> None:
        """Where a turn failed nothing runs any more: what is left fails with it, for whoever waits for that."""
        if (error := _error_of(turn)) is not None:
            with self._lock:
                left = [job.passage.issued for job in self._reads if job.passage is not None]
                self._reads.clear()
            self._fail(left, error)

    def _step_turn_over(self, turn: "Future[Any]") -> None:
        if (error := _error_of(turn)) is not None:
            with self._lock:
                left = [job.done for job in self._steps]
                self._steps.clear()
            self._fail(left, error)

    def _fail(self, futures: "list[Future[Any]]", error: BaseException) -> None:
        for future in futures:
            future.fail(error)


def _with_front(jobs: deque[Job], pid: int) -> deque[Job]:
    """Partition `pid` before all that has not begun; what needs no staging buffer of it before everything.

    A publication stands right behind the last chunk of its partition: else what others have begun would delay it.
    """

    def place(job: Job) -> int:
        if job.begun:
            return 1
        if job.pid != pid:
            return 3
        return 0 if job.passage is None else 2

    chunks = sorted((job for job in jobs if not job.publishes), key=place)
    publications = {job.pid: job for job in jobs if job.publishes}
    last = {job.pid: job for job in chunks}
    front = [publications.pop(one) for one in list(publications) if one not in last]
    for job in chunks:
        front.append(job)
        if job is last[job.pid] and job.pid in publications:
            front.append(publications[job.pid])
    return deque(front)


def _error_of(future: "Future[Any]") -> BaseException | None:
    try:
        future.result()
    except BaseException as error:
        return error
    return None
