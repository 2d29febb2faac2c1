"""Vector clocks: which accesses are ordered by an event, whatever the timing was.

Owns: what every lane has seen of every other, and the latest accesses to every byte.
Does not: run anything (turns.py).

Two accesses to the same bytes from different lanes, one of them a write, must be ordered: the later lane must have seen
the earlier access, by a chain of submissions and waits (Lamport 1978; Mattern 1989; the detector is that of Pozniansky
and Schuster 2003). The order they happened to run in does not matter.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

Clock = dict[str, int]


class RaceFound(AssertionError):
    """Two conflicting accesses without an event between them."""


class _Access(NamedTuple):
    start: int
    stop: int
    lane: str
    time: int
    is_write: bool


class Clocks:
    """The clocks of all lanes. Only one thread runs at a time: there is nothing to lock."""

    def __init__(self) -> None:
        self._clocks: dict[str, Clock] = {}
        self._accesses: dict[Any, list[_Access]] = {}
        self.num_checked = 0

    def snapshot(self, lane: str) -> Clock:
        """What `lane` has seen and done so far; what it does next is later."""
        clock = self._clock(lane)
        taken = dict(clock)
        clock[lane] += 1
        return taken

    def join(self, lane: str, seen: Clock | None) -> None:
        """`lane` comes after all of `seen`."""
        clock = self._clock(lane)
        for other, time in (seen or {}).items():
            clock[other] = max(clock.get(other, 0), time)

    def merged(self, clocks: Sequence[Clock | None]) -> Clock:
        """After all of these."""
        merged: Clock = {}
        for clock in clocks:
            for lane, time in (clock or {}).items():
                merged[lane] = max(merged.get(lane, 0), time)
        return merged

    def access(self, lane: str, place: Any, *, is_write: bool) -> None:
        """`lane` touches a tensor, or a place on disk ("disk", file, offset, bytes). Raises RaceFound."""
        space, start, stop = _range(place)
        if start == stop:
            return
        clock = self._clock(lane)
        kept = []
        for before in self._accesses.get(space, []):
            overlaps = before.start < stop and start < before.stop
            if overlaps and before.lane != lane and (is_write or before.is_write):
                self.num_checked += 1
                if clock.get(before.lane, 0) < before.time:
                    what = {True: "writes", False: "reads"}
                    raise RaceFound(
                        f"{lane!r} {what[is_write]} [{start}, {stop}) of {space!r}, which {before.lane!r} "
                        f"{what[before.is_write]} [{before.start}, {before.stop}), and no event orders the two"
                    )
            covered = start <= before.start and before.stop <= stop
            if not (covered and (is_write or (before.lane == lane and not before.is_write))):
                kept.append(before)
        kept.append(_Access(start, stop, lane, clock[lane], is_write))
        self._accesses[space] = kept

    def _clock(self, lane: str) -> Clock:
        return self._clocks.setdefault(lane, {lane: 1})


def _range(place: Any) -> tuple[Any, int, int]:
    if isinstance(place, tuple):
        kind, file, offset, num_bytes = place
        return (kind, file), offset, offset + num_bytes
    start = place.data_ptr()
    return "memory", start, start + (place.numel() * place.element_size() if start else 0)
