"""The step queue: in which order a step's chunks are read, stepped and published.

Owns: the order, and what of it may still change.
Does not: read, step or publish (state_reads.py, chunk_stepper.py, pipeline.py). No lane is known here.
Threads: made by the training thread; `take_read` on the lane `step read`, `take_step` on `step`, `prioritize` on the
training thread.

Note [Front]: each lane has one turn for every unit of a step, and takes the next unit only when its turn comes. So the
training thread may move a partition that it needs out of order to the front of what has not begun. A chunk has begun
when either lane has taken it, or when it was read ahead: such chunks keep their order. So the two lanes take staged
chunks in the same order, and staging buffers are released in the order in which they were acquired (Note [Ring order]
in memory/ring.py). A publication directly follows the last chunk of its partition, else chunks of others would delay
it. All that a unit waits for outside its step was submitted before the step: within it any order can run.

Note [Places]: a waiting chunk has a place (negative number of the move that gave it this place, section, position in
the order of submission), and the smallest place is next. The newest move comes first. Its sections: first the chunks
of the partition that need no staging buffer, then all that had begun before the move, then the partition's staged
chunks. So a move writes the places of its own partition and nothing else: older places stay in the heaps until they
are met there, and whether a begun chunk is older than the newest move is seen by its number.
"""

import heapq
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, Generic, NamedTuple, TypeVar

from offload.concurrency.futures import Future
from offload.errors import InternalError
from offload.optimizer.chunk_step import ChunkStep, StagedStep, StepState

Place = tuple[int, int, int]
"""See Note [Places]."""

DIRECT: Final = 0
BEGUN: Final = 1
STAGED: Final = 2
"""Sections of a move."""

AnyStep = TypeVar("AnyStep", bound=ChunkStep)


@dataclass(frozen=True, slots=True, eq=False)
class PartitionStep:
    """The step of one partition: of its chunks, then its publication."""

    pid: int
    chunks: Sequence[ChunkStep]
    published: "Future[Any]"


class _Begun(NamedTuple):
    """A staged chunk that has begun and that the step lane has not taken."""

    num_moves: int
    """Moves of the queue until then."""
    place: Place
    step: StagedStep


class _Waiting(Generic[AnyStep]):
    """Waiting chunks of one lane by place. A chunk that has moved or begun leaves an old entry behind."""

    def __init__(self) -> None:
        self._heap: list[tuple[Place, AnyStep]] = []
        self._places: dict[AnyStep, Place] = {}

    def put(self, place: Place, step: AnyStep) -> None:
        """At this place from now on."""
        self._places[step] = place
        heapq.heappush(self._heap, (place, step))

    def first(self) -> tuple[Place, AnyStep] | None:
        """The entry with the smallest place; None where nothing waits."""
        while self._heap:
            place, step = self._heap[0]
            if step.state is StepState.WAITING and self._places[step] == place:
                return place, step
            heapq.heappop(self._heap)
        return None


class StepQueue:
    """What is left of one step, in the order in which it will be done."""

    def __init__(self, partitions: Sequence[PartitionStep]) -> None:
        self._lock = threading.Lock()
        self._partitions = {partition.pid: partition for partition in partitions}
        self._positions = dict(zip(self._partitions, accumulate(map(_num_chunks, partitions), initial=0), strict=False))
        """Of the first chunk of every partition, in the order of submission."""
        self._num_left = {partition.pid: len(partition.chunks) for partition in partitions}
        """Chunks that the step lane has not taken."""
        self._num_moves = 0
        self._steps: _Waiting[ChunkStep] = _Waiting()
        self._reads: _Waiting[StagedStep] = _Waiting()
        self._begun: deque[_Begun] = deque()
        """In the order in which their staging buffers are acquired."""
        self._begun_reads: deque[StagedStep] = deque()
        """Begun, yet the read lane has something to read for them: it takes these first."""
        self._publications = deque(partition for partition in partitions if not partition.chunks)
        """Of partitions of which the step lane has taken every chunk."""
        self._num_units = len(partitions) + sum(self._num_left.values())
        """Chunks and publications that the step lane has not taken."""
        for position, step in enumerate(step for partition in partitions for step in partition.chunks):
            place = (0, DIRECT, position)
            if step.state is StepState.WAITING:
                self._put(place, step)
            elif isinstance(step, StagedStep):
                self._begun.append(_Begun(0, place, step))
                if step.is_to_read:
                    self._begun_reads.append(step)

    def _put(self, place: Place, step: ChunkStep) -> None:
        self._steps.put(place, step)
        if isinstance(step, StagedStep):
            self._reads.put(place, step)

    def covers(self, pid: int) -> bool:
        """The step has this partition."""
        return pid in self._partitions

    @property
    def is_over(self) -> bool:
        """The step lane has taken everything."""
        return self._num_units == 0

    def prioritize(self, pid: int) -> None:
        """Move what has not begun of a partition to the front of all that has not begun. See Note [Front]."""
        if pid not in self._partitions:
            return
        with self._lock:
            self._num_moves += 1
            for position, step in enumerate(self._partitions[pid].chunks, self._positions[pid]):
                if step.state is StepState.WAITING:
                    section = STAGED if isinstance(step, StagedStep) else DIRECT
                    self._put((-self._num_moves, section, position), step)

    def take_read(self) -> StagedStep:
        """What the read lane does next."""
        with self._lock:
            if self._begun_reads:
                return self._begun_reads.popleft()
            entry = self._reads.first()
            if entry is None:
                raise InternalError("the lane `step read` has more turns than there are chunks to read.")
            place, step = entry
            step.move(StepState.BEGUN)
            self._begun.append(_Begun(self._num_moves, place, step))
            return step

    def take_step(self) -> ChunkStep | PartitionStep:
        """What the step lane does next: the step of a chunk, or the publication of a partition."""
        with self._lock:
            self._num_units -= 1
            if self._publications:
                return self._publications.popleft()
            step = self._next_chunk()
            pid = step.chunk.pid
            self._num_left[pid] -= 1
            if not self._num_left[pid]:
                self._publications.append(self._partitions[pid])
            return step

    def _next_chunk(self) -> ChunkStep:
        waiting = self._steps.first()
        if self._begun and (waiting is None or self._place_of(self._begun[0]) < waiting[0]):
            step: ChunkStep = self._begun.popleft().step
        elif waiting is not None:
            step = waiting[1]
            if isinstance(step, StagedStep):
                self._begun_reads.append(step)  # the step lane waits for it: no other may be read before
        else:
            raise InternalError("the lane `step` has more turns than there are chunks and publications.")
        step.move(StepState.STEPPING)
        return step

    def _place_of(self, begun: _Begun) -> Place:
        is_older = begun.num_moves < self._num_moves
        return (-self._num_moves, BEGUN, 0) if is_older else begun.place


def _num_chunks(partition: PartitionStep) -> int:
    return len(partition.chunks)
