"""The step kernels against their oracle, against torch, and against themselves cut differently."""

import math
import re
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from offload.kernels import adam, master_copy
from offload.units import BLOCK_NUMEL
from tests.kernels import reference
from tests.kernels.assembly import assembly_of
from tests.kernels.values import DTYPES, SIZES, SPECIAL, Array, assert_same_bits, values_of

KINDS = list(product(DTYPES, DTYPES))
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


def make_state(numel: int, kind: tuple[str, str], rng: np.random.Generator) -> list[Array]:
    """master, exp_avg, exp_avg_sq, gradient, weights_out."""
    master, exp_avg, exp_avg_sq = (values_of(numel, "fp32", rng) for _ in range(3))
    return [master, exp_avg, np.abs(exp_avg_sq), values_of(numel, kind[0], rng), values_of(numel, kind[1], rng)]


def arguments(step: int, *, decoupled: bool, scale: float = 0.5, **changed: float) -> tuple[Any, ...]:
    hyper = {**HYPER, **changed}
    return (*hyper.values(), 1 - hyper["beta1"] ** step, math.sqrt(1 - hyper["beta2"] ** step), scale, decoupled)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_three_steps_give_the_bits_of_the_oracle(
    kind: tuple[str, str], decoupled: bool, rng: np.random.Generator
) -> None:
    for numel in SIZES:
        ours = make_state(numel, kind, rng)
        oracle = [array.copy() for array in ours]
        for step in (1, 2, 3) if numel < BLOCK_NUMEL else (1,):
            adam.step_kernel(*kind)(*ours, 0, *arguments(step, decoupled=decoupled))
            reference.step(*oracle, 0, *arguments(step, decoupled=decoupled), dtypes=kind)
        for mine, theirs in zip(ours[:4], oracle[:4], strict=True):
            assert_same_bits(mine, theirs)
        if kind[1] != "fp16":  # a NaN keeps its payload there
            assert_same_bits(ours[4], reference.round_weights(ours[0], kind[1]))


@pytest.mark.parametrize("changed", [{"beta1": 0.3}, {"beta1": 0.0}, {"weight_decay": 0.0}, {"eps": 0.0}, {"lr": 0.0}])
@pytest.mark.parametrize("decoupled", [True, False])
def test_unusual_hyper_parameters_give_the_bits_of_the_oracle(
    changed: dict[str, float], decoupled: bool, rng: np.random.Generator
) -> None:
    ours = make_state(4097, ("bf16", "bf16"), rng)
    oracle = [array.copy() for array in ours]
    adam.step_kernel("bf16", "bf16")(*ours, 0, *arguments(2, decoupled=decoupled, **changed))
    reference.step(*oracle, 0, *arguments(2, decoupled=decoupled, **changed), dtypes=("bf16", "bf16"))
    for mine, theirs in zip(ours, oracle, strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_bits_do_not_depend_on_where_a_flat_is_cut(kind: tuple[str, str], rng: np.random.Generator) -> None:
    numel = 3 * BLOCK_NUMEL + 13
    state = make_state(numel, kind, rng)
    whole = [array.copy() for array in state]
    kernel = adam.step_kernel(*kind)
    kernel(*whole, 0, *arguments(1, decoupled=True))
    for borders in ([0, 1, 2, 3], [0, 2, 3], [0, 1, 3]):
        cut = [array.copy() for array in state]
        for start, stop in zip(borders, [*borders[1:], numel], strict=True):
            part = slice(start * BLOCK_NUMEL, stop * BLOCK_NUMEL if stop < numel else numel)
            kernel(*(array[part] for array in cut), part.start, *arguments(1, decoupled=True))
        for a, b in zip(whole, cut, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_bits_do_not_depend_on_position_length_or_alignment(kind: tuple[str, str], rng: np.random.Generator) -> None:
    state = make_state(99, kind, rng)
    whole = [array.copy() for array in state]
    kernel = adam.step_kernel(*kind)
    kernel(*whole, 0, *arguments(1, decoupled=False))
    for start, stop in product(range(33), (34, 50, 65, 99)):
        some = [array[start:stop].copy() for array in state]
        kernel(*some, start, *arguments(1, decoupled=False))
        for a, b in zip(whole, some, strict=True):
            assert_same_bits(a[start:stop], b)
        unaligned = [array.copy() for array in state]
        kernel(*(array[start:stop] for array in unaligned), start, *arguments(1, decoupled=False))
        for a, b, before in zip(whole, unaligned, state, strict=True):
            assert_same_bits(b, np.concatenate([before[:start], a[start:stop], before[stop:]]))


def test_the_master_itself_may_be_the_weights(rng: np.random.Generator) -> None:
    two, one = (make_state(1000, ("bf16", "fp32"), np.random.default_rng(5)) for _ in range(2))
    kernel = adam.step_kernel("bf16", "fp32")
    kernel(*two, 0, *arguments(1, decoupled=True))
    kernel(*one[:4], one[0], 0, *arguments(1, decoupled=True))
    assert_same_bits(one[0], two[0])
    assert_same_bits(two[4], two[0])


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("beta1", [0.9, 0.3])
def test_five_steps_agree_with_torch(
    cls: type[torch.optim.AdamW] | type[torch.optim.Adam], beta1: float, rng: np.random.Generator
) -> None:
    numel, decoupled = 16_384, cls is torch.optim.AdamW
    ours = [rng.standard_normal(numel).astype(np.float32), *(np.zeros(numel, np.float32) for _ in range(2))]
    parameter = torch.nn.Parameter(torch.from_numpy(ours[0].copy()))
    optimizer = cls([parameter], lr=1e-2, betas=(beta1, 0.99), weight_decay=0.1, foreach=False)
    for step in range(1, 6):
        gradient = rng.standard_normal(numel).astype(np.float32)
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        adam.step_kernel("fp32", "fp32")(
            *ours, gradient, ours[0], 0, *arguments(step, decoupled=decoupled, scale=1.0, beta1=beta1)
        )
    theirs = [parameter.detach().numpy(), *(optimizer.state[parameter][n].numpy() for n in ("exp_avg", "exp_avg_sq"))]
    # torch's sqrt may be off by one ulp, so an update of up to lr by a few, and near zero a weight of that size is
    # mostly update. L2 feeds the weight back into the moments; without it, they only differ where torch does not fuse.
    np.testing.assert_allclose(ours[0], theirs[0], rtol=2**-21, atol=1e-2 * 2**-20)
    for mine, reference_moment in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(mine, reference_moment, rtol=2**-21, atol=2**-22)


def test_infinite_weights_stay_infinite_without_l2() -> None:
    state = [np.full(3, np.inf, np.float32), *(np.zeros(3, np.float32) for _ in range(4))]
    adam.step_kernel("fp32", "fp32")(*state, 0, *arguments(1, decoupled=True))
    assert np.isinf(state[0]).all()
    assert not state[1].any()  # no 0 * inf has reached the moments


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 17, 4097])
def test_copied_weights_are_rounded_as_a_step_rounds_them(weights: str, numel: int, rng: np.random.Generator) -> None:
    master = values_of(numel, "fp32", rng)
    out = values_of(numel, weights, rng)
    master_copy.copy_weights(master, out, weights)
    finite = ~np.isnan(master)
    assert_same_bits(out[finite], reference.round_weights(master, weights)[finite])
    assert np.isnan(reference.load(out, weights)[~finite]).all()


def test_master_and_bf16_weight_determine_each_other_through_a_remainder(rng: np.random.Generator) -> None:
    bits = np.concatenate([rng.integers(0, 2**32, 100_000, dtype=np.uint32), SPECIAL.view(np.uint32)])
    bits = bits[~np.isnan(bits.view(np.float32))]
    weights = np.zeros(bits.size, np.uint16)
    master_copy.copy_weights(bits.view(np.float32), weights, "bf16")
    remainder = (bits & np.uint32(0xFFFF)).astype(np.uint16).view(np.int16)
    restored = (weights.astype(np.uint32) << np.uint32(16)) + remainder.astype(np.uint32)
    np.testing.assert_array_equal(restored, bits)


def test_bf16_ties_go_away_from_zero_and_nan_becomes_the_one_quiet_nan() -> None:
    bits = np.array([0x3F808000, 0xBF808000, 0x3F818000, 0x7F7F8000, 0xFFFFFFFF, 0x7F800001, 0x00008000], np.uint32)
    out = np.zeros(bits.size, np.uint16)
    master_copy.copy_weights(bits.view(np.float32), out, "bf16")
    np.testing.assert_array_equal(out, [0x3F81, 0xBF81, 0x3F82, 0x7F80, 0x7FC0, 0x7FC0, 0x0001])


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_every_square_root_and_division_is_a_whole_vector(kind: tuple[str, str]) -> None:
    assembly = assembly_of(adam.step_kernel(*kind))
    for operation in ("sqrt", "div"):
        assert not re.search(rf"v?{operation}ss\b|f{operation}\s+s\d", assembly)
        assert re.search(rf"v{operation}ps[^\n]*%[yz]mm|f{operation}\s+v\d+\.4s", assembly)
    if "fp16" in kind and "vdivps" in assembly:
        assert re.search(r"vcvtp[hs]2p[hs][^\n]*%[yz]mm", assembly)
