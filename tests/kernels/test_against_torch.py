"""Step kernels against torch.optim in fp32: several steps from nothing, within a few ulps.

torch's sqrt may be off by one ulp and its tails may not fuse; everything else is the same operation in the same order.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from offload.kernels import adagrad, adam, lion, sgd
from tests.kernels.values import Array, assert_same_bits

NUMEL = 16_384
STEPS = 6


def torch_steps(
    optimizer_of: Callable[..., torch.optim.Optimizer], start: Array, gradients: list[Array]
) -> Iterator[Any]:
    """After each step the parameter and its state."""
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = optimizer_of([parameter], foreach=False)
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        yield parameter.detach().numpy(), optimizer.state[parameter]


@pytest.fixture
def start(rng: np.random.Generator) -> Array:
    return rng.standard_normal(NUMEL).astype(np.float32)


@pytest.fixture
def gradients(rng: np.random.Generator) -> list[Array]:
    return [(rng.standard_normal(NUMEL) * 10.0 ** rng.integers(-3, 2)).astype(np.float32) for _ in range(STEPS)]


def near(ours: Array, theirs: Array, *, scale: float) -> None:
    """Equal to 2^-20 of themselves, or of the size of an update where update and weight nearly cancel."""
    np.testing.assert_allclose(ours, theirs, rtol=2**-20, atol=scale * 2**-20)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("amsgrad", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_adam(decoupled: bool, amsgrad: bool, maximize: bool, start: Array, gradients: list[Array]) -> None:
    cls = torch.optim.AdamW if decoupled else torch.optim.Adam
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "amsgrad": amsgrad, "maximize": maximize}
    p, state_tensors = start.copy(), [np.zeros(NUMEL, np.float32) for _ in range(2 + amsgrad)]
    kernel = adam.step_kernel("fp32", "fp32", amsgrad=amsgrad)
    for t, (theirs, state) in enumerate(torch_steps(partial(cls, **options), start, gradients), 1):
        correction = (1 - 0.9**t, math.sqrt(1 - 0.99**t))
        sign = -1.0 if maximize else 1.0
        kernel(p, *state_tensors, gradients[t - 1], p, 0, 1e-2, 0.9, 0.99, 1e-8, 0.1, *correction, sign, decoupled)
        near(p, theirs, scale=1e-2)
        for name, state_tensor in zip(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), state_tensors, strict=False):
            np.testing.assert_allclose(state_tensor, state[name].numpy(), rtol=2**-19, atol=2**-19)


@pytest.mark.parametrize("decoupled", [True, False])
def test_maximising_is_exactly_minimising_with_negated_gradients(
    decoupled: bool, start: Array, gradients: list[Array]
) -> None:
    runs = []
    for sign in (1.0, -1.0):
        p, m, v = start.copy(), np.zeros(NUMEL, np.float32), np.zeros(NUMEL, np.float32)
        for t, gradient in enumerate(gradients, 1):
            hyper = (1e-2, 0.9, 0.99, 1e-8, 0.1, 1 - 0.9**t, math.sqrt(1 - 0.99**t), sign * 0.25, decoupled)
            adam.step_kernel("fp32", "fp32")(p, m, v, gradient * np.float32(sign), p, 0, *hyper)
        runs.append([p, m, v])
    for minimised, maximised in zip(*runs, strict=True):
        assert_same_bits(minimised, maximised)


def test_amsgrad_keeps_a_nan_as_torch_does() -> None:
    largest = np.array([np.nan, 1.0, 1.0, 5.0], np.float32)
    p, m, v = np.ones(4, np.float32), np.zeros(4, np.float32), np.array([1, np.nan, 3, 3], np.float32)
    expected = torch.maximum(torch.from_numpy(largest), torch.from_numpy(v)).numpy()
    kernel = adam.step_kernel("fp32", "fp32", amsgrad=True)
    kernel(p, m, v, largest, np.zeros(4, np.float32), p, 0, 0.1, 0.9, 1.0, 1e-8, 0.0, 1.0, 1.0, 1.0, True)
    assert_same_bits(largest, expected)


@pytest.mark.parametrize("lr_decay", [0.0, 0.1])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adagrad(lr_decay: float, weight_decay: float, start: Array, gradients: list[Array]) -> None:
    options = {"lr": 0.1, "lr_decay": lr_decay, "weight_decay": weight_decay, "initial_accumulator_value": 0.5}
    p, total = start.copy(), np.full(NUMEL, 0.5, np.float32)
    steps = torch_steps(partial(torch.optim.Adagrad, **options), start, gradients)
    for t, (theirs, state) in enumerate(steps):
        clr = 0.1 / (1 + t * lr_decay)
        adagrad.step_kernel("fp32", "fp32")(p, total, gradients[t], p, 0, clr, 1e-10, weight_decay, 1.0)
        near(p, theirs, scale=0.1)
        np.testing.assert_allclose(total, state["sum"].numpy(), rtol=2**-19)


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"), [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)]
)
def test_sgd_has_torchs_bits(
    momentum: float, dampening: float, nesterov: bool, weight_decay: float, maximize: bool, start: Array,
    gradients: list[Array],
) -> None:  # fmt: skip
    options = {
        "lr": 0.1, "momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": weight_decay,
        "maximize": maximize,
    }  # fmt: skip
    p, buffer = start.copy(), np.full(NUMEL, np.nan, np.float32)  # whatever lay there before the first step
    kernel = sgd.step_kernel("fp32", "fp32", momentum=momentum != 0)
    sign = -1.0 if maximize else 1.0
    for t, (theirs, state) in enumerate(torch_steps(partial(torch.optim.SGD, **options), start, gradients)):
        if momentum:
            kernel(p, buffer, gradients[t], p, 0, 0.1, momentum, dampening, weight_decay, sign, nesterov, t == 0)
            assert_same_bits(buffer, state["momentum_buffer"].numpy())
        else:
            kernel(p, gradients[t], p, 0, 0.1, weight_decay, sign)
        assert_same_bits(p, theirs)


def test_lion_has_the_bits_of_its_authors_code_run_by_torch(start: Array, gradients: list[Array]) -> None:
    gradients[0][:100] = 0.0
    gradients[1][50] = np.nan
    p, m = start.copy(), np.zeros(NUMEL, np.float32)
    theirs, exp_avg = torch.from_numpy(start.copy()), torch.zeros(NUMEL)
    for gradient in gradients:
        g = torch.from_numpy(gradient)
        theirs.mul_(1 - 1e-2 * 0.1)
        theirs.add_((exp_avg * 0.9 + g * (1 - 0.9)).sign_(), alpha=-1e-2)
        exp_avg.mul_(0.99).add_(g, alpha=1 - 0.99)
        lion.step_kernel("fp32", "fp32")(p, m, gradient, p, 0, 1e-2, 0.9, 0.99, 0.1, 1.0)
        assert_same_bits(p, theirs.numpy())
        assert_same_bits(m, exp_avg.numpy())
