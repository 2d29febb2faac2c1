"""Every kind of optimizer: torch's results, the same bits on every home, state taken over and handed back."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.errors import ConfigError, UnsupportedOptimizerError
from offload.units import MAX_CHUNK_NUMEL
from tests.training.models import gpt, tokens
from tests.training.oracle import HOMES, PLENTY, assert_close, assert_same_bits, enable, run_steps, weights_of

Make = Callable[[nn.Module], torch.optim.Optimizer]

SINGLE = {"foreach": False}

WITH_A_KERNEL: dict[str, Make] = {
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, eps=1e-5, weight_decay=0.1, **SINGLE),
    "adamw amsgrad": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-5, amsgrad=True, **SINGLE),
    "adamw maximize": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-5, maximize=True, **SINGLE),
    "lion": lambda m: offload.optim.Lion(m.parameters(), lr=1e-3, weight_decay=0.1),
    "adagrad": lambda m: torch.optim.Adagrad(
        m.parameters(), lr=1e-2, lr_decay=0.1, weight_decay=0.01, initial_accumulator_value=0.1, eps=1e-5, **SINGLE
    ),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, weight_decay=0.01, **SINGLE),
    "sgd momentum": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, dampening=0.1, **SINGLE),
    "sgd nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, nesterov=True, **SINGLE),
}


def muon(model: nn.Module) -> torch.optim.Optimizer:
    """Over matrices alone, as it asks for; the rest stays as it is."""
    return torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2)


BY_TORCH: dict[str, Make] = {
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, momentum=0.5, centered=True, eps=1e-5, **SINGLE),
    "nadam": lambda m: torch.optim.NAdam(m.parameters(), lr=1e-3, eps=1e-5, **SINGLE),
    "radam": lambda m: torch.optim.RAdam(m.parameters(), lr=1e-3, eps=1e-5, **SINGLE),
    "adadelta": lambda m: torch.optim.Adadelta(m.parameters(), lr=0.1, **SINGLE),
    "adamax": lambda m: torch.optim.Adamax(m.parameters(), lr=1e-3, eps=1e-5, **SINGLE),
    "asgd": lambda m: torch.optim.ASGD(m.parameters(), lr=1e-2, t0=1.0, **SINGLE),
    "rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=1e-3, **SINGLE),
    "muon": muon,
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2, **SINGLE),
}
ALL = WITH_A_KERNEL | BY_TORCH
BATCHES = [{"tokens": tokens(i)} for i in range(4)]


@pytest.mark.parametrize("name", ALL)
def test_torchs_results_and_the_same_bits_on_every_home(name: str, tmp_path: Path) -> None:
    reference = gpt()
    losses = run_steps(reference, ALL[name](reference), BATCHES)
    found = {}
    for home in HOMES:
        model = gpt()
        optimizer = ALL[name](model)
        with enable(model, optimizer, home, tmp_path):
            assert run_steps(model, optimizer, BATCHES) == pytest.approx(losses, abs=1e-5)
        # Rprop goes by signs: a gradient that is zero but for rounding takes a whole step
        assert_close(weights_of(model), weights_of(reference), atol=5e-3 if name in ("rprop", "lion") else 1e-5)
        found[home] = weights_of(model)
    assert_same_bits(found["host"], found["device"])
    assert_same_bits(found["disk"], found["device"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["lion", "adagrad", "sgd momentum", "adamw amsgrad", "rmsprop", "muon"])
def test_the_same_bits_in_16_bit_on_every_home(name: str, precision: str, tmp_path: Path) -> None:
    found = {}
    for home in HOMES:
        model = gpt()
        optimizer = ALL[name](model)
        with enable(model, optimizer, home, tmp_path, precision=precision) as session:
            for batch in BATCHES:
                session.backward(model(**batch))
                optimizer.step()
                optimizer.zero_grad()
        found[home] = weights_of(model)
    assert_same_bits(found["host"], found["device"])
    assert_same_bits(found["disk"], found["device"])


def test_a_matrix_larger_than_the_largest_chunks_is_stepped_whole() -> None:
    found = []
    for in_session in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1500, 1500, bias=False))
        assert model[0].weight.numel() > MAX_CHUNK_NUMEL
        optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2, foreach=False)
        budgets = {"device_memory": PLENTY, "host_memory": PLENTY}
        with (
            offload.enable(model, optimizer, device="cpu", precision="fp32", **budgets) if in_session else nullcontext()
        ):
            model(torch.ones(1, 1500)).square().sum().backward()
            optimizer.step()
        found.append(weights_of(model))
    assert_close(found[1], found[0], atol=1e-6)


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("name", ALL)
def test_state_is_taken_over_and_given_back(name: str, home: str, tmp_path: Path) -> None:
    reference = gpt()
    run_steps(reference, ALL[name](reference), BATCHES)
    model = gpt()
    optimizer = ALL[name](model)
    run_steps(model, optimizer, BATCHES[:1])
    with enable(model, optimizer, home, tmp_path):
        run_steps(model, optimizer, BATCHES[1:3])
    run_steps(model, optimizer, BATCHES[3:])
    assert_close(weights_of(model), weights_of(reference), atol=5e-3 if name in ("rprop", "lion") else 1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("state_dtype", ["bf16", "8bit"])
def test_rounded_moments_give_the_same_bits_on_every_home_and_stay_close(
    state_dtype: str, precision: str, tmp_path: Path
) -> None:
    found = {}
    for home in HOMES:
        model = gpt()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
        with enable(model, optimizer, home, tmp_path, precision=precision, state_dtype=state_dtype):
            losses = run_steps(model, optimizer, BATCHES)
        found[home] = weights_of(model)
    assert_same_bits(found["host"], found["device"])
    assert_same_bits(found["disk"], found["device"])
    exact = gpt()
    optimizer = torch.optim.AdamW(exact.parameters(), lr=1e-3, eps=1e-5)
    with enable(exact, optimizer, "host", tmp_path, precision=precision):
        assert run_steps(exact, optimizer, BATCHES) == pytest.approx(losses, abs=5e-3)
    assert any(not torch.equal(p, found["host"][n]) for n, p in weights_of(exact).items())


def test_rounding_of_moments_is_repeatable_and_goes_on_where_it_was(tmp_path: Path) -> None:
    def train(pauses: bool) -> dict[str, torch.Tensor]:
        model = gpt()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for part in (BATCHES[:2], BATCHES[2:]) if pauses else (BATCHES,):
            with enable(model, optimizer, "host", tmp_path, state_dtype="bf16"):
                run_steps(model, optimizer, part)
        return weights_of(model)

    assert_same_bits(train(pauses=False), train(pauses=False))
    assert_same_bits(train(pauses=True), train(pauses=False))


@pytest.mark.parametrize(
    ("make", "state_dtype", "match"),
    [
        (ALL["sgd momentum"], "bf16", "Adam and AdamW alone"),
        (ALL["adamw amsgrad"], "8bit", "amsgrad"),
        (ALL["muon"], "8bit", "Adam and AdamW alone"),
    ],
)
def test_state_dtypes_that_nobody_keeps_raise(make: Make, state_dtype: str, match: str) -> None:
    model = gpt()
    with pytest.raises(UnsupportedOptimizerError, match=match):
        offload.enable(model, make(model), device="cpu", precision="fp32", state_dtype=state_dtype)


def test_an_unknown_state_dtype_is_named_with_those_that_are_known() -> None:
    model = gpt()
    with pytest.raises(ConfigError, match="'int4' is unknown; use one of 'fp32', 'bf16', '8bit'"):
        offload.enable(model, ALL["adam"](model), device="cpu", state_dtype="int4")


def test_options_that_need_other_state_raise_at_the_step(tmp_path: Path) -> None:
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters())
    with enable(model, optimizer, "device", tmp_path):
        optimizer.param_groups[0]["amsgrad"] = True
        with pytest.raises(UnsupportedOptimizerError, match=r"max_exp_avg_sq.*before offload\.enable"):
            run_steps(model, optimizer, BATCHES[:1])


def test_a_group_of_adamw_may_have_decay_by_l2(tmp_path: Path) -> None:
    found = []
    for home in (None, "host"):
        model = gpt()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5, weight_decay=0.5, foreach=False)
        optimizer.param_groups[0]["decoupled_weight_decay"] = False
        with enable(model, optimizer, home, tmp_path) if home is not None else nullcontext():
            run_steps(model, optimizer, BATCHES)
        found.append(weights_of(model))
    assert_close(found[1], found[0], atol=1e-5)


def added(optimizer: torch.optim.Optimizer, left_out: nn.Parameter) -> None:
    optimizer.add_param_group({"params": [left_out]})


def taken_out(optimizer: torch.optim.Optimizer, left_out: nn.Parameter) -> None:
    optimizer.param_groups.pop()


def moved(optimizer: torch.optim.Optimizer, left_out: nn.Parameter) -> None:
    one, other = optimizer.param_groups
    one["params"].append(other["params"].pop())


@pytest.mark.parametrize("change", [added, taken_out, moved])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.RMSprop])
def test_other_parameters_in_the_groups_raise_at_the_step(
    cls: type[torch.optim.Optimizer], change: Callable[..., None], tmp_path: Path
) -> None:
    model = gpt()
    first, second, *rest, left_out = model.parameters()
    optimizer = cls([{"params": [first, second]}, {"params": rest}], lr=1e-3)  # type: ignore[call-arg]
    with enable(model, optimizer, "device", tmp_path):
        run_steps(model, optimizer, BATCHES[:1])
        change(optimizer, left_out)
        with pytest.raises(UnsupportedOptimizerError, match=r"hold other parameters.*offload\.enable again"):
            run_steps(model, optimizer, BATCHES[1:2])


class OfItsOwn(torch.optim.Optimizer):
    """Gradient descent as users write it; kinds differ in what they know besides the parameter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.1, "seen": 0.0})
        self.t = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        self.t += 1
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            factor = self.factor(group, [p.grad for p in with_gradient])
            for p in with_gradient:
                p.sub_(p.grad, alpha=group["lr"] * factor)

    def factor(self, group: dict[str, Any], gradients: list[torch.Tensor]) -> float:
        return 1.0 / self.t


class OfTheNorm(OfItsOwn):
    """Normalises over all parameters at once."""

    def factor(self, group: dict[str, Any], gradients: list[torch.Tensor]) -> float:
        return 1.0 / (1.0 + sum(float(g.square().sum()) for g in gradients))


class OfTheSeen(OfItsOwn):
    """Steps by what it saw in the steps before, which it keeps in the group."""

    def factor(self, group: dict[str, Any], gradients: list[torch.Tensor]) -> float:
        before = group["seen"]
        group["seen"] = max([before, *(float(g.abs().max()) for g in gradients)])
        return 1.0 / (1.0 + before)


class OfChance(OfItsOwn):
    """Draws random numbers."""

    def factor(self, group: dict[str, Any], gradients: list[torch.Tensor]) -> float:
        return float(torch.rand(()))


def test_an_optimizer_that_counts_its_steps_in_itself_steps_as_without_a_session(tmp_path: Path) -> None:
    reference = gpt()
    run_steps(reference, OfItsOwn(reference), BATCHES)
    model = gpt()
    optimizer = OfItsOwn(model)
    with enable(model, optimizer, "host", tmp_path):
        run_steps(model, optimizer, BATCHES)
    assert optimizer.t == len(BATCHES)
    assert_close(weights_of(model), weights_of(reference), atol=1e-6)


@pytest.mark.parametrize(("cls", "match"), [(OfTheNorm, "where another one has a gradient"), (OfTheSeen, "in seen")])
def test_optimizers_that_know_more_than_one_parameter_raise(cls: type[OfItsOwn], match: str) -> None:
    model = gpt()
    with pytest.raises(UnsupportedOptimizerError, match=match):
        offload.enable(model, cls(model), device="cpu", precision="fp32")


def test_an_optimizer_that_draws_random_numbers_raises_and_none_of_the_users_are_drawn() -> None:
    model = gpt()
    before = torch.get_rng_state()
    with pytest.raises(UnsupportedOptimizerError, match="OfChance draws random numbers in its step"):
        offload.enable(model, OfChance(model), device="cpu", precision="fp32")
    assert torch.equal(torch.get_rng_state(), before)


def bytes_of_state(tmp_path: Path, **options: Any) -> float:
    """Bytes in homes for each element, state alone, with weights on the host."""
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters())
    with enable(model, optimizer, "host", tmp_path, **options) as session:
        homes = session.plan.bytes_by_kind_and_tier
    return sum(homes["state"].values()) / (4 * 512 * 512)


@pytest.mark.parametrize(
    ("precision", "state_dtype", "num_bytes"),
    [
        ("fp32", "fp32", 12.0),
        ("fp16", "fp32", 12.0),
        ("bf16", "fp32", 10.0),
        ("bf16", "bf16", 6.0),
        ("bf16", "8bit", 2 + 2 * (1 + 4 / 256)),
        ("fp32", "8bit", 4 + 2 * (1 + 4 / 256)),
    ],
)
def test_bytes_of_state_for_each_parameter(precision: str, state_dtype: str, num_bytes: float, tmp_path: Path) -> None:
    found = bytes_of_state(tmp_path, precision=precision, state_dtype=state_dtype)
    assert found == pytest.approx(num_bytes, rel=0.01)
