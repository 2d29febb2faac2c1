"""The recorded order of use, and the prediction made from it.

Owns: what was acquired in which order in one cycle, and where in the order before the training thread is now.
Does not: decide what to fetch or keep (schedule.py).
Threads: the training thread alone. Pure.
"""

from bisect import bisect_left
from collections.abc import Iterable


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


class Pass:
    """One kind of use, training or evaluation: what is predicted of it, and what it has done so far."""

    def __init__(self) -> None:
        self.cycle = Cycle()
        self.walked = 0  # positions of the cycle before this one need no fetch
        self.recorded: list[int] = []
        self.previous: int | None = None

    def restart(self) -> None:
        """A cycle is over: what was recorded is the prediction for the next."""
        if self.recorded:  # two steps in a row tell nothing about the next cycle
            self.cycle = Cycle(self.recorded)
            self.recorded = []
        self.cycle.cursor = 0
        self.walked = 0
        self.previous = None
