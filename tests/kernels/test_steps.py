"""What holds for every step kernel: the bits of its oracle, whatever the size, the position and the cut."""

import re
from typing import Any

import numpy as np
import pytest

from offload.kernels import split
from tests.kernels.assembly import assembly_of, hot_loops
from tests.kernels.values import SIZES, Array, assert_same_bits, values_of, without_payload
from tests.kernels.variants import PLAIN_AND_SPLIT, VARIANTS, Variant, make_state, part_of

Form = tuple[str, str, str]
SCALAR = re.compile(
    r"\bv?(sqrt|div|mul|add|sub)s[sd]\b"
    r"|\bvfn?m(add|sub)\d+s[sd]\b"
    r"|\bv?cvt(si2s|ts?s2|ss2|sd2)"
    r"|\bvcvtp[hs]2p[hs]\b[^\n]*%xmm\d+, %xmm"
    r"|\bf(sqrt|div|mul|add|sub|madd|cvt\w*)\s+[sdh]\d"
)
"""Arithmetic or conversion of one element, on x86 and on ARM."""

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
every_form = pytest.mark.parametrize("form", PLAIN_AND_SPLIT, ids="-".join)


def assert_same_state(ours: list[Array], theirs: list[Array], form: Form) -> None:
    for mine, their in zip(ours[:-1], theirs[:-1], strict=True):
        assert_same_bits(mine, their)
    assert_same_bits(without_payload(ours[-1], form[1]), without_payload(theirs[-1], form[1]))


def copies(state: list[Array]) -> list[Array]:
    return [array.copy() for array in state]


def run(variant: Variant, form: Form, state: list[Array], first: int, hyper: tuple[Any, ...]) -> None:
    variant.kernel(*form[:2], master=form[2])(*state, first, *hyper)


@every_variant
@every_form
def test_a_step_of_every_size_has_the_bits_of_the_oracle(
    variant: Variant, form: Form, rng: np.random.Generator
) -> None:
    for numel in (size for size in SIZES if size < 5000):
        for hyper in variant.hypers:
            ours = make_state(variant, numel, form, rng)
            oracle = copies(ours)
            for _ in range(2):
                run(variant, form, ours, 5 * 256, hyper)
                variant.oracle(*oracle, 5 * 256, *hyper, dtypes=form[:2], master=form[2])
            assert_same_state(ours, oracle, form)


@every_variant
@every_form
def test_a_flat_may_be_cut_wherever_it_is_legal(variant: Variant, form: Form, rng: np.random.Generator) -> None:
    numel, base = 4 * 256 + 77, 2**32 - 2 * 256  # element numbers pass 32 bits inside
    state = make_state(variant, numel, form, rng)
    whole = copies(state)
    run(variant, form, whole, base, variant.hypers[0])
    borders = rng.integers(0, numel // variant.cut_numel, (20, 2)) * variant.cut_numel
    for low, high in np.sort(borders, axis=1).tolist():
        cut = copies(state)
        for start, stop in ((0, low), (low, high), (high, numel)):
            run(variant, form, part_of(variant, cut, start, stop), base + start, variant.hypers[0])
        assert_same_state(cut, whole, form)


@every_variant
def test_memory_behind_a_slice_is_left_alone(variant: Variant, rng: np.random.Generator) -> None:
    form = PLAIN_AND_SPLIT[1]
    for numel in (1, 15, 17, 255, 257):
        state = make_state(variant, 1024, form, rng)
        before = copies(state)
        run(variant, form, part_of(variant, state, 256, 256 + numel), 256, variant.hypers[0])
        for start, stop in ((0, 256), (-(-(256 + numel) // variant.cut_numel) * variant.cut_numel, 1024)):
            for a, b in zip(*(part_of(variant, each, start, stop) for each in (state, before)), strict=True):
                assert_same_bits(a, b)


@every_variant
@pytest.mark.parametrize("gradient", ["bf16", "fp32"])
def test_a_split_master_takes_the_same_way_as_a_plain_one_over_many_steps(
    variant: Variant, gradient: str, rng: np.random.Generator
) -> None:
    plain_form, split_form = ((gradient, "bf16", master) for master in ("plain", "split"))
    plain = make_state(variant, 4097, plain_form, rng)
    # From 0x7F7F8000 on they round to Inf; then Inf itself, and NaN.
    positive = np.array([*range(0x7F7F7FF8, 0x7F7F8008), *range(0x7F7FFFF0, 0x7F800004), 0x7FFFFFFF], np.uint32)
    near_infinity = np.concatenate([positive, positive | np.uint32(0x80000000)])
    plain[0].view(np.uint32)[: near_infinity.size] = near_infinity
    weights, remainder = (np.zeros(4097, np.uint16) for _ in range(2))
    split.split_kernel()(plain[0], weights, remainder)
    ours = [remainder, *copies(plain[1:-1]), weights]
    for step in range(12):
        gradients = values_of(4097, gradient, rng, special=step % 4 == 3)
        for state, form in ((plain, plain_form), (ours, split_form)):
            state[-2][:] = gradients
            run(variant, form, state, 0, variant.hypers[0])
        joined = np.zeros(4097, np.float32)
        split.join_kernel()(ours[-1], ours[0], joined)
        np.testing.assert_array_equal(joined.view(np.uint32), plain[0].view(np.uint32))
        for mine, theirs in zip(ours[1:], plain[1:], strict=True):
            assert_same_bits(mine, theirs)


@every_variant
@every_form
def test_hot_loops_are_whole_vectors(variant: Variant, form: Form) -> None:
    assembly = assembly_of(variant.kernel(*form[:2], master=form[2]))
    loops = hot_loops(assembly)
    assert loops
    for loop in loops:
        assert not SCALAR.search(loop), loop
    if "%" in assembly:
        packed = "\n".join(loops)
        if variant.name.startswith(("adam", "ams", "adagrad")):
            assert re.search(r"v?sqrtps[^\n]*%[xyz]mm", packed)
            assert re.search(r"v?divps[^\n]*%[xyz]mm", packed)
        if "fp16" in form[0]:
            assert re.search(r"vcvtph2ps[^\n]*%[yz]mm", packed)
            assert re.search(r"vcvtps2ph[^\n]*%[yz]mm", packed)
        if "bf16" in form[0]:
            assert re.search(r"vpmovzxwd|vpunpck[lh]wd", packed)
