"""A loop that leaves the recorded order is told of it once, by the names of what was expected and what came."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from offload.session import Session
from tests.training.models import GPT, gpt, tokens
from tests.training.oracle import adamw, enable


def train(session: Session, model: GPT, skips: Sequence[set[int]], *, evaluate: bool = False) -> list[int]:
    """A step with each of these blocks left out; the unplanned fetches of each step."""
    assert session.optimizer is not None
    for seed, model.skip in enumerate(skips):
        if evaluate:
            with torch.no_grad():
                model(tokens(seed))
        model(tokens(seed)).backward()
        session.optimizer.step()
        session.optimizer.zero_grad()
    unplanned: list[int] = session.metrics()["unplanned_fetches"]
    return unplanned


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name == "offload"]


@pytest.mark.parametrize("home", ["device", "disk"])
def test_an_order_that_is_kept_is_not_spoken_of_with_evaluation_between_the_steps(
    home: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = gpt()
    with enable(model, adamw(model), home, tmp_path) as session:
        assert train(session, model, [set()] * 4, evaluate=True) == [0] * 4
    assert warnings_in(caplog) == []


def test_the_first_departure_names_both_partitions_and_further_ones_are_only_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = gpt()
    with enable(model, adamw(model), "disk", tmp_path) as session:
        assert train(session, model, [set(), set(), set()]) == [0] * 3
        assert warnings_in(caplog) == []
        unplanned = train(session, model, [{1}, set(), {0, 2}, set()])
        assert unplanned[3] > 0
        assert unplanned[5] > 0
    (warning,) = warnings_in(caplog)
    assert "partition 'blocks.2' was used where the recorded order has 'blocks.1'" in warning
    assert "unplanned_fetches" in warning


def test_what_is_left_out_is_recorded_and_expected_of_the_next_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = gpt()
    with enable(model, adamw(model), "disk", tmp_path) as session:
        unplanned = train(session, model, [set(), set(), {1}, {1}, {1}])
    assert unplanned[2] > 0
    assert unplanned[3:] == [0, 0]


def test_each_session_speaks_for_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        model = gpt()
        with enable(model, adamw(model), "disk", tmp_path) as session:
            train(session, model, [set(), set(), {1}])
    assert len(warnings_in(caplog)) == 2


def test_a_model_that_is_recomputed_whole_keeps_its_order(tmp_path: Path) -> None:
    """Its forward has no gradients, as an evaluation; the backward computes it again."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    optimizer = adamw(model)
    with enable(model, optimizer, "disk", tmp_path) as session:
        for _ in range(4):
            checkpoint(model, torch.ones(2, 16, requires_grad=True), use_reentrant=True).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert session.metrics()["unplanned_fetches"] == [0] * 4
