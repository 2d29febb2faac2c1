"""Bad input: our own exception with a remedy, the model as it was, nothing on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.errors import BudgetError, ConfigError, UnsupportedModelError, UnsupportedOptimizerError
from tests.training.models import gpt, tokens
from tests.training.oracle import adamw, assert_same_bits, run_steps, weights_of

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def assert_refused(
    kind: type[Exception], match: str, folder: Path, *, make_optimizer: MakeOptimizer = adamw, **options: Any
) -> None:
    """`enable` raises `kind`, leaves model and folder as they were, and the model trains on without it."""
    model = gpt()
    optimizer = make_optimizer(model)
    parameters, before = list(model.parameters()), weights_of(model)
    with pytest.raises(kind, match=match):
        offload.enable(model, optimizer, **({"precision": "fp32", "device": "cpu"} | options))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert_same_bits(weights_of(model), before)
    assert list(folder.iterdir()) == []
    assert not optimizer.state
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._state_dict_hooks for m in model.modules())
    run_steps(model, adamw(model), [{"tokens": tokens(0)}])
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_an_unknown_precision_is_named_with_those_that_are_known(tmp_path: Path) -> None:
    assert_refused(ConfigError, "precision='fp8' is unknown; use one of .*'bf16'", tmp_path, precision="fp8")


@pytest.mark.parametrize("budget", ["device_memory", "host_memory", "disk_space"])
@pytest.mark.parametrize("value", ["8 gibberish", "", "-1GiB", -5])
def test_a_budget_that_cannot_be_parsed_is_named(budget: str, value: str | int, tmp_path: Path) -> None:
    assert_refused(ConfigError, budget, tmp_path, disk=tmp_path, **{budget: value})


@pytest.mark.parametrize("budget", ["device_memory", "host_memory"])
def test_a_budget_that_is_too_small_comes_with_the_smallest_that_would_do(budget: str, tmp_path: Path) -> None:
    budgets = {"device_memory": "64MiB", "host_memory": "64MiB"} | {budget: 1}
    if budget == "host_memory":
        budgets["device_memory"] = 80 * 1024
    assert_refused(BudgetError, rf"smallest {budget}.* is \d+ bytes", tmp_path, disk=tmp_path, **budgets)


def test_a_host_budget_beyond_the_machine_is_refused(tmp_path: Path) -> None:
    assert_refused(BudgetError, "only .* available; lower it", tmp_path, device_memory="64MiB", host_memory="900TiB")


def test_without_a_disk_the_error_proposes_one(tmp_path: Path) -> None:
    assert_refused(BudgetError, "give disk= a folder", tmp_path, device_memory=80 * 1024, host_memory=64 * 1024)


def test_disk_space_without_a_disk_is_refused(tmp_path: Path) -> None:
    assert_refused(ConfigError, "without disk=", tmp_path, disk_space="1GiB")


@pytest.mark.parametrize(
    ("make_optimizer", "match"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), "SGD has no kernel; use torch.optim.AdamW"),
        (lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True), "amsgrad=True.*set it to False"),
        (lambda m: torch.optim.AdamW(m.parameters(), maximize=True), "maximize=True.*set it to False"),
    ],
)
def test_an_optimizer_without_a_kernel_is_refused(make_optimizer: MakeOptimizer, match: str, tmp_path: Path) -> None:
    assert_refused(UnsupportedOptimizerError, match, tmp_path, make_optimizer=make_optimizer)


def test_an_optimizer_of_another_models_parameters_is_refused(tmp_path: Path) -> None:
    other = gpt()
    assert_refused(
        UnsupportedModelError,
        "not the model's",
        tmp_path,
        make_optimizer=lambda m: torch.optim.AdamW(other.parameters()),
    )


def test_a_disk_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert_refused(
        ConfigError, f"{missing}.* is not a folder", tmp_path, disk=missing, device_memory=80 * 1024, host_memory=400 * 1024,
        disk_space="64MiB",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"wait_timeout_s": 0}, "wait"),
    ],
)
def test_numbers_out_of_range_are_named(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    assert_refused(ConfigError, match, tmp_path, **options)
