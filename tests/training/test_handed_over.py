"""Weights stored on disk go from the step straight to the fetch that waits for them, and are not read back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload.concurrency.lanes import Lanes
from offload.concurrency.timeline import Timeline
from offload.config import make_config
from offload.enable import start
from offload.optimizer.pipeline import StepPipeline
from offload.storage.homes import DiskHome
from offload.units import Tier
from tests.doubles.clocks import Clocks
from tests.doubles.lane_queue import LaneQueue
from tests.doubles.late import LateLanes
from tests.doubles.turns import TurnLanes, eager, shuffled, slow

STEPS = 4


def train(lanes: Lanes, folder: Path) -> tuple[list[float], str, int]:
    """Losses, weights, and bytes read from the disk."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(5)), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = make_config(
        device_memory="24KiB", host_memory="165KiB", disk=folder, disk_space=None, precision="bf16", max_grad_norm=1.0,
        accumulate=None, wait_timeout_s=5.0,
    )  # fmt: skip
    inputs = torch.Generator().manual_seed(1)
    losses = []
    with start(model, optimizer, config, "cpu", lanes=lanes, queue_of=LaneQueue) as session:
        assert session.plan.bytes_by_kind_and_tier["weights"][Tier.DISK]
        for _ in range(STEPS):
            loss = model(torch.randn(4, 64, generator=inputs)).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        read_bytes = session.metrics()["bytes_moved"]["read"]
        digest = session.weights_sha256()
    return losses, digest, read_bytes


def read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiskHome, "_hand_over", lambda *_: None)


def test_what_is_handed_over_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, digest, read_bytes = train(LateLanes(), tmp_path)
    read_back(monkeypatch)
    expected = train(LateLanes(), tmp_path)
    assert (losses, digest) == expected[:2]
    assert read_bytes < expected[2]


@pytest.mark.parametrize(
    "lanes_of",
    [
        lambda: Lanes(Timeline(), wait_timeout_s=5.0),
        lambda: TurnLanes(eager, clocks=Clocks()),
        lambda: TurnLanes(slow("step"), clocks=Clocks()),
        lambda: TurnLanes(slow("fetch read"), clocks=Clocks()),
        lambda: TurnLanes(slow("h2d"), clocks=Clocks()),
        lambda: TurnLanes(slow("write"), clocks=Clocks()),
        lambda: TurnLanes(shuffled(3), clocks=Clocks()),
    ],
    ids=["threads", "eager", "slow step", "slow fetch", "slow h2d", "slow write", "shuffled"],
)
def test_in_every_order_the_bits_are_those_of_reading_back(
    lanes_of: Callable[[], Lanes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_over = train(lanes_of(), tmp_path)[:2]
    read_back(monkeypatch)
    assert train(LateLanes(), tmp_path)[:2] == handed_over


def test_skipped_steps_hand_nothing_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflowing(lanes: Lanes) -> tuple[str, int]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(5)), nn.Linear(64, 8))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        config = make_config(
            device_memory="24KiB", host_memory="165KiB", disk=tmp_path, disk_space=None, precision="bf16",
            max_grad_norm=None, accumulate=None, wait_timeout_s=5.0,
        )  # fmt: skip
        with start(model, optimizer, config, "cpu", lanes=lanes, queue_of=LaneQueue) as session:
            pipelines[:] = [session._opened().pipeline]
            for factor in (1.0, float("nan"), 1.0):
                (model(torch.ones(4, 64)).float().square().mean() * factor).backward()
                skipped = session.step().skipped
                optimizer.zero_grad()
                assert skipped == (factor != factor)
            return session.weights_sha256(), session.metrics()["bytes_moved"]["read"]

    pipelines: list[StepPipeline] = []
    handed_over: list[int] = []
    hand_over = DiskHome._hand_over

    def counted(*arguments: Any) -> None:
        handed_over.append(max(pipelines[0].num_steps.values(), default=0))
        hand_over(*arguments)

    monkeypatch.setattr(DiskHome, "_hand_over", counted)
    digest, _ = overflowing(LateLanes())
    assert set(handed_over) <= {0, 1}  # by steps taken: the second attempt handed nothing over
    read_back(monkeypatch)
    assert overflowing(LateLanes())[0] == digest
