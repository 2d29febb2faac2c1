"""Every wait in offload/ is switched off in turn, and a run shows it: other bits, an error, or a race.

The table names, for each wait, the run and the lane that has to be slow for its absence to show. A wait that is not in
the table, or whose absence nothing shows, fails here. To print the table: `pytest tests/mutation --co -q`.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from offload.errors import OffloadError
from tests.doubles.clocks import Clocks
from tests.doubles.turns import TurnLanes, eager, slow
from tests.mutation.sites import find_sites
from tests.races.scenarios import Scenario, run

ON_DISK = Scenario(home="all on disk")
STATE_ON_DISK = Scenario(home="state on disk")
STREAM = Scenario(device="stream")
ACCUMULATING = Scenario(home="all on disk", accumulate=3, micro_batches=3, buffers=8)
READING = Scenario(home="state on disk", device="stream", reads=True)
DEVICE_WEIGHTS = Scenario(
    home="weights on device, state on disk",
    device="stream",
    own_gradients=True,
    evaluates=True,
    accumulate=1,
    buffers=8,
)
TWO_STEPS = Scenario(own_gradients=True, accumulate=1)
TWO_DISK_STEPS = Scenario(
    home="all on disk", device="stream", own_gradients=True, evaluates=True, accumulate=1, buffers=8
)
TWO_STATE_STEPS = Scenario(home="state on disk", own_gradients=True, accumulate=1, buffers=8)
DEVICE_STATE = Scenario(home="all on device", device="stream", own_gradients=True, evaluates=True, accumulate=1)
AHEAD_IN_VAIN = Scenario(home="state on disk", edits=True)
EVALUATING = Scenario(device="stream", evaluates=True)
DROPPING = Scenario(precision="fp32", accumulate=3, micro_batches=3, drops=True)
RANKS = Scenario(device="stream", ranks=True)
RANKS_TWO_STEPS = Scenario(device="stream", ranks=True, own_gradients=True, accumulate=1)

TABLE: dict[str, tuple[Scenario, str]] = {
    "device/host.py after any reason": (Scenario(), "h2d"),
    "ranks/exchange.py _average GRADIENT_READY": (RANKS, "collective"),
    "ranks/exchange.py _gather FETCH_ISSUED": (RANKS, "collective"),
    "ranks/exchange.py _gather SHARD_ARRIVED": (RANKS, "collective"),
    "storage/homes.py read EXTENT_WRITTEN": (TWO_STATE_STEPS, "write"),
    "storage/homes.py read_published PUBLISHED": (ON_DISK, "step"),
    "storage/homes.py write EXTENT_WRITTEN": (replace(TWO_DISK_STEPS, precision="fp32"), "read"),
    "storage/homes.py _hand_over PLACE_FREE": (ON_DISK, "step"),
    "storage/walk.py _opened READ": (READING, "read"),
    "gradients/offload.py wait_stored OFFLOADED": (READING, "gradient store"),
    "gradients/offload.py _wait_consumed GRADIENT_CONSUMED": (TWO_STEPS, "step"),
    "gradients/offload.py _issue_direct OFFLOADED": (DROPPING, "gradient store"),
    "gradients/offload.py _after_ready GRADIENT_READY": (STREAM, "stream"),
    "gradients/offload.py _issue_on_device GRADIENT_CONSUMED": (DEVICE_STATE, "h2d"),
    "gradients/offload.py _issued COPY_ISSUED": (STREAM, "d2h issue"),
    "gradients/offload.py _wait_on_host GRADIENT_ON_HOST": (STREAM, "d2h"),
    "gradients/offload.py _reached AVERAGE_ISSUED": (RANKS, "collective"),
    "gradients/offload.py _store_staged READ": (ACCUMULATING, "read"),
    "memory/ring.py acquire BUFFER_RELEASED": (STATE_ON_DISK, "step"),
    "memory/ring.py acquire BUFFER_FREE": (STATE_ON_DISK, "write"),
    "memory/ring.py acquire BUFFER_FREE 2": (STREAM, "d2h"),
    "optimizer/device_step.py step SLOT_RELEASED": (DEVICE_STATE, "stream"),
    "optimizer/decision.py _decision STEP_DONE": (READING, "step"),
    "optimizer/decision.py decide OFFLOADED": (ACCUMULATING, "gradient store"),
    "optimizer/state_reads.py drop AHEAD_DROPPED": (AHEAD_IN_VAIN, "step read"),
    "optimizer/state_reads.py read OFFLOADED": (ACCUMULATING, "gradient store"),
    "optimizer/state_reads.py _read_state STEP_DONE": (TWO_STATE_STEPS, "step"),
    "optimizer/state_reads.py _release STATE_READ": (AHEAD_IN_VAIN, "read"),
    "optimizer/chunk_stepper.py _wait_staged READ_ISSUED": (STATE_ON_DISK, "step read"),
    "optimizer/chunk_stepper.py _wait_staged STATE_READ": (STATE_ON_DISK, "read"),
    "optimizer/chunk_stepper.py step WEIGHTS_READ": (TWO_DISK_STEPS, "fetch"),
    "optimizer/chunk_stepper.py step WEIGHTS_READ 2": (EVALUATING, "h2d"),
    "optimizer/chunk_stepper.py _write_behind SLOT_RELEASED": (DEVICE_WEIGHTS, "stream"),
    "session.py _wait_idle STEP_DONE": (READING, "step"),
    "session.py _wait_idle DRAIN": (Scenario(home="all on disk", reads=True, buffers=8), "fetch read"),
    "session.py _wait_idle DRAIN 2": (Scenario(home="weights on device", device="stream"), "h2d"),
    "storage/allocation.py wait_written DRAIN": (replace(STATE_ON_DISK, counts=True), "write"),
    "weights/fetch.py _weights_mark FETCH_ISSUED": (STREAM, "fetch"),
    "weights/fetch.py _weights_mark PUBLISHED": (Scenario(home="weights on device"), "step"),
    "weights/fetch.py _show WEIGHTS_ARRIVED": (STREAM, "h2d"),
    "weights/fetch.py _begin PUBLISHED": (STREAM, "step"),
    "weights/fetch.py _copy_staged READ_ISSUED": (ON_DISK, "fetch read"),
    "weights/fetch.py _copy_staged READ": (ON_DISK, "read"),
    "weights/fetch.py _reshard GATHER_ISSUED": (RANKS_TWO_STEPS, "collective"),
    "weights/fetch.py _reshard SLOT_GATHERED": (RANKS_TWO_STEPS, "collective"),
    "weights/fetch.py _reshard SLOT_RELEASED": (STREAM, "stream"),
}

SITES = {site.name: site for site in find_sites()}


def test_the_table_names_every_wait_and_no_other() -> None:
    assert sorted(TABLE) == sorted(SITES)


@pytest.mark.parametrize("name", TABLE)
def test_without_this_wait_a_run_shows_it(name: str, tmp_path: Path) -> None:
    scenario, lane = TABLE[name]
    place = SITES[name].place
    reference = TurnLanes(slow(lane))
    expected = run(reference, scenario, tmp_path)
    assert place in reference.sites_reached
    orders = [
        TurnLanes(slow(lane), skipped_sites=[place]),
        TurnLanes(eager, clocks=Clocks(), skipped_sites=[place]),
        TurnLanes(slow(lane), clocks=Clocks(), skipped_sites=[place]),
    ]
    assert any(shows(lanes, scenario, expected, tmp_path) for lanes in orders)


def shows(lanes: TurnLanes, scenario: Scenario, expected: object, folder: Path) -> bool:
    try:
        return run(lanes, scenario, folder) != expected
    except (RuntimeError, AssertionError, OffloadError):
        return True
