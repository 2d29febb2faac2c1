"""Back-pressure of gradient slots: on an accelerator its stream waits for a slot, and the training thread for nothing
that the device does."""

from pathlib import Path

import pytest

from offload.concurrency.lanes import TRAINING_LANE, Reason
from tests.doubles.clocks import Clocks
from tests.doubles.late import LateLanes
from tests.doubles.turns import TurnLanes, slow
from tests.races.scenarios import Scenario, run

BLOCKS = 9
"""More than there are gradient slots: some are lent again within a backward."""


@pytest.mark.parametrize("home", ["host", "all on disk"])
def test_the_training_thread_does_not_wait_for_a_late_link_the_stream_does(home: str, tmp_path: Path) -> None:
    lanes = TurnLanes(slow("d2h"), clocks=Clocks())
    run(lanes, Scenario(home=home, device="stream", num_blocks=BLOCKS), tmp_path)
    waits = {lane: totals.waits_by_reason_s for lane, totals in lanes.timeline.totals().items()}
    assert Reason.BUFFER_FREE in waits["stream"]
    assert Reason.BUFFER_FREE not in waits.get(TRAINING_LANE, {})


def test_on_the_host_compute_is_the_training_thread_and_it_waits(tmp_path: Path) -> None:
    lanes = TurnLanes(slow("d2h"), clocks=Clocks())
    run(lanes, Scenario(num_blocks=BLOCKS), tmp_path)
    assert Reason.BUFFER_FREE in lanes.timeline.totals()[TRAINING_LANE].waits_by_reason_s


@pytest.mark.parametrize("device", ["host", "stream"])
def test_slots_lent_again_give_the_same_bits_in_every_order(device: str, tmp_path: Path) -> None:
    scenario = Scenario(device=device, num_blocks=BLOCKS)
    expected = run(TurnLanes(slow("d2h")), scenario, tmp_path)
    assert run(TurnLanes(slow("stream"), clocks=Clocks()), scenario, tmp_path) == expected
    assert run(LateLanes(), scenario, tmp_path) == expected
