"""All that belongs to ranks, in a world of one: the bits of no ranks under every double, and no collective too many."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from offload.concurrency.lanes import Lanes
from offload.concurrency.timeline import Timeline
from offload.config import make_config
from offload.enable import start
from tests.doubles.clocks import Clocks
from tests.doubles.late import LateLanes
from tests.doubles.lone_ranks import LoneRanks
from tests.doubles.turns import TurnLanes, eager, shuffled, slow
from tests.races.scenarios import Scenario, run

SCENARIOS = {
    "host": Scenario(),
    "state on disk": Scenario(home="state on disk", reads=True),
    "all on disk": Scenario(home="all on disk", accumulate=3, micro_batches=3, buffers=8),
    "weights on device": Scenario(home="weights on device, state on disk", evaluates=True),
    "fp32, recomputed": Scenario(precision="fp32", checkpointing=True),
    "dropped gradients": Scenario(precision="fp32", accumulate=3, micro_batches=3, drops=True),
    "own gradients": Scenario(own_gradients=True, accumulate=1),
}
ORDERS = {
    "threads": lambda: Lanes(Timeline(), wait_timeout_s=20.0),
    "late": LateLanes,
    "eager, checked": lambda: TurnLanes(eager, clocks=Clocks()),
    "collectives slow, checked": lambda: TurnLanes(slow("collective issue"), clocks=Clocks()),
    "shuffled, checked": lambda: TurnLanes(shuffled(7), clocks=Clocks()),
}


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("device", ["host", "stream"])
def test_the_bits_are_those_without_ranks_in_every_order(name: str, device: str, tmp_path: Path) -> None:
    scenario = replace(SCENARIOS[name], device=device)
    expected = run(TurnLanes(eager), scenario, tmp_path)
    for order, lanes_of in ORDERS.items():
        assert run(lanes_of(), replace(scenario, ranks=True), tmp_path) == expected, order


def test_an_accumulating_backward_averages_each_partition_once_and_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = make_config(
        device_memory="1MiB", host_memory="64MiB", disk=None, disk_space=None, precision="fp32", max_grad_norm=1.0,
        accumulate=2, wait_timeout_s=20.0,
    )  # fmt: skip
    ranks = LoneRanks()
    with start(model, optimizer, config, "cpu", ranks_of=lambda _: ranks) as session:
        for _ in range(2):
            for _ in range(2):
                session.metrics()  # waits for the step before
                before = len(ranks.order), ranks.num_totals
                model(torch.ones(2, 64)).sum().backward()
                session.gathered_gradients()  # waits until all have offloaded
                done = ranks.order[before[0] :]
                assert sum(what.startswith("average") for what in done) == 4
                assert ranks.num_totals == before[1]
            session.step()
            optimizer.zero_grad()
    assert ranks.num_totals == 2
    assert ranks.closed
