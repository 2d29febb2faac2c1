"""State resident on an accelerator: stepped there, and everything else as with homes on the host.

The accelerator is emulated (tests/doubles/stream_device.py): its memory is the host's, and torch's CPU form of the
fused step runs on its streams.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from offload.concurrency.lanes import Lanes, Reason
from offload.concurrency.timeline import Timeline
from offload.config import Precision, make_config
from offload.enable import PlanOf, make_plan, start
from offload.kernels.adam import step_kernel
from offload.kernels.master_copy import copy_weights
from offload.optim import Lion
from offload.optimizer.device_step import STEP_WORKSPACE_ITEMSIZE, DeviceStepper
from offload.optimizer.hyper import AdamHyper
from offload.optimizer.kernel_step import Run
from offload.session import Session
from offload.storage.state_tensors import MASTER, StateTensor, record_bytes, state_tensors_in
from offload.units import Tier
from tests.doubles.smallest_rings import make_smallest_plan
from tests.doubles.stream_device import StreamDevice

ALL, SOME, NONE = "8MiB", "2MiB", "700KiB"
"""Device budgets: for all state of `network`, for that of its first blocks, for none."""

STEPS = 3


class Block(nn.Module):
    """A matrix and three vectors, one of few elements."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 128)
        self.factors = nn.Parameter(torch.ones(128))
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.linear(x) * self.factors).tanh() * self.factor


class Network(nn.Module):
    """Blocks with parameters of two groups, one of which a batch may leave without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(6)])
        self.side = nn.Linear(128, 128)

    def forward(self, x: Tensor, use_side: bool = True) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.side(x) if use_side else x


def network() -> Network:
    torch.manual_seed(5)
    return Network()


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0, "lr": 3e-3}]
    return torch.optim.AdamW(groups, **({"lr": 1e-3, "eps": 1e-6} | options))


@contextmanager
def training(
    model: nn.Module, optimizer: torch.optim.Optimizer, device_memory: str, plan_of: PlanOf = make_plan, **options: Any
) -> Iterator[Session]:
    """A session on the emulated accelerator; the body is its training thread."""
    given = {
        "host_memory": "64MiB", "disk": None, "disk_space": None, "precision": "bf16", "max_grad_norm": None,
        "accumulate": None, "wait_timeout_s": 30.0,
    } | options  # fmt: skip
    devices: list[StreamDevice] = []

    def device_of(name: Any, lanes: Lanes) -> StreamDevice:
        devices.append(StreamDevice(lanes))
        return devices[0]

    config = make_config(device_memory=device_memory, **given)
    session = start(model, optimizer, config, "cpu", device_of=device_of, plan_of=plan_of)
    try:
        with devices[0].operations():
            yield session
    finally:
        session.close()


def tiers(session: Session) -> set[Tier]:
    return {tier for homes in session.plan.homes for tier in homes.state}


def batch(seed: int) -> Tensor:
    return torch.randn(8, 128, generator=torch.Generator().manual_seed(seed))


def train(session: Session, model: nn.Module, steps: range = range(STEPS), **forward: Any) -> list[float]:
    """Norms of the gradients."""
    norms = []
    for seed in steps:
        session.backward(model(batch(seed), **forward).float().square().mean())
        norms.append(session.step().grad_norm)
        assert session.optimizer is not None
        session.optimizer.zero_grad()
    return norms


def masters(session: Session) -> dict[str, Tensor]:
    with _disable_current_modes(), session.gathered() as values:  # on the host, at once
        return {name: value.clone() for name, value in values.items()}


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal to the bound of a step (device_step.py, Note [Device arithmetic]), times what a few steps make of it."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=2**-19, atol=3e-3 * 2**-18, msg=name)


# ---------------------------------------------------------------------------------------------------- homes


def test_a_large_device_budget_keeps_state_on_the_device_by_default_and_a_smaller_one_the_first_in_forward_order() -> (
    None
):
    model = network()
    with training(model, adamw(model), ALL) as session:
        assert tiers(session) == {Tier.DEVICE}
        assert session.plan.host_bytes == session.plan.build_bytes
    with training(model, adamw(model), SOME) as session:
        order = [tier for homes in session.plan.homes for tier in homes.state]
        assert order == sorted(order, key=[Tier.DEVICE, Tier.HOST].index)
        assert set(order) == {Tier.DEVICE, Tier.HOST}
        assert session.metrics()["peak_bytes"]["device"] <= session.plan.device_bytes


@pytest.mark.parametrize(
    ("optimizer_of", "options"),
    [
        (lambda p: Lion(p, lr=1e-4), {}),
        (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), {}),
        (torch.optim.AdamW, {"state_dtype": "8bit"}),
        (torch.optim.AdamW, {"state_dtype": "bf16"}),
    ],
    ids=["Lion", "SGD", "8bit", "bf16"],
)
def test_state_that_cannot_be_stepped_there_stays_on_the_host(
    optimizer_of: Callable[..., torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    model = network()
    with training(model, optimizer_of(model.parameters()), ALL, **options) as session:
        assert tiers(session) == {Tier.HOST}
        train(session, model, range(1))


# ---------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("precision", "accumulate", "device_memory"),
    [("bf16", 1, ALL), ("bf16", None, SOME), ("fp16", 1, SOME), ("fp16", None, ALL), ("fp32", None, SOME)],
)
def test_training_is_that_of_homes_on_the_host(precision: str, accumulate: int | None, device_memory: str) -> None:
    after = []
    for budget in (device_memory, NONE):
        model = network()
        options = {"precision": precision, "accumulate": accumulate, "max_grad_norm": 0.5}
        with training(model, adamw(model), budget, **options) as session:
            assert (Tier.DEVICE in tiers(session)) == (budget != NONE)
            norms = train(session, model)
            after.append((norms, masters(session)))
    np.testing.assert_allclose(after[0][0], after[1][0], rtol=1e-12 if precision == "fp32" else 1e-3)
    assert after[0][0][0] == pytest.approx(after[1][0][0], rel=1e-13)  # of the same gradients, which follow
    assert_near(after[0][1], after[1][1])


@pytest.mark.parametrize(
    "optimizer_of",
    [
        lambda model: adamw(model, amsgrad=True),
        lambda model: adamw(model, maximize=True),
        lambda model: torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-6),
    ],
    ids=["amsgrad", "maximize", "Adam"],
)
def test_every_option_of_adam_is_stepped_there(optimizer_of: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    after = []
    for budget in (ALL, NONE):
        model = network()
        with training(model, optimizer_of(model), budget, precision="fp32") as session:
            assert (Tier.DEVICE in tiers(session)) == (budget == ALL)
            train(session, model)
            after.append(masters(session))
    assert_near(*after)


def test_gradients_accumulate_and_are_left_out_as_on_the_host() -> None:
    after = []
    for budget in (ALL, NONE):
        model = network()
        with training(model, adamw(model), budget) as session:
            assert (Tier.DEVICE in tiers(session)) == (budget == ALL)
            train(session, model, range(1), use_side=False)  # no decay, no step of what has no gradient
            for use_side in (False, True, True):
                model(batch(7 + use_side), use_side=use_side).float().square().mean().backward()
            with _disable_current_modes():
                gradients = session.gathered_gradients()
            norm = session.step().grad_norm
            session.optimizer.zero_grad()
            after.append((norm, gradients, masters(session)))
    assert after[0][0] == pytest.approx(after[1][0], rel=1e-13)
    assert after[0][1].keys() == after[1][1].keys()
    for name, gradient in after[0][1].items():
        assert torch.equal(gradient, after[1][1][name]), name
    assert_near(after[0][2], after[1][2])


def test_a_partition_of_which_a_part_is_stepped_there_is_whole_to_the_next_forward() -> None:
    after = []
    for budget in ("6MiB", "2MiB"):
        torch.manual_seed(3)
        model = nn.Sequential(*(nn.Linear(384, 384) for _ in range(3)))  # three chunks each
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with training(model, optimizer, budget, make_smallest_plan, max_grad_norm=1.0) as session:
            divided = [set(homes.state) == {Tier.DEVICE, Tier.HOST} for homes in session.plan.homes]
            assert any(divided) == (budget != "2MiB")
            inputs = torch.randn(4, 384, generator=torch.Generator().manual_seed(1))
            losses = []
            for _ in range(4):
                loss = model(inputs).float().square().mean()
                session.backward(loss)
                session.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            after.append((losses, masters(session)))
    assert after[0][0] == pytest.approx(after[1][0], rel=1e-2)
    assert_near(after[0][1], after[1][1])


def test_steps_inside_backward_are_the_same() -> None:
    after = []
    for overlap in ("forward", "backward"):
        model = network()
        with training(model, adamw(model), SOME, overlap=overlap, accumulate=1) as session:
            assert tiers(session) == {Tier.DEVICE, Tier.HOST}
            norms = train(session, model)
            after.append((norms, session.weights_sha256()))
    assert after[0] == after[1]


def test_a_gradient_that_is_not_finite_skips_the_step() -> None:
    model = network()
    with training(model, adamw(model), ALL, precision="fp16") as session:
        train(session, model, range(2))
        before, weights = masters(session), session.weights_sha256()
        session.backward(model(batch(0) * 1e4).float().square().mean() * 1e9)
        result = session.step()
        session.optimizer.zero_grad()
        assert result.skipped
        assert "blocks" in result.not_finite or "side" in result.not_finite
        assert session.weights_sha256() == weights
        assert all(torch.equal(value, before[name]) for name, value in masters(session).items())
        with _disable_current_modes():
            steps = {int(s["step"]) for s in session.state_dict()["optimizer"]["state"].values()}
        assert steps == {2}


# ------------------------------------------------------------------------------------------- in and out


def test_masters_and_moments_are_taken_over_and_given_back() -> None:
    plain = network()
    reference = adamw(plain)
    for seed in range(STEPS):
        plain(batch(seed)).square().mean().backward()
        reference.step()
        reference.zero_grad()
    model = network()
    optimizer = adamw(model)
    model(batch(0)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with training(model, optimizer, "12MiB", precision="fp32") as session:
        assert tiers(session) == {Tier.DEVICE}
        train(session, model, range(1, STEPS))
    assert_near(dict(model.named_parameters()), dict(plain.named_parameters()))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert int(optimizer.state[ours]["step"]) == STEPS
        for name in ("exp_avg", "exp_avg_sq"):
            assert_near({name: optimizer.state[ours][name]}, {name: reference.state[theirs][name]})


@pytest.mark.parametrize(("first", "then"), [(ALL, NONE), (NONE, ALL), (ALL, SOME)])
def test_a_checkpoint_goes_on_whatever_the_homes(first: str, then: str, tmp_path: Path) -> None:
    model = network()
    with training(model, adamw(model), first) as session:
        train(session, model, range(2))
        weights, saved = session.weights_sha256(), masters(session)
        with _disable_current_modes():
            session.save(tmp_path)
        train(session, model, range(2, 4))
        expected = masters(session)
    other = network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    with training(other, adamw(other), then) as session:
        with _disable_current_modes():
            session.load(tmp_path)
        assert session.weights_sha256() == weights
        assert all(torch.equal(value, saved[name]) for name, value in masters(session).items())
        train(session, other, range(2, 4))
        assert_near(masters(session), expected)


def test_an_edit_of_masters_at_home_on_the_device_is_taken_over() -> None:
    model = network()
    with training(model, adamw(model), ALL) as session:
        with _disable_current_modes():
            with session.gathered(model.side) as values:
                values["weight" if "weight" in values else "side.weight"].fill_(0.25)
            with session.gathered(model.side) as values:
                assert all((value == 0.25).all() for name, value in values.items() if name.endswith("weight"))
        assert model(batch(0)).shape == (8, 128)
        train(session, model, range(1))


# ------------------------------------------------------------------------------------------------ arithmetic

NUMEL = 70_001
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def hyper_of(**options: Any) -> AdamHyper:
    given = {
        "lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "decoupled": True,
        "maximize": False, "amsgrad": False, "state": "fp32",
    } | options  # fmt: skip
    return AdamHyper(**given)


def step_there(
    values: dict[str, np.ndarray[Any, Any]],
    gradient: np.ndarray[Any, Any],
    hyper: AdamHyper,
    num_steps: int,
    scale: float,
    precision: Precision = Precision.FP32,
) -> tuple[dict[str, np.ndarray[Any, Any]], Tensor]:
    """One step of one chunk by `DeviceStepper`; state and weights after it."""
    lanes = Lanes(Timeline(), wait_timeout_s=30.0)
    try:
        device = StreamDevice(lanes)
        numel = len(gradient)
        state_tensors = (MASTER, *(StateTensor(name, torch.float32) for name in hyper.state_tensors))
        record = device.allocate(record_bytes(state_tensors, numel))
        arrays = state_tensors_in(state_tensors, record, numel)
        for name, array in arrays.items():
            array.copy_(torch.from_numpy(values[name]))
        weights = device.allocate(numel * precision.dtype.itemsize)
        stepper = DeviceStepper(
            workspace=device.allocate(numel * STEP_WORKSPACE_ITEMSIZE), precision=precision,
            gradient_home=Precision.FP32, device=device, lanes=lanes,
        )  # fmt: skip
        mark = stepper.step(
            state_tensors, (record, torch.from_numpy(gradient.copy()).view(torch.uint8), weights),
            [Run(0, numel, 0, num_steps, 0, (numel,), 0)], [hyper],
            numel=numel, scale=scale, compute_done=device.compute.record(), name="step",
        )  # fmt: skip
        lanes.wait(mark.future, Reason.STEP_DONE)
        return {name: array.numpy().copy() for name, array in arrays.items()}, weights.view(precision.dtype)
    finally:
        lanes.close()


def step_on_host(
    values: dict[str, np.ndarray[Any, Any]], gradient: np.ndarray[Any, Any], hyper: AdamHyper, t: int, scale: float
) -> dict[str, np.ndarray[Any, Any]]:
    after = {name: values[name].copy() for name in ("master", *hyper.state_tensors)}
    kernel = step_kernel("fp32", "fp32", amsgrad=hyper.amsgrad)
    kernel(*after.values(), gradient, after["master"].copy(), 0, *hyper.arguments(t, scale))
    return after


def step_as_cuda_does(
    values: dict[str, np.ndarray[Any, Any]], gradient: np.ndarray[Any, Any], hyper: AdamHyper, t: int, scale: float
) -> dict[str, np.ndarray[Any, Any]]:
    """fused_adam_utils.cuh of torch 2.13 written out: constants are doubles, and each assignment rounds to fp32."""
    p, m, v = (values[name].astype(np.float64) for name in ("master", "exp_avg", "exp_avg_sq"))
    g = (gradient * np.float32(-scale if hyper.maximize else scale)).astype(np.float64)
    if hyper.decoupled:
        p = (p - hyper.lr * hyper.weight_decay * p).astype(np.float32)
    else:
        g = (g + p * hyper.weight_decay).astype(np.float32).astype(np.float64)
    after = {
        "exp_avg": (hyper.beta1 * m + (1 - hyper.beta1) * g).astype(np.float32),
        "exp_avg_sq": (hyper.beta2 * v + (1 - hyper.beta2) * g * g).astype(np.float32),
    }
    largest = after["exp_avg_sq"]
    if hyper.amsgrad:
        largest = after["max_exp_avg_sq"] = np.maximum(values["max_exp_avg_sq"], largest)
    denominator = np.sqrt(largest) / np.float32(math.sqrt(1 - hyper.beta2**t)) + np.float32(hyper.eps)
    step_size = np.float32(hyper.lr / (1 - hyper.beta1**t))
    after["master"] = np.asarray(p, np.float32) - step_size * after["exp_avg"] / denominator
    return after


def ulps(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.spacing(np.maximum(np.abs(values), np.finfo(np.float32).tiny).astype(np.float32)).astype(np.float64)


@pytest.mark.parametrize("step", [step_there, step_as_cuda_does], ids=["CPU form", "CUDA form"])
@pytest.mark.parametrize("num_steps", [1, 7, 100_000])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"decoupled": False}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.0},
        {"beta1": 0.3, "eps": 1e-3, "lr": 2e-5},
    ],
    ids=str,
)  # fmt: skip
def test_a_step_agrees_with_the_hosts_kernel_within_the_stated_ulps(
    step: Callable[..., Any], num_steps: int, options: dict[str, Any], rng: np.random.Generator
) -> None:
    hyper, scale = hyper_of(**options), 0.37
    gradient = (rng.standard_normal(NUMEL) * 10.0 ** rng.integers(-6, 2, NUMEL)).astype(np.float32)
    before = {"master": (rng.standard_normal(NUMEL) * 10.0 ** rng.integers(-4, 1, NUMEL)).astype(np.float32)}
    begun = num_steps > 1
    before["exp_avg"] = (gradient * rng.standard_normal(NUMEL) * begun).astype(np.float32)
    before["exp_avg_sq"] = (gradient.astype(np.float64) ** 2 * rng.random(NUMEL) * 3 * begun).astype(np.float32)
    before["max_exp_avg_sq"] = (before["exp_avg_sq"] * rng.random(NUMEL) * 2).astype(np.float32)
    host = step_on_host(before, gradient, hyper, num_steps, scale)
    stepped = step(before, gradient, hyper, num_steps, scale)
    there = stepped[0] if isinstance(stepped, tuple) else stepped
    error = {name: np.abs(host[name].astype(np.float64) - there[name]) for name in host}
    decay = 0.0 if hyper.decoupled else hyper.weight_decay
    largest = np.maximum(np.abs(gradient) * scale + decay * np.abs(before["master"]), np.abs(before["exp_avg"]))
    assert (error["exp_avg"] <= 2 * ulps(largest)).all()
    squared = (1 - hyper.beta2) * (np.abs(gradient) * scale + decay * np.abs(before["master"])) ** 2
    for name in hyper.state_tensors[1:]:  # without decay by L2 the square is part of it
        assert (error[name] <= 8 * ulps(np.maximum(host[name], squared))).all()
    denominator = np.sqrt(host[hyper.state_tensors[-1]]) / math.sqrt(1 - hyper.beta2**num_steps) + hyper.eps
    update = hyper.lr / (1 - hyper.beta1**num_steps) * largest / denominator
    masters = np.maximum(np.abs(before["master"]), np.abs(host["master"]))
    assert (error["master"] <= 2 * ulps(masters) + 8 * ulps(update)).all()
    assert not np.array_equal(host["master"], before["master"])


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16, Precision.FP32])
def test_new_weights_are_the_master_rounded_as_the_host_rounds_it(
    precision: Precision, rng: np.random.Generator
) -> None:
    # every upper half, and with it the lower halves around a tie; signalling NaNs do not come out of arithmetic
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = ((np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] | lower).reshape(-1)
    master = bits.view(np.float32)
    master = master[~(np.isnan(master) & (bits & 0x0040_0000 == 0))].copy()
    zeros = {name: np.zeros(len(master), np.float32) for name in MOMENTS}
    nothing = hyper_of(lr=0.0, weight_decay=0.0)
    after, weights = step_there(
        {"master": master} | zeros, np.zeros(len(master), np.float32), nothing, 1, 1.0, precision
    )
    np.testing.assert_array_equal(after["master"], master)
    expected = torch.empty(len(master), dtype=precision.dtype)
    kind = torch.float32 if precision is Precision.FP32 else torch.uint16
    copy_weights(master, expected.view(kind).numpy(), precision.value)
    nan = expected.isnan()
    assert torch.equal(weights.isnan(), nan)
    assert torch.equal(weights[~nan].view(kind), expected[~nan].view(kind))
