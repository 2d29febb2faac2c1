"""Every step kernel with what it is checked against: the table that the tests of steps run over."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from offload.kernels import adagrad, adam, lion, sgd
from tests.kernels import reference
from tests.kernels.values import Array, values_of

Kind = tuple[str, str]


@dataclass(frozen=True)
class Variant:
    """One kernel: how it is made, its oracle, its state tensors, and some sets of hyper-parameters."""

    name: str
    kernel: Callable[..., Callable[..., None]]
    oracle: Callable[..., None]
    state_tensors: tuple[str, ...]
    hypers: tuple[tuple[Any, ...], ...]
    cut_numel: int = 1
    """Slices start at multiples of this."""

    def __str__(self) -> str:
        return self.name


ADAM_HYPERS = tuple(
    (1e-2, beta1, 0.99, 1e-8, 0.1, 1 - beta1**2, math.sqrt(1 - 0.99**2), 0.5, decoupled)
    for decoupled, beta1 in ((True, 0.9), (False, 0.9), (True, 0.3))
)


def _adam(name: str, *state_tensors: str, cut_numel: int = 1, more: tuple[int, ...] = (), **form: Any) -> Variant:
    kernel, oracle = partial(adam.step_kernel, **form), partial(reference.step, **form)
    return Variant(name, kernel, oracle, state_tensors, tuple((*hyper, *more) for hyper in ADAM_HYPERS), cut_numel)


VARIANTS = (
    _adam("adam", "fp32", "positive"),
    _adam("amsgrad", "fp32", "positive", "positive", amsgrad=True),
    _adam("adam-bf16", "bf16", "positive-bf16", state="bf16", more=(77 - 2**40,)),
    _adam("adam-8bit", "codes", "scales", "codes", "scales", state="8bit", cut_numel=256),
    Variant(
        "lion", lion.step_kernel, reference.lion, ("fp32",),
        ((1e-2, 0.9, 0.99, 0.1, 0.5), (1e-2, 0.9, 0.99, 0.0, -1.0)),
    ),
    Variant(
        "adagrad", adagrad.step_kernel, reference.adagrad, ("positive",),
        ((1e-2, 1e-8, 0.1, 0.5), (1e-2, 1e-8, 0.0, 1.0)),
    ),
    Variant(
        "sgd-momentum", sgd.step_kernel, reference.sgd, ("fp32",),
        (
            (1e-2, 0.9, 0.1, 0.1, 0.5, True, False), (1e-2, 0.9, 0.0, 0.0, 0.5, False, False),
            (1e-2, 0.9, 0.1, 0.1, 1.0, True, True),
        ),
    ),
    Variant(
        "sgd", partial(sgd.step_kernel, momentum=False), reference.sgd_without_momentum, (),
        ((1e-2, 0.1, 0.5), (1e-2, 0.0, 0.5)),
    ),
)  # fmt: skip

PLAIN_AND_SPLIT = (
    ("bf16", "bf16", "plain"),
    ("bf16", "bf16", "split"),
    ("fp16", "fp16", "plain"),
    ("fp32", "fp32", "plain"),
)


def state_tensor(kind: str, numel: int, rng: np.random.Generator, *, special: bool) -> Array:
    if kind == "codes":
        return rng.integers(0, 256, numel).astype(np.uint8)
    if kind == "scales":
        scales = (10.0 ** rng.integers(-8, 2, -(-numel // 256))).astype(np.float32)
        scales[3::5] = 0.0
        return scales
    values = values_of(numel, "bf16" if "bf16" in kind else "fp32", rng, special=special)
    if "positive" not in kind:
        return values
    return values & np.uint16(0x7FFF) if values.dtype == np.uint16 else np.abs(values)


def make_state(
    variant: Variant, numel: int, form: tuple[str, str, str], rng: np.random.Generator, *, special: bool = True
) -> list[Array]:
    """Array 0, the state tensors, gradient, weights; `form`: dtypes of gradient and weights, form of the master."""
    gradient, weights, master = form
    masters = values_of(numel, "fp32", rng, special=special)
    weight_bits = reference.round_weights(masters, weights)
    array0 = masters
    if master == "split":
        array0 = np.zeros(numel, np.uint16)
        reference.split(masters, weight_bits, array0)
    state_tensors = [state_tensor(each, numel, rng, special=special) for each in variant.state_tensors]
    # One infinite gradient would make a block of 256 NaN: special ones stay rare enough to see finite blocks, too.
    gradients = values_of(numel, gradient, rng, special=special and "codes" not in variant.state_tensors)
    return [array0, *state_tensors, gradients, weight_bits]


def part_of(variant: Variant, state: list[Array], start: int, stop: int) -> list[Array]:
    """The slices [start, stop) of a state's arrays."""
    scales = {1 + i for i, each in enumerate(variant.state_tensors) if each == "scales"}
    return [a[start // 256 : -(-stop // 256)] if i in scales else a[start:stop] for i, a in enumerate(state)]
