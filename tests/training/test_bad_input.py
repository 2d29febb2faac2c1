"""Bad input: our own exception with a remedy, the model as it was, nothing on disk."""

import contextlib
import logging
import os
import re
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import nn

import offload
from offload.disk import nameless
from offload.errors import (
    BudgetError,
    ConfigError,
    DiskError,
    DiskFullError,
    UnsupportedModelError,
    UnsupportedOptimizerError,
)
from offload.planning.hardware import free_disk_bytes
from offload.units import MIB
from tests.doubles.small_disk import file_system_of, may_mount
from tests.training.models import GPT, gpt, tokens
from tests.training.oracle import LR, PLENTY, adamw, assert_same_bits, enable, run_steps, weights_of

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]

ON_DISK: Final = {"device_memory": 80 * 1024, "host_memory": 400 * 1024}
"""Budgets that leave the disk something to hold."""


def assert_refused(
    kind: type[Exception], match: str, folder: Path, *, make_optimizer: MakeOptimizer = adamw, **options: Any
) -> None:
    """`enable` raises `kind`, leaves model and folder as they were, and the model trains on without it."""
    model = gpt()
    before = weights_of(model)
    assert_model_refused(kind, match, folder, model, make_optimizer(model), **options)
    assert_same_bits(weights_of(model), before)
    run_steps(model, adamw(model), [{"tokens": tokens(0)}])
    assert not torch.equal(model.head.weight, before["head.weight"])


def assert_model_refused(
    kind: type[Exception],
    match: str,
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    **options: Any,
) -> str:
    """`enable` raises `kind` and leaves parameters, hooks, optimizer and folder as they were; returns the message."""
    before = [(parameter, parameter.device, parameter.dtype) for parameter in model.parameters()]
    num_hooks = hooks(model)
    with pytest.raises(kind, match=match) as raised:
        offload.enable(model, optimizer, **({"precision": "fp32", "device": "cpu"} | options))
    after = [(parameter, parameter.device, parameter.dtype) for parameter in model.parameters()]
    assert all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(after, before, strict=True))
    assert list(folder.iterdir()) == []
    assert optimizer is None or not optimizer.state
    assert hooks(model) == num_hooks
    return str(raised.value)


def hooks(model: nn.Module) -> list[tuple[int, int, int]]:
    """How many of each kind every module has."""
    return [(len(m._forward_pre_hooks), len(m._forward_hooks), len(m._state_dict_hooks)) for m in model.modules()]


# ------------------------------------------------------------------------------------------- arguments and budgets


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


def test_a_device_budget_beyond_the_machine_is_refused_where_the_cpu_is_the_device(tmp_path: Path) -> None:
    match = "device_memory is 900.00 TiB, but the device is the CPU.*only .* available; lower it"
    assert_refused(BudgetError, match, tmp_path, device_memory="900TiB", host_memory="64MiB")


def test_disk_space_beyond_what_is_free_is_refused(tmp_path: Path) -> None:
    wanted = free_disk_bytes([tmp_path]) + 2**40
    match = f"disk_space is .*, but {tmp_path} has only .* free; lower it"
    assert_refused(BudgetError, match, tmp_path, disk=tmp_path, disk_space=wanted, **ON_DISK)


def test_without_a_disk_the_error_proposes_one(tmp_path: Path) -> None:
    assert_refused(BudgetError, "give disk= a folder", tmp_path, device_memory=80 * 1024, host_memory=64 * 1024)


def test_disk_space_without_a_disk_is_refused(tmp_path: Path) -> None:
    assert_refused(ConfigError, "without disk=", tmp_path, disk_space="1GiB")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", 3.5])
def test_a_device_that_torch_does_not_know_is_named(device: Any, tmp_path: Path) -> None:
    match = re.escape(f"device={device!r} is not a device; name one as 'cuda', 'cuda:1' or 'cpu'")
    assert_refused(ConfigError, match, tmp_path, device=device, device_memory=PLENTY)


def test_a_device_without_memory_is_no_device_to_train_on(tmp_path: Path) -> None:
    assert_refused(ConfigError, "device='meta'", tmp_path, device="meta", device_memory=PLENTY)


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


# -------------------------------------------------------------------------------------------- optimizer and groups


@pytest.mark.parametrize(
    ("make_optimizer", "match"),
    [
        (lambda m: torch.optim.LBFGS(m.parameters()), "optimizer LBFGS .*use torch.optim.AdamW"),
        (lambda m: torch.optim.SparseAdam(m.parameters()), "SparseAdam has no kernel.*use torch.optim.AdamW"),
        (lambda m: torch.optim.Adam(m.parameters(), capturable=True), "capturable=True.*set it to False"),
        (lambda m: torch.optim.SGD(m.parameters(), differentiable=True), "differentiable=True.*set it to False"),
    ],
)
def test_an_optimizer_that_cannot_step_here_is_refused(
    make_optimizer: MakeOptimizer, match: str, tmp_path: Path
) -> None:
    assert_refused(UnsupportedOptimizerError, match, tmp_path, make_optimizer=make_optimizer)


def test_an_optimizer_of_another_models_parameters_is_refused(tmp_path: Path) -> None:
    other = gpt()
    assert_refused(
        UnsupportedModelError,
        "not the model's",
        tmp_path,
        make_optimizer=lambda m: torch.optim.AdamW(other.parameters()),
    )


def test_a_parameter_in_two_groups_is_named_with_both(tmp_path: Path) -> None:
    def twice(model: nn.Module) -> torch.optim.Optimizer:
        assert isinstance(model, GPT)
        optimizer = torch.optim.AdamW([{"params": list(model.blocks.parameters())}, {"params": [model.head.weight]}])
        optimizer.param_groups[1]["params"].append(model.blocks[2].qkv.weight)  # add_param_group would refuse it
        return optimizer

    match = r"'blocks\.2\.qkv\.weight' is in the optimizer twice, in groups 0 and 1,.*take it out of one"
    assert_refused(ConfigError, match, tmp_path, make_optimizer=twice, device_memory=PLENTY)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_twice_in_one_group_is_refused(tmp_path: Path) -> None:
    def twice(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([*model.parameters(), next(model.parameters())])

    match = r"'embedding\.weight' is in the optimizer twice, in groups 0 and 0"
    assert_refused(ConfigError, match, tmp_path, make_optimizer=twice, device_memory=PLENTY)


def test_parameters_missing_from_the_optimizer_are_logged_and_each_gradient_is_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = gpt()
    optimizer = torch.optim.AdamW(model.blocks.parameters(), lr=LR)
    missing = [model.embedding.weight, *model.norm.parameters(), model.head.weight]
    with caplog.at_level(logging.WARNING, "offload"), enable(model, optimizer, "host", tmp_path) as session:
        said = [record.getMessage() for record in caplog.records if record.name == "offload"]
        assert set(said) == {"4 parameters require gradients but are in no optimizer group: they stay as they are"}
        caplog.clear()
        run_steps(model, optimizer, [{"tokens": tokens(seed)} for seed in range(3)])
        assert session.timeline.counter("gradients of parameters outside the optimizer") == 3 * len(missing)
        assert all(parameter.grad is None for parameter in missing)
    assert caplog.records == []  # said once, not at every step


# ----------------------------------------------------------------------------------------------- models


class LazyModel(nn.Module):
    """Its first layer learns its shape from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LazyLinear(8), nn.Linear(8, 1)


class ComplexModel(nn.Module):
    """A filter in the frequency domain."""

    def __init__(self, *, trainable: bool) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.full((8,), 1j, dtype=torch.complex64), requires_grad=trainable)
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.fft.ifft(torch.fft.fft(x) * self.spectrum).imag).sum()


class ExpandedModel(nn.Module):
    """One number shown in eight places."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1).expand(8))
        self.head = nn.Linear(8, 1)


def test_parameters_on_several_devices_are_refused(tmp_path: Path) -> None:
    model = gpt()
    with offload.deferred_init():
        model.head = nn.Linear(32, 96, bias=False)
    match = "several devices: 'head.weight' is on meta .*'embedding.weight' is on cpu; build the whole model inside"
    assert_model_refused(UnsupportedModelError, match, tmp_path, model, adamw(model), device_memory=PLENTY)


def test_a_lazy_parameter_is_named(tmp_path: Path) -> None:
    match = "'first.weight' is lazy .*call the model once"
    assert_model_refused(UnsupportedModelError, match, tmp_path, LazyModel(), None, device_memory=PLENTY)


def test_a_trainable_complex_parameter_is_refused_and_a_frozen_one_stays(tmp_path: Path) -> None:
    model = ComplexModel(trainable=True)
    match = "'spectrum' has dtype torch.complex64 .*real and imaginary parts"
    assert_model_refused(UnsupportedModelError, match, tmp_path, model, adamw(model), device_memory=PLENTY)
    expected, model = ComplexModel(trainable=False), ComplexModel(trainable=False)
    expected.load_state_dict(model.state_dict())
    x = torch.linspace(0, 1, 8)
    with enable(model, torch.optim.AdamW(model.head.parameters()), "host", tmp_path):
        assert torch.equal(model(x), expected(x))


def test_an_expanded_parameter_is_refused(tmp_path: Path) -> None:
    match = "'scale' shows one element in all its places.*clone it"
    assert_model_refused(UnsupportedModelError, match, tmp_path, ExpandedModel(), None, device_memory=PLENTY)


@pytest.mark.parametrize("home", ["device", "host", "disk"])
def test_a_model_in_a_session_is_refused_and_that_session_trains_on(home: str, tmp_path: Path) -> None:
    expected, model = gpt(), gpt()
    batches = [{"tokens": tokens(seed)} for seed in range(2)]
    with enable(expected, optimizer := adamw(expected), "device", tmp_path):
        run_steps(expected, optimizer, batches)
    optimizer = adamw(model)
    with enable(model, optimizer, home, tmp_path):
        run_steps(model, optimizer, batches[:1])
        with pytest.raises(UnsupportedModelError, match="another session holds the model"):
            offload.enable(model, optimizer, device="cpu", device_memory=PLENTY)
        run_steps(model, optimizer, batches[1:])
    assert_same_bits(weights_of(model), weights_of(expected))


# ------------------------------------------------------------------------------------------------- the disk


def test_a_disk_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert_refused(ConfigError, f"{missing}.* is not a folder", tmp_path, disk=missing, disk_space="64MiB", **ON_DISK)


@pytest.mark.parametrize("folder", ["/sys", "/proc"])
def test_a_disk_folder_that_cannot_be_written_is_named(folder: str, tmp_path: Path) -> None:
    """Nobody can make files in these two, root neither."""
    match = rf"disk='{folder}' cannot be written \(.+\); give this user the right to write, or name another folder"
    assert_refused(ConfigError, match, tmp_path, disk=folder, **ON_DISK)


@contextlib.contextmanager
def folder_of_another_file_system(than: Path) -> Iterator[Path]:
    """A new folder, in memory or on whatever else is mounted where everybody may write."""
    for root in ("/dev/shm", "/var/tmp", "/run/lock", os.getcwd()):  # noqa: PTH109
        if os.access(root, os.W_OK) and Path(root).stat().st_dev != than.stat().st_dev:
            with tempfile.TemporaryDirectory(dir=root) as folder:
                yield Path(folder)
            return
    raise AssertionError("this machine has one file system only")


def test_one_disk_of_two_that_is_too_full_is_named_with_needed_and_free_bytes(tmp_path: Path) -> None:
    """The two together have room for the model, the smaller has not room for its half: seen before anything is made."""
    with folder_of_another_file_system(tmp_path) as other:
        small, large = sorted((tmp_path, other), key=lambda folder: free_disk_bytes([folder]))
        small_bytes, sum_bytes = free_disk_bytes([small]), free_disk_bytes([small, large])
        wanted_bytes = min(2.5 * small_bytes, small_bytes + 0.47 * sum_bytes)
        numel = 1 << 24
        with offload.deferred_init():
            model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(int(wanted_bytes / 20 / numel))))
        message = assert_model_refused(
            DiskFullError, rf"{small}: the swap files need", large, model, torch.optim.AdamW(model.parameters()),
            device_memory=256 * MIB, host_memory=512 * MIB, disk=[small, large],
        )  # fmt: skip
        assert list(small.iterdir()) == []
    found = re.search(r"need (\d+) bytes .*, free are (\d+) .*Free some space, lower disk_space", message)
    assert found is not None, message
    assert int(found[1]) > int(found[2]) == pytest.approx(small_bytes, rel=0.05)


@contextlib.contextmanager
def files_of_at_most(num_bytes: int, at: Path) -> Iterator[Path]:
    """No file of this process may be longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes - 1, before[1]))
    try:
        yield at
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


FULL: Final = [
    pytest.param(files_of_at_most, DiskError, r"could not be made: .*File too large", id="a limit on files"),
    # Not a skip: on a machine where nobody may mount there is no such case, and the other two tests still run.
    *(
        [pytest.param(file_system_of, DiskFullError, r"need \d+ bytes .*free are \d+", id="tmpfs")]
        if may_mount()
        else []
    ),
]


@pytest.mark.parametrize(("full", "kind", "match"), FULL)
def test_a_disk_that_fills_up_while_the_swap_file_is_made_gets_everything_back(
    full: Any, kind: type[Exception], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nameless, "can_be_had", lambda folder: False)  # files without a name need no lock file
    model = gpt()
    with offload.enable(model, adamw(model), device="cpu", precision="fp32", disk=tmp_path, **ON_DISK) as session:
        needed_bytes = session.plan.disk_bytes
    with full(needed_bytes, tmp_path) as folder:  # the lock file is what does not fit
        assert_refused(kind, match, folder, disk=folder, disk_space=needed_bytes, **ON_DISK)
    assert list(tmp_path.iterdir()) == []
