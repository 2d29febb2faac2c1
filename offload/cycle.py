"""The predicted order of use, and fast look-ups in it.

Owns: `Cycle` (an order of use and the place reached in it), `NeededLast` (the partition whose next use is farthest).
Does not: record, or decide what to fetch and revoke (schedule.py).
Threads: the training thread alone. Pure.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from typing import Final

COMPACT_FACTOR: Final = 4
"""A heap with more outdated entries than this times the valid ones is rebuilt: bounded memory, constant mean cost."""


class NeededLast:
    """A set of partitions that knows the one whose next use is farthest; of two equally far, the greater id."""

    def __init__(self) -> None:
        self._uses: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []

    def uses(self) -> dict[int, int]:
        """The next use of each partition in the set."""
        return dict(self._uses)

    def add(self, pid: int, next_use: int) -> None:
        self._uses[pid] = next_use
        heappush(self._heap, (-next_use, -pid))
        if len(self._heap) > COMPACT_FACTOR * (len(self._uses) + COMPACT_FACTOR):
            self._compact()

    def remove(self, pid: int) -> None:
        del self._uses[pid]

    def last(self) -> tuple[int, int] | None:
        """(next use, pid) of the partition needed last, or None where the set is empty."""
        while self._heap:
            use, pid = -self._heap[0][0], -self._heap[0][1]
            if self._uses.get(pid) == use:
                return use, pid
            heappop(self._heap)  # was removed, or came back with another next use
        return None

    def renew(self, next_use: Callable[[int], int]) -> None:
        """The cursor jumped: look up every next use again."""
        self._uses = {pid: next_use(pid) for pid in self._uses}
        self._compact()

    def _compact(self) -> None:
        self._heap = [(-use, -pid) for pid, use in self._uses.items()]
        heapify(self._heap)


class Cycle:
    """The predicted order of use, and where in it the training thread is."""

    def __init__(self, order: Iterable[int] = ()) -> None:
        self.order = tuple(order)
        self.cursor = 0  # position of the next predicted acquisition; at the end nothing is predicted
        self._positions: dict[int, list[int]] = {}
        for position, pid in enumerate(self.order):
            self._positions.setdefault(pid, []).append(position)

    def predicted(self) -> int | None:
        """The partition that should be acquired next."""
        return self.order[self.cursor] if self.cursor < len(self.order) else None

    def next_use(self, pid: int) -> int:
        """Position of the next use; beyond the end of the cycle where that is in the next one, or unknown."""
        length = len(self.order)
        positions = self._positions.get(pid)
        if positions is None:
            return 2 * length
        index = bisect_left(positions, self.cursor)
        return positions[index] if index < len(positions) else length + positions[0]

    def find(self, previous: int | None, pid: int) -> int | None:
        """Where `pid` is used next: right after `previous` where there is such a place, forward from the cursor first.

        The pair tells a turn from a second forward pass, which the partition alone does not.
        """
        positions = self._positions.get(pid)
        if positions is None:
            return None
        start = bisect_left(positions, self.cursor)
        candidates = positions[start:] + positions[:start]
        for position in candidates:
            if position > 0 and self.order[position - 1] == previous:
                return position
        return candidates[0]
