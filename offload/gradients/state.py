"""What there is of every gradient of the current step: the states and the moves between them.

Owns: the state of each trainable parameter's gradient.
Does not: hold or move gradients (slots.py, offload.py), or decide when one is offloaded (reduction.py).
Threads: autograd's own thread during backward, else the training thread; never two at once. Pure: a function of the
calls so far, never of timing.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import StrEnum
from typing import Final

from offload.errors import InternalError

HISTORY_LENGTH: Final = 12
"""Moves of a partition's gradients that are kept for the message of IllegalGradientMove."""


class GradientState(StrEnum):
    """Of one parameter, as the training thread sees it: `stored` also while it is on its way to its home."""

    EMPTY = "empty"
    """No gradient of this step."""
    FILLING = "filling"
    """In a slot, or about to be copied to one; the home holds nothing of this step."""
    REDUCING = "reducing"
    """Averaged with those of the other ranks; whether any rank has one is not agreed on yet."""
    STORED = "stored"
    ADDING = "adding"
    """Stored, and another contribution is in a slot."""
    CONSUMED = "consumed"
    """Stored, and a step in backward has taken it: no contribution may come before `step()`."""


LEGAL: Final[Mapping[GradientState, frozenset[GradientState]]] = {
    GradientState.EMPTY: frozenset({GradientState.FILLING, GradientState.REDUCING}),
    GradientState.FILLING: frozenset({GradientState.STORED, GradientState.REDUCING}),
    GradientState.REDUCING: frozenset({GradientState.STORED, GradientState.EMPTY, GradientState.ADDING}),
    GradientState.STORED: frozenset({GradientState.ADDING, GradientState.CONSUMED, GradientState.EMPTY}),
    GradientState.ADDING: frozenset({GradientState.STORED}),
    GradientState.CONSUMED: frozenset({GradientState.STORED, GradientState.EMPTY}),
}

IN_SLOT: Final = frozenset({GradientState.FILLING, GradientState.ADDING})
IN_HOME: Final = frozenset({GradientState.STORED, GradientState.ADDING, GradientState.CONSUMED})

IN_REDUCTION: Final = frozenset({GradientState.REDUCING})

AFTER_ARRIVAL: Final[Mapping[GradientState, GradientState]] = {
    state: GradientState.FILLING if state is GradientState.EMPTY else GradientState.ADDING for state in GradientState
}


class IllegalGradientMove(InternalError):
    """A gradient was asked to do what its state does not allow."""


class _Row:
    """The gradients of one partition, by position of their parameters."""

    __slots__ = ("filling", "history", "positions", "reducing", "states", "stored")

    def __init__(self, num_entries: int) -> None:
        self.states = [GradientState.EMPTY] * num_entries
        self.filling: set[int] = set()
        self.stored: set[int] = set()
        self.reducing: set[int] = set()
        self.positions = ((self.filling, IN_SLOT), (self.stored, IN_HOME), (self.reducing, IN_REDUCTION))
        """The positions in some of the states: asked for at every gradient."""
        self.history: deque[tuple[tuple[int, ...], GradientState, str]] = deque(maxlen=HISTORY_LENGTH)


class GradientTable:
    """The state of every gradient, by partition and position in it. `num_entries`: parameters of each partition."""

    def __init__(self, num_entries: Sequence[int]) -> None:
        self._rows = [_Row(count) for count in num_entries]
        self._consumed: set[int] = set()
        """Partitions that a step in backward has taken."""

    # ------------------------------------------------------------------------------------------- what is known

    def state(self, pid: int, position: int) -> GradientState:
        """Of one gradient."""
        return self._rows[pid].states[position]

    def stored(self, pid: int) -> AbstractSet[int]:
        """Parameters with a gradient of this step in its home, or on its way there. A view that changes."""
        return self._rows[pid].stored

    def filling(self, pid: int) -> AbstractSet[int]:
        """Parameters with a contribution in a slot, or about to be copied to one. A view that changes."""
        return self._rows[pid].filling

    def is_filled(self, pid: int) -> bool:
        """Every parameter of the partition has a contribution in its slot."""
        row = self._rows[pid]
        return len(row.filling) == len(row.states)

    # --------------------------------------------------------------------------------------------------- moves

    def arrive(self, pid: int, position: int) -> None:
        """A contribution goes to a slot, in which this parameter has none yet."""
        row = self._rows[pid]
        new = AFTER_ARRIVAL[row.states[position]]
        if new not in LEGAL[row.states[position]] or row.states[position] is GradientState.REDUCING:
            self._move(pid, (position,), new, "arrive")
            return
        # The move of every gradient of every backward: into one more set, and out of none.
        row.states[position] = new
        row.filling.add(position)
        row.history.append(((position,), new, "arrive"))

    def store(self, pid: int) -> tuple[set[int], set[int]]:
        """What fills a slot is offloaded: these parameters, and those that were stored before."""
        row = self._rows[pid]
        arrived, stored = set(row.filling), set(row.stored)
        for position in arrived:  # all are filling or adding, which may become stored
            row.states[position] = GradientState.STORED
        row.filling.clear()
        row.stored |= arrived
        row.history.append((tuple(arrived), GradientState.STORED, "store"))
        return arrived, stored

    def reduce(self, pid: int) -> None:
        """The whole partition is averaged with the other ranks', zeros where this rank has no gradient."""
        row = self._rows[pid]
        self._move(pid, row.filling & row.stored, GradientState.STORED, "reduce")
        others = set(range(len(row.states))) - row.stored - row.reducing
        self._move(pid, others, GradientState.REDUCING, "reduce")

    def agree(self, united: Mapping[int, Collection[int]]) -> None:
        """The ranks have agreed: of what was averaged, these parameters (by partition) have a gradient on some rank."""
        for pid, row in enumerate(self._rows):
            found = row.reducing.intersection(united.get(pid, ()))
            self._move(pid, found, GradientState.STORED, "agree")
            self._move(pid, set(row.reducing), GradientState.EMPTY, "agree")

    def drop(self, pid: int, positions: Collection[int]) -> None:
        """The user has dropped stored gradients: the next ones overwrite them."""
        self._move(pid, positions, GradientState.EMPTY, "drop")

    def consume(self, pid: int) -> None:
        """A step in backward has taken what is stored of a partition."""
        self._consumed.add(pid)
        self._move(pid, set(self._rows[pid].stored), GradientState.CONSUMED, "consume")

    def reopen(self) -> None:
        """`step()` has taken over the steps in backward: contributions may come again."""
        while self._consumed:
            pid = self._consumed.pop()
            consumed = [p for p, state in enumerate(self._rows[pid].states) if state is GradientState.CONSUMED]
            self._move(pid, consumed, GradientState.STORED, "reopen")

    def _move(self, pid: int, positions: Collection[int], new: GradientState, why: str) -> None:
        if not positions:
            return
        row = self._rows[pid]
        for position in positions:
            if new not in LEGAL[row.states[position]]:
                raise self._illegal(pid, position, new, why)
        for position in positions:
            row.states[position] = new
        row.history.append((tuple(positions), new, why))
        for members, states in row.positions:
            if new in states:
                members.update(positions)
            else:
                members.difference_update(positions)

    def _illegal(self, pid: int, position: int, new: GradientState, why: str) -> IllegalGradientMove:
        row = self._rows[pid]
        story = ", ".join(f"{sorted(positions)} to {state} ({w})" for positions, state, w in row.history) or "none"
        return IllegalGradientMove(
            f"the gradient of parameter {position} of partition {pid} is {row.states[position]} and was asked to "
            f"become {new} ({why}). Latest moves in its partition, by parameters: {story}."
        )
