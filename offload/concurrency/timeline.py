"""What happened when: spans, waits, bytes and counters, by lane.

Owns: the record of a session's work, bounded in memory.
Does not: print or draw it (report/), or decide anything.
Threads: each lane is written by one thread at a time; counters and readers may be on any thread.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple

SPANS_PER_LANE: Final = 20_000
"""Newest spans kept per lane: some hundred steps of a large model in a few MiB."""


class Span(NamedTuple):
    """One piece of work, or one wait, on one lane. Times are `time.perf_counter()` seconds."""

    lane: str
    name: str
    start_s: float
    stop_s: float
    num_bytes: int
    is_wait: bool


@dataclass(slots=True)
class LaneTotals:
    """Sums over one lane since the last `restart`."""

    num_bytes: int = 0
    busy_s: float = 0.0
    wait_s: float = 0.0
    waits_by_reason_s: dict[str, float] = field(default_factory=dict)


Recorded = tuple[str, str, float, float, int, bool]
"""A span as it is kept: a plain tuple, which is made faster and which the garbage collector leaves alone."""


class _Record:
    """Of one lane."""

    __slots__ = ("spans", "totals")

    def __init__(self) -> None:
        self.spans: deque[Recorded] = deque(maxlen=SPANS_PER_LANE)
        self.totals = LaneTotals()


class Timeline:
    """Spans and totals of one session."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}
        self._counters: dict[str, int] = {}

    def restart(self) -> None:
        """Forget everything so far: called when training begins, so that filling the homes does not count."""
        self._records.clear()
        self._counters.clear()

    def add_work(self, lane: str, name: str, start_s: float, stop_s: float, num_bytes: int = 0) -> None:
        """Record work that ended now; `num_bytes` are the bytes it moved."""
        record = self._records.get(lane) or self._begin(lane)
        totals = record.totals
        totals.busy_s += stop_s - start_s
        totals.num_bytes += num_bytes
        record.spans.append((lane, name, start_s, stop_s, num_bytes, False))

    def add_wait(self, lane: str, reason: str, start_s: float, stop_s: float) -> None:
        """Record that `lane` stood still for `reason`."""
        record = self._records.get(lane) or self._begin(lane)
        totals = record.totals
        totals.wait_s += stop_s - start_s
        totals.waits_by_reason_s[reason] = totals.waits_by_reason_s.get(reason, 0.0) + stop_s - start_s
        record.spans.append((lane, reason, start_s, stop_s, 0, True))

    @contextmanager
    def work(self, lane: str, name: str, num_bytes: int = 0) -> Iterator[None]:
        """Record the body as work."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.add_work(lane, name, start_s, time.perf_counter(), num_bytes)

    def count(self, name: str, amount: int = 1) -> None:
        """Raise a named counter."""
        self._counters[name] = self._counters.get(name, 0) + amount

    def counter(self, name: str) -> int:
        """A named counter; 0 where nothing was counted."""
        return self._counters.get(name, 0)

    def totals(self) -> dict[str, LaneTotals]:
        """Totals by lane, as they are now."""
        return {lane: record.totals for lane, record in list(self._records.items())}

    def spans(self, lane: str | None = None) -> list[Span]:
        """The newest spans of one lane, or of all lanes by start time."""
        if lane is not None:
            record = self._records.get(lane)
            return [] if record is None else [Span._make(span) for span in list(record.spans)]
        spans = [Span._make(span) for record in list(self._records.values()) for span in list(record.spans)]
        return sorted(spans, key=lambda span: span.start_s)

    def _begin(self, lane: str) -> _Record:
        return self._records.setdefault(lane, _Record())
