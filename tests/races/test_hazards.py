"""The hazards of offloading: with its guard off, each gives other bits in a late order and is a race to the clocks."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from offload.errors import InternalError, OffloadError
from offload.weights.schedule import Schedule
from tests.doubles.clocks import Clocks, RaceFound
from tests.doubles.lane_queue import LaneQueue
from tests.doubles.late import LateLanes
from tests.doubles.turns import TurnLanes, eager, shuffled, slow
from tests.mutation.sites import find_sites
from tests.races.scenarios import BUDGETS, Outcome, Scenario, run, threads

HOMES = [home for precision, home in BUDGETS if precision == "bf16"]


def outcome_of(lanes: Any, scenario: Scenario, folder: Path) -> Outcome | BaseException:
    try:
        return run(lanes, scenario, folder)
    except (RuntimeError, OffloadError, AssertionError) as error:
        return error


@pytest.mark.parametrize(
    ("device", "what"),
    [
        *([("host", {"accumulate": 3, "micro_batches": 3, "reads": True})] if os.environ.get("OFFLOAD_STRESS") else []),
        ("stream", {"accumulate": 3, "micro_batches": 3}),
        ("stream", {"accumulate": 1, "own_gradients": True, "evaluates": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("home", HOMES)
def test_every_legal_order_gives_the_bits_of_threads(home: str, device: str, what: Any, tmp_path: Path) -> None:
    scenario = Scenario(home=home, device=device, **what)
    expected = run(threads(), scenario, tmp_path)
    orders: dict[str, Callable[[], Any]] = {
        "late": LateLanes,
        "slow compute": lambda: TurnLanes(slow("stream")),
        "shuffled 1": lambda: TurnLanes(shuffled(1), clocks=Clocks()),
        "checked": lambda: TurnLanes(eager, clocks=Clocks()),
    }
    if os.environ.get("OFFLOAD_STRESS"):
        orders |= {f"shuffled {n}": partial(TurnLanes, shuffled(n), clocks=Clocks()) for n in range(2, 8)}
    for name, lanes in orders.items():
        assert run(lanes(), scenario, tmp_path) == expected, name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("home", ["host", "state on disk", "all on disk"])
def test_fp32_has_the_same_bits_in_every_order(home: str, tmp_path: Path) -> None:
    scenario = Scenario(home=home, precision="fp32")
    expected = run(threads(), scenario, tmp_path)
    assert run(LateLanes(), scenario, tmp_path) == expected
    assert run(TurnLanes(shuffled(7), clocks=Clocks()), scenario, tmp_path) == expected


@dataclass(frozen=True)
class Hazard:
    """A wait, the lane that must be slow for its absence to give other bits, and the run that shows it."""

    site: str
    slow: str
    scenario: Scenario


HAZARDS = {
    "a slot is reused while compute still reads it": Hazard(
        "weights/fetch.py _reshard SLOT_RELEASED", "stream", Scenario(device="stream")
    ),
    "a staging buffer is reused while a transfer uses it": Hazard(
        "memory/ring.py acquire BUFFER_FREE", "write", Scenario(home="state on disk")
    ),
    "a gradient slot is filled again while it is copied": Hazard(
        "memory/ring.py acquire BUFFER_FREE 2", "d2h", Scenario(device="stream")
    ),
    "the host reads a gradient before it offloaded": Hazard(
        "gradients/offload.py _wait_on_host GRADIENT_ON_HOST", "d2h", Scenario(device="stream")
    ),
    "a fetch comes before the weights are published": Hazard(
        "weights/fetch.py _begin PUBLISHED", "step", Scenario(device="stream")
    ),
    "state is read again before it was written": Hazard(
        "storage/homes.py read EXTENT_WRITTEN",
        "write",
        Scenario(home="state on disk", own_gradients=True, accumulate=1, buffers=8),
    ),
    "a gradient buffer is reused while its step is pending": Hazard(
        "gradients/offload.py _wait_consumed GRADIENT_CONSUMED", "step", Scenario(own_gradients=True, accumulate=1)
    ),
    "host weights are overwritten while a copy reads them": Hazard(
        "optimizer/chunk_stepper.py step WEIGHTS_READ 2", "h2d", Scenario(device="stream", evaluates=True)
    ),
}


@pytest.mark.parametrize("hazard", HAZARDS)
def test_without_its_wait_a_hazard_gives_other_bits_late_and_is_found_by_the_clocks(
    hazard: str, tmp_path: Path
) -> None:
    case = HAZARDS[hazard]
    place = next(site.place for site in find_sites() if site.name == case.site)
    expected = run(TurnLanes(eager), case.scenario, tmp_path)
    late = outcome_of(TurnLanes(slow(case.slow), skipped_sites=[place]), case.scenario, tmp_path)
    assert not isinstance(late, BaseException)
    assert late != expected
    orders = [eager, slow(case.slow)]
    found = [
        outcome_of(TurnLanes(order, clocks=Clocks(), skipped_sites=[place]), case.scenario, tmp_path)
        for order in orders
    ]
    assert any(race_behind(outcome) for outcome in found), found


def race_behind(outcome: Any) -> bool:
    error = outcome if isinstance(outcome, BaseException) else None
    while error is not None and not isinstance(error, RaceFound):
        error = error.__cause__ or error.__context__
    return error is not None


# ------------------------------------------------------------- hazards that a count, a check or an order guards


def test_a_slot_from_before_a_step_is_never_accepted_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resharding = Schedule.step
    monkeypatch.setattr(Schedule, "step", lambda self, covered: resharding(self, ()))  # keeps every slot
    for lanes in (LateLanes(), TurnLanes(eager, clocks=Clocks())):
        outcome = outcome_of(lanes, Scenario(device="stream"), tmp_path)
        assert isinstance(outcome, InternalError)
        assert "from before a step" in str(outcome)


@pytest.mark.parametrize("device", ["host", "stream"])
def test_a_release_while_recomputing_frees_nothing_that_the_backward_still_needs(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = Scenario(device=device, checkpointing=True)
    expected = run(threads(), scenario, tmp_path)
    orders: list[Callable[[], Any]] = [lambda: TurnLanes(slow("stream")), lambda: TurnLanes(eager, clocks=Clocks())]
    for lanes in orders:
        assert run(lanes(), scenario, tmp_path) == expected
    counted = Schedule.release

    def uncounted(self: Schedule, pid: int) -> Any:
        self._entries[pid].count = 1  # as if the recomputation's use were the only one
        return counted(self, pid)

    monkeypatch.setattr(Schedule, "release", uncounted)
    for lanes in orders:
        assert outcome_of(lanes(), scenario, tmp_path) != expected


def test_closing_waits_for_transfers_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = Scenario(home="all on disk", buffers=8)
    run(TurnLanes(slow("write")), scenario, tmp_path)
    ending = TurnLanes.close
    for lanes in (TurnLanes(slow("write")), TurnLanes(slow("write"), clocks=Clocks())):
        monkeypatch.setattr(TurnLanes, "close", lambda self: None)
        monkeypatch.setattr(LaneQueue, "close", lambda self: None)
        outcome = outcome_of(lanes, scenario, tmp_path)
        ending(lanes)
        assert isinstance(outcome, InternalError)
        assert "views of it are alive" in str(outcome)
