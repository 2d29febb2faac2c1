"""How much of every lane's work hides behind compute.

Owns: which lane each wait is for, and the shares made of a timeline.
Does not: record spans (timeline.py), or draw them (report/).
Threads: any; of lanes at work the newest span may be missing.

Note [Blame]: the training thread waits for the fetch lane, which waits for the step lane, which waits for a read: the
read is what a faster machine would need to have faster. So a wait is followed through the waits of the lanes that it is
for, moment by moment, to the lane that did not wait itself.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from offload.concurrency.lanes import TRAINING_LANE, Reason
from offload.concurrency.timeline import Span

Interval = tuple[float, float]

WAITED_FOR: Final[Mapping[Reason, str]] = {
    Reason.WEIGHTS_ARRIVED: "h2d",
    Reason.FETCH_ISSUED: "fetch",
    Reason.COPY_ISSUED: "d2h issue",
    Reason.GATHER_ISSUED: "collective issue",
    Reason.SHARD_ARRIVED: "h2d",
    Reason.SLOT_GATHERED: "collective",
    Reason.AVERAGE_ISSUED: "collective issue",
    Reason.PLACE_FREE: "fetch read",
    Reason.AHEAD_DROPPED: "step read",
    Reason.READ_ISSUED: "fetch read",
    Reason.PUBLISHED: "step",
    Reason.SLOT_RELEASED: TRAINING_LANE,
    Reason.BUFFER_RELEASED: "d2h issue",
    Reason.BUFFER_FREE: "d2h",
    Reason.READ: "read",
    Reason.EXTENT_WRITTEN: "write",
    Reason.GRADIENT_READY: TRAINING_LANE,
    Reason.GRADIENT_ON_HOST: "d2h",
    Reason.GRADIENT_CONSUMED: "step",
    Reason.OFFLOADED: "gradient store",
    Reason.WEIGHTS_READ: "h2d",
    Reason.STATE_READ: "read",
    Reason.STEP_DONE: "step",
    Reason.DRAIN: "drain",
}
"""The lane that ends a wait, by its reason."""

WAITED_FOR_BY: Final[Mapping[tuple[str, Reason], str]] = {
    ("step", Reason.READ_ISSUED): "step read",
    ("d2h issue", Reason.BUFFER_RELEASED): "gradient store",
    ("step read", Reason.BUFFER_RELEASED): "step",
    ("fetch read", Reason.BUFFER_RELEASED): "fetch",
    ("d2h issue", Reason.BUFFER_FREE): "write",
    ("step read", Reason.BUFFER_FREE): "write",
    ("fetch read", Reason.BUFFER_FREE): "h2d",
}
"""The same where it depends on who waits: every ring has its own users."""


@dataclass(frozen=True, slots=True)
class Share:
    """One lane. Seconds."""

    busy_s: float
    """It worked."""
    exposed_s: float
    """Compute stood still for it (Note [Blame])."""
    overlapped_s: float
    """It worked while compute did not stand still for it."""


def shares(spans: Iterable[Span], compute: str = TRAINING_LANE) -> dict[str, Share]:
    """Shares by lane, of all that works or is waited for. Those of `compute` itself: what it did, nothing exposed."""
    work: dict[str, list[Interval]] = {}
    waits: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: span.start_s):
        if span.is_wait:
            waits.setdefault(span.lane, []).append(span)
        else:
            work.setdefault(span.lane, []).append((span.start_s, span.stop_s))
    blamed: dict[str, list[Interval]] = {}
    for wait in waits.get(compute, ()):
        for lane, interval in _blame(wait, (wait.start_s, wait.stop_s), waits, {compute}):
            blamed.setdefault(lane, []).append(interval)
    found = {}
    for lane in sorted(work.keys() | blamed.keys()):
        busy, exposed = joined(work.get(lane, ())), joined(blamed.get(lane, ()))
        hidden_s = seconds(busy) - seconds(common(busy, exposed))
        found[lane] = Share(seconds(busy), seconds(exposed), hidden_s)
    return found


def _blame(
    wait: Span, within: Interval, waits: Mapping[str, Sequence[Span]], seen: set[str]
) -> Iterator[tuple[str, Interval]]:
    """Which lane is to blame for which part of a wait; `seen` are the lanes on the way to here."""
    lane = waited_lane(wait.lane, wait.name)
    own = [] if lane in seen else waits.get(lane, ())
    begin_s, end_s = within
    for other in own:
        start_s, stop_s = max(other.start_s, begin_s), min(other.stop_s, end_s)
        if start_s < stop_s:
            if begin_s < start_s:
                yield lane, (begin_s, start_s)
            yield from _blame(other, (start_s, stop_s), waits, seen | {lane})
            begin_s = stop_s
    if begin_s < end_s:
        yield lane, (begin_s, end_s)


def waited_lane(lane: str, reason: str) -> str:
    """The lane for which `lane` waits with this reason; the reason itself where no lane is known to end such waits."""
    if reason not in list(Reason):
        return reason
    known = Reason(reason)
    return WAITED_FOR_BY.get((lane, known)) or WAITED_FOR.get(known, reason)


def joined(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in time, in order and without overlaps."""
    result: list[Interval] = []
    for start_s, stop_s in sorted(intervals):
        if result and start_s <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], stop_s))
        else:
            result.append((start_s, stop_s))
    return result


def common(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """Points in time that are in both; both are in order and without overlaps."""
    result, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        start_s, stop_s = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start_s < stop_s:
            result.append((start_s, stop_s))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return result


def seconds(intervals: Iterable[Interval]) -> float:
    """Their sum."""
    return sum(stop_s - start_s for start_s, stop_s in intervals)
