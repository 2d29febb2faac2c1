"""What the optimizer's step overlaps changes no bit, and steps inside backward keep their futures or fail."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import offload
from offload.errors import ConfigError, NonFiniteError, OffloadError, SessionFailedError
from tests.training.models import gpt, seeded, tokens
from tests.training.oracle import HOMES, adamw, assert_same_bits, enable, run_steps, weights_of

BATCHES = [{"tokens": tokens(i)} for i in range(5)]


def trained(home: str, folder: Path, batches: list[Any] = BATCHES, **options: Any) -> tuple[list[float], Any]:
    model = gpt()
    optimizer = adamw(model)
    with enable(model, optimizer, home, folder, accumulate=1, **options) as session:
        losses = []
        for batch in batches:
            loss = model(**batch)
            session.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, weights_of(model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("home", HOMES)
def test_every_overlap_gives_the_same_bits(home: str, precision: str, tmp_path: Path) -> None:
    expected = trained("device", tmp_path, precision=precision, overlap="off")
    for overlap in ("forward", "backward", "off"):
        found = trained(home, tmp_path, precision=precision, overlap=overlap)
        assert found[0] == expected[0]
        assert_same_bits(found[1], expected[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_fifty_steps_with_clipping_overlapped_and_serial_are_the_same(precision: str, tmp_path: Path) -> None:
    batches = [{"tokens": tokens(i % 7)} for i in range(50)]
    runs = [
        trained("disk", tmp_path, batches, precision=precision, max_grad_norm=0.5, overlap=overlap)
        for overlap in ("forward", "off")
    ]
    assert runs[0][0] == runs[1][0]
    assert_same_bits(runs[0][1], runs[1][1])


def test_without_overlap_nothing_is_under_way_after_the_step(tmp_path: Path) -> None:
    model = gpt()
    optimizer = adamw(model)
    with enable(model, optimizer, "disk", tmp_path, overlap="off") as session:
        for batch in BATCHES[:2]:
            model(**batch).backward()
            optimizer.step()
            assert session._components.pipeline.last.done()
            optimizer.zero_grad()


def test_inside_backward_late_blocks_are_stepped_before_the_first_gradient_is_there(tmp_path: Path) -> None:
    model = gpt()
    optimizer = adamw(model)
    with enable(model, optimizer, "host", tmp_path, accumulate=1, overlap="backward") as session:
        seen = []
        model.embedding.weight.register_hook(lambda _: seen.append(dict(session._components.in_backward._stepped)))
        run_steps(model, optimizer, BATCHES[:1])
    assert len(seen[0]) >= len(model.blocks)


@pytest.mark.parametrize("home", HOMES)
def test_accumulating_steps_in_the_last_backward(home: str, tmp_path: Path) -> None:
    found = {}
    for overlap in ("forward", "backward"):
        model = gpt()
        optimizer = adamw(model)
        with enable(model, optimizer, home, tmp_path, accumulate=2, overlap=overlap):
            for first, second in ((0, 1), (2, 3)):
                model(**BATCHES[first]).backward()
                model(**BATCHES[second]).backward()
                optimizer.step()
                optimizer.zero_grad()
        found[overlap] = weights_of(model)
    assert_same_bits(found["backward"], found["forward"])


class Shared(nn.Module):
    """Three blocks under checkpoints; the first one is called twice."""

    def __init__(self, use_reentrant: bool, shares: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.shares = shares
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in [*self.blocks, *([self.blocks[0]] if self.shares else [])]:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x.square().mean()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("shares", [False, True])
def test_checkpoints_step_inside_backward_or_say_that_they_cannot(
    use_reentrant: bool, shares: bool, tmp_path: Path
) -> None:
    def train(overlap: str) -> Any:
        model = seeded(lambda: Shared(use_reentrant, shares))
        optimizer = adamw(model)
        x = torch.linspace(-1, 1, 48).view(3, 16).requires_grad_()
        with enable(model, optimizer, "host", tmp_path, accumulate=1, overlap=overlap):
            for _ in range(3):
                model(x).backward()
                optimizer.step()
                optimizer.zero_grad()
        return weights_of(model)

    if use_reentrant:  # torch runs a backward of its own for each
        with pytest.raises(OffloadError, match='overlap="forward"'):
            train("backward")
    else:
        assert_same_bits(train("backward"), train("forward"))


@pytest.mark.parametrize(
    "options",
    [{"precision": "fp16", "accumulate": 1}, {"max_grad_norm": 1.0, "accumulate": 1}, {"accumulate": None}],
    ids=str,
)
def test_steps_in_backward_raise_where_they_would_not_be_exact(options: dict[str, Any]) -> None:
    model = gpt()
    options = {"precision": "fp32", "device": "cpu"} | options
    with pytest.raises(ConfigError, match=r'overlap="backward".*Use overlap="forward"'):
        offload.enable(model, adamw(model), overlap="backward", **options)


def test_an_unknown_overlap_is_named_with_those_that_are_known() -> None:
    model = gpt()
    with pytest.raises(ConfigError, match="'always' is unknown; use one of 'forward', 'backward', 'off'"):
        offload.enable(model, adamw(model), overlap="always", device="cpu")


def broken_future(what: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Do, between backward and step, what a step inside backward has promised not to happen."""
    if what == "options":
        optimizer.param_groups[0]["lr"] = 0.5
    elif what == "dropped":
        optimizer.zero_grad()
    elif what == "one more backward":
        model(**BATCHES[1]).backward()
    optimizer.step()


@pytest.mark.parametrize("what", ["options", "dropped", "one more backward"])
def test_a_broken_future_fails_the_session(what: str, tmp_path: Path) -> None:
    model = gpt()
    optimizer = adamw(model)
    session = enable(model, optimizer, "host", tmp_path, accumulate=1, overlap="backward")
    run_steps(model, optimizer, BATCHES[:1])
    model(**BATCHES[0]).backward()
    with pytest.raises(ConfigError, match='Use overlap="forward"'):
        broken_future(what, model, optimizer)
    with pytest.raises(SessionFailedError):
        model(**BATCHES[1])
    session.close()


def train_on_nan(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for batch in BATCHES:
        (model(**batch) * float("nan")).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_gradient_that_is_not_finite_fails_the_session(tmp_path: Path) -> None:
    model = gpt()
    optimizer = adamw(model)
    session = enable(model, optimizer, "host", tmp_path, accumulate=1, overlap="backward")
    with pytest.raises((NonFiniteError, SessionFailedError), match="not finite"):
        train_on_nan(model, optimizer)
    session.close()


def test_an_exception_in_such_a_backward_fails_the_session(tmp_path: Path) -> None:
    model = gpt()
    optimizer = adamw(model)
    session = enable(model, optimizer, "host", tmp_path, accumulate=1, overlap="backward")

    def stop(_: torch.Tensor) -> None:
        raise KeyError("stop")

    model.embedding.weight.register_hook(stop)
    with pytest.raises(KeyError):
        model(**BATCHES[0]).backward()
    with pytest.raises(SessionFailedError, match="ended by an exception"):
        model(**BATCHES[1])
    session.close()
