"""Ranges of entries: do they cover a state tensor, and which of them make up another range.

Owns: the arithmetic of resharding. Pure.
Does not: know items or files.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Overlap:
    """What one stored range gives to a wanted one."""

    index: int
    """Which stored range."""
    start_in_stored: int
    start_in_wanted: int
    numel: int


def first_flaw(starts: Sequence[int], stops: Sequence[int], length: int) -> str | None:
    """None where [starts[i], stops[i]), sorted by start, cover [0, length) exactly once; else what is wrong."""
    at = 0
    for start, stop in zip(starts, stops, strict=True):
        if start > at:
            return f"entries {at} to {start} are in no chunk"
        if start < at:
            return f"entries {start} to {min(at, stop)} are in two chunks"
        at = stop
    if at < length:
        return f"entries {at} to {length} are in no chunk"
    return f"entries {length} to {at} are past its end" if at > length else None


def overlaps(starts: Sequence[int], stops: Sequence[int], start: int, stop: int) -> Iterator[Overlap]:
    """The stored ranges (sorted, without gaps) that [start, stop) is made of, in order."""
    index = max(bisect_right(starts, start) - 1, 0)
    while index < len(starts) and starts[index] < stop:
        first, last = max(starts[index], start), min(stops[index], stop)
        if first < last:
            yield Overlap(index, first - starts[index], first - start, last - first)
        index += 1
