"""Sessions that nobody closes, as in notebooks: the model holds its session, and whatever ends it leaves nothing."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn

import offload
from offload.concurrency.lanes import Lanes
from offload.concurrency.timeline import Timeline
from offload.errors import BudgetError, SessionClosedError, UnsupportedModelError
from offload.open_sessions import collect_dropped, open_sessions, wait_for_dropped
from tests.training.models import mlp
from tests.training.oracle import PLENTY, adamw, assert_same_bits, enable, weights_of

ROOT: Final = Path(__file__).parents[2]


class WithLossOfItsOwn(nn.Module):
    """As a router does, it leaves a loss on itself, whose graph reaches its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.own_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        self.own_loss = out.square().mean()
        return out


def trained(make_model: Callable[[], nn.Module], folder: Path) -> dict[str, Any]:
    """What a cell of a notebook leaves in its variables."""
    model = make_model()
    optimizer = adamw(model)
    session = enable(model, optimizer, "disk", folder)
    loss = step(model, optimizer)
    return {"model": model, "optimizer": optimizer, "session": session, "loss": loss}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    loss = model(torch.ones(2, 64)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    yield
    collect_dropped()
    assert open_sessions() == []
    assert our_threads() == []
    assert list(tmp_path.iterdir()) == []


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("offload")]


def test_a_session_that_nobody_keeps_stays_open_as_long_as_its_model(tmp_path: Path) -> None:
    expected = mlp()
    expected_optimizer = adamw(expected)
    with enable(expected, expected_optimizer, "disk", tmp_path):
        step(expected, expected_optimizer)
        step(expected, expected_optimizer)
    model = mlp()
    optimizer = adamw(model)
    enable(model, optimizer, "disk", tmp_path)
    for _ in range(2):
        collect_dropped()
        step(model, optimizer)
    offload.close_all()
    assert_same_bits(weights_of(model), weights_of(expected))


@pytest.mark.parametrize("kept", ["nothing", "optimizer", "loss"])
@pytest.mark.parametrize("make_model", [mlp, WithLossOfItsOwn])
def test_a_session_ends_with_its_model_whatever_else_is_kept(
    kept: str, make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    variables = trained(make_model, tmp_path)
    model = weakref.ref(variables["model"])
    held = variables.get(kept)
    assert our_threads()
    variables.clear()
    collect_dropped()
    assert our_threads() == []
    assert list(tmp_path.iterdir()) == []
    gc.collect()
    assert model() is None
    if kept == "optimizer":
        with pytest.raises(SessionClosedError, match="ended with its model"):
            held.step()
    del held


def test_a_graph_whose_session_is_gone_says_so(tmp_path: Path) -> None:
    model = mlp()
    enable(model, adamw(model), "disk", tmp_path)
    loss = model(torch.ones(2, 64)).square().mean()
    del model
    collect_dropped()
    with pytest.raises(SessionClosedError, match="ended with its model"):
        loss.backward()


def test_a_session_may_be_dropped_on_any_lane_even_its_own(tmp_path: Path) -> None:
    """Scenario: the collector runs where a lane happens to be; closing there would wait for that lane itself."""
    others = Lanes(Timeline())
    for is_own in (False, True):
        variables = trained(mlp, tmp_path)
        lanes = variables["session"]._runtime.lanes if is_own else others
        lane = lanes._lanes[0] if is_own else lanes.lane("another")
        variables["session"].settle_lanes()
        variables.clear()
        future = lane.submit(gc.collect, "collect")
        while not future.block(0.1):
            pass
        wait_for_dropped()
        assert list(tmp_path.iterdir()) == []
    others.close()


CELL: Final = """
model = mlp()
optimizer = adamw(model)
session = offload.enable(model, optimizer, disk=folder, **budgets)
for _ in range(2):
    loss = model(torch.ones(2, 64)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.parametrize("between", ["", "del session", "del session, model"])
def test_nothing_accumulates_over_cells(between: str, tmp_path: Path) -> None:
    """100 in all: each enables anew, and none closes."""
    budgets = {"device_memory": 80 * 1024, "host_memory": 500 * 1024, "device": "cpu", "precision": "fp32"}
    variables = {"mlp": mlp, "adamw": adamw, "offload": offload, "torch": torch, "folder": tmp_path, "budgets": budgets}
    most = [0, 0, 0]
    for number in range(34):
        exec(CELL, variables)
        if between:
            exec(between, variables)
        if number >= 4:
            here = [len(our_threads()), len(list(tmp_path.iterdir())), len(list(Path("/proc/self/fd").iterdir()))]
            if number < 8:
                most = list(map(max, most, here))
            else:
                assert all(a <= b for a, b in zip(here, most, strict=True)), f"cell {number}: {here}, first {most}"
    variables.clear()


def test_another_session_of_a_model_names_the_first_and_how_to_close_it(tmp_path: Path) -> None:
    variables = trained(mlp, tmp_path)
    model, optimizer = variables["model"], variables["optimizer"]
    match = r"the session of Sequential \(opened ..:..:.. at .*oracle\.py:\d+\).*offload\.close_all\(\)"
    for another in (model, nn.Sequential(model, nn.Linear(8, 8)), model[0]):
        with pytest.raises(UnsupportedModelError, match=match):
            offload.enable(another, None, device="cpu", device_memory=PLENTY)
    offload.close_all()
    with offload.enable(model, optimizer, device="cpu", device_memory=PLENTY):
        step(model, optimizer)


def test_a_session_that_finds_no_room_names_those_that_hold_it(tmp_path: Path) -> None:
    with pytest.raises(BudgetError) as alone:
        offload.enable(mlp(), None, device="cpu", host_memory="900TiB")
    assert "held by" not in str(alone.value)
    trained(mlp, tmp_path)
    variables = trained(mlp, tmp_path)
    with pytest.raises(BudgetError, match=r"held by the session of Sequential \(opened .*offload\.close_all\(\)"):
        offload.enable(mlp(), None, device="cpu", host_memory="900TiB")
    variables.clear()


def test_a_model_that_was_not_handed_back_says_so(tmp_path: Path) -> None:
    variables = trained(mlp, tmp_path)
    variables["session"].close(give_back=False)
    with pytest.raises(UnsupportedModelError, match=r"is a placeholder: .*give_back=False.*session\.load a checkpoint"):
        offload.enable(variables["model"], None, device="cpu", device_memory=PLENTY)


def test_close_all_closes_every_session_and_hands_back(tmp_path: Path) -> None:
    several = [trained(mlp, tmp_path) for _ in range(3)]
    assert len(open_sessions()) == 3
    offload.close_all()
    assert open_sessions() == []
    assert our_threads() == []
    assert all(parameter.isfinite().all() for v in several for parameter in v["model"].parameters())
    offload.close_all()  # nothing is left, and nothing happens


PROGRAM: Final = """
import os, sys, torch, offload
model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(32)))
optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
session = offload.enable(model, optimizer, device="cpu", device_memory="128KiB", host_memory="1MiB", disk=sys.argv[1])
for _ in range(3):
    model(torch.ones(2, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
assert session.metrics()["homes"]["state"]["disk"]
model(torch.ones(2, 64)).square().mean().backward()
optimizer.step()
"""
ENDS: Final = {
    "at its last line": ("", 0),
    "by sys.exit": ("sys.exit(3)", 3),
    "by an error": ("raise KeyError('of the user')", 1),
    "with a save under way": ("session.save(sys.argv[1] + '/../run', wait=False)", 0),
    "after a forked child has ended": ("if os.fork() == 0:\n    sys.exit(0)\nos.wait()\nsession.weights_sha256()", 0),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_interpreter_that_exits_leaves_no_files_and_says_nothing(end: str, tmp_path: Path) -> None:
    code, expected = ENDS[end]
    swap = tmp_path / "swap"
    swap.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM + code, str(swap)],
        capture_output=True, text=True, check=False, timeout=200, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == expected, done.stderr
    assert done.stdout == ""
    if "error" in end:
        assert done.stderr.count("Traceback") == 1
        assert done.stderr.endswith("KeyError: 'of the user'\n")
    else:
        assert done.stderr == ""
    assert list(swap.iterdir()) == []
    swap.rmdir()
    run = tmp_path / "run"
    if "save" in end:
        assert [path.name for path in run.glob("step-*")] == ["step-00000004"]
    subprocess.run(["rm", "-rf", str(run)], check=True)
