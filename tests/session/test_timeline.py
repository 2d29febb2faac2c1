"""A timeline: when it begins, whom a wait is blamed on, and what was hidden behind compute."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.concurrency.lanes import Lanes, Reason
from offload.concurrency.timeline import Span, Timeline
from offload.disk.transfer import REAL, OsFunctions
from offload.report.lane_shares import WAITED_FOR, Share, common, joined, seconds, shares
from tests.training.programs import running


def work(lane: str, start_s: float, stop_s: float) -> Span:
    return Span(lane, "work", start_s, stop_s, 0, is_wait=False)


def wait(lane: str, reason: Reason, start_s: float, stop_s: float) -> Span:
    return Span(lane, reason, start_s, stop_s, 0, is_wait=True)


def test_work_during_compute_is_hidden_and_work_that_compute_waits_for_is_not() -> None:
    found = shares(
        [
            work("compute", 0.0, 4.0),
            work("h2d", 1.0, 3.0),
            wait("compute", Reason.WEIGHTS_ARRIVED, 4.0, 6.0),
            work("h2d", 3.5, 6.0),
        ]
    )
    assert found["h2d"] == Share(busy_s=4.5, exposed_s=2.0, overlapped_s=2.5)
    assert found["compute"] == Share(busy_s=4.0, exposed_s=0.0, overlapped_s=4.0)


def test_a_wait_is_blamed_on_the_lane_that_does_not_wait_itself() -> None:
    # compute waits for the fetch lane; that waits for the step; the step waits for a read at first
    found = shares(
        [
            wait("compute", Reason.FETCH_ISSUED, 0.0, 10.0),
            wait("fetch", Reason.PUBLISHED, 1.0, 9.0),
            wait("step", Reason.STATE_READ, 1.0, 4.0),
            work("read", 0.0, 4.0),
            work("step", 4.0, 9.0),
        ]
    )
    assert {lane: share.exposed_s for lane, share in found.items()} == {"fetch": 2.0, "read": 3.0, "step": 5.0}
    assert found["read"].overlapped_s == 1.0
    assert found["step"].overlapped_s == 0.0


def test_a_reason_of_two_meanings_is_read_by_who_waits() -> None:
    found = shares(
        [
            wait("compute", Reason.BUFFER_RELEASED, 0.0, 4.0),
            wait("d2h issue", Reason.BUFFER_RELEASED, 1.0, 3.0),
            work("gradient store", 0.0, 4.0),
        ]
    )
    assert found["d2h issue"].exposed_s == 2.0
    assert found["gradient store"] == Share(busy_s=4.0, exposed_s=2.0, overlapped_s=2.0)


def test_lanes_that_wait_for_each_other_by_turns_do_not_recurse_for_ever() -> None:
    found = shares(
        [
            wait("compute", Reason.GRADIENT_CONSUMED, 0.0, 4.0),
            wait("step", Reason.OFFLOADED, 0.0, 4.0),
            wait("gradient store", Reason.GRADIENT_CONSUMED, 0.0, 4.0),
        ]
    )
    assert sum(share.exposed_s for share in found.values()) == 4.0


def test_every_reason_names_the_lane_that_ends_it() -> None:
    assert WAITED_FOR.keys() == set(Reason), "tell in offload/shares.py which lane ends a wait with the new reason"


def test_a_timeline_that_recorded_the_spans_gives_the_same_shares() -> None:
    timeline = Timeline()
    timeline.add_work("compute", "forward", 0.0, 1.0)
    timeline.add_wait("compute", Reason.PUBLISHED, 1.0, 3.0)
    timeline.add_work("step", "kernel", 0.5, 3.0)
    assert shares(timeline.spans())["step"] == Share(busy_s=2.5, exposed_s=2.0, overlapped_s=0.5)


@given(st.integers(0, 2**32))
def test_what_compute_waited_is_blamed_exactly_once(seed: int) -> None:
    draw = random.Random(seed)
    lanes = ["compute", "fetch", "step", "gradient store", "h2d", "d2h issue"]
    spans = []
    for lane in lanes:
        border_s = 0.0
        for _ in range(8):
            start_s = border_s + draw.random()
            border_s = start_s + draw.random()
            spans.append(wait(lane, draw.choice(list(Reason)), start_s, border_s))
    blamed_s = sum(share.exposed_s for share in shares(spans).values())
    waited_s = sum(span.stop_s - span.start_s for span in spans if span.lane == "compute")
    assert blamed_s == pytest.approx(waited_s)


intervals = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted).map(tuple), max_size=8)


@given(intervals, intervals)
def test_common_parts_are_those_of_sets_of_points(one: list, other: list) -> None:
    def points(of: list) -> set[int]:
        return {point for start, stop in of for point in range(start, stop)}

    both = common(joined(one), joined(other))
    assert points(both) == points(one) & points(other)
    assert seconds(both) == len(points(one) & points(other))
    assert seconds(joined(one)) == len(points(one))


def test_writes_that_fill_the_homes_are_no_part_of_training(tmp_path: Path) -> None:
    def write_slowly(descriptor: int, views: Any, offset: int) -> int:
        time.sleep(0.05)  # still on their way when the session is made, unless it waits for them
        return REAL.pwritev(descriptor, views, offset)

    slow = OsFunctions(preadv=REAL.preadv, pwritev=write_slowly)
    with running(Lanes(Timeline()), "all on disk", tmp_path, os_functions=slow) as run:
        assert run.session.metrics()["bytes_moved"].get("write", 0) == 0
        run.train()
        assert run.session.metrics()["bytes_moved"]["write"] > 0
