"""Moments in bf16 and in eight bits."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from offload.kernels import adam, dynamic_map, moments
from tests.kernels import reference
from tests.kernels.values import SIZES, Array, assert_same_bits, values_of

# ------------------------------------------------------------------------------------------------- bf16, stochastic


def stored_bf16(exp_avg: Array, *, seed: int, beta1: float = 0.0) -> tuple[Array, Array]:
    """Both moments as a step stores them that makes exp_avg (1 - beta1) times what is given, exp_avg_sq its square."""
    n = exp_avg.size
    state_tensors = [np.zeros(n, np.uint16) for _ in range(2)]
    weights, remainder = (np.zeros(n, np.uint16) for _ in range(2))
    adam.step_kernel("fp32", "bf16", master="split", state="bf16")(
        remainder, *state_tensors, exp_avg, weights, 0, 0.0, beta1, 0.0, 1e-8, 0.0, 1.0, 1.0, 1.0, True, seed
    )
    return state_tensors[0], state_tensors[1]


@pytest.mark.parametrize("value", [1.0 + 3 / 1024, -(1.0 + 5 / 1024), 3.14159e-20, 1.1e-40])
def test_the_mean_of_what_is_stored_is_what_was_to_be_stored(value: float) -> None:
    values = np.full(1 << 17, value, np.float32)
    for state_tensor, exact in zip(stored_bf16(values, seed=3), (values[0], values[0] * values[0]), strict=True):
        stored = reference.load(state_tensor, "bf16").astype(np.float64)
        low, high = stored.min(), stored.max()
        if low == high:  # a value of bf16 itself, as a square that underflows
            assert low == exact
            continue
        share = (float(exact) - low) / (high - low)
        deviation = (share * (1 - share) / values.size) ** 0.5
        assert abs((stored == high).mean() - share) < 5 * deviation


def test_every_element_state_tensor_and_seed_draws_bits_of_its_own() -> None:
    values = np.full(1 << 16, 1.0 + 1 / 256, np.float32)  # half-way: up or down with equal chance
    draws = []
    for seed in (1, 2):
        exp_avg, exp_avg_sq = stored_bf16(values, seed=seed)
        draws += [exp_avg == exp_avg.max(), exp_avg_sq == exp_avg_sq.max()]
        share = [float(np.mean(d)) for d in draws[-2:]]
        assert abs(share[0] - 0.5) < 0.01
    draws += [np.roll(draws[0], 1), np.roll(draws[0], 16)]
    signs = np.array(draws[:1] + draws[2:3] + draws[4:]) * 2.0 - 1.0
    correlation = signs @ signs.T / values.size
    np.testing.assert_allclose(correlation, np.eye(len(signs)), atol=5 / 256)


def test_a_seed_repeats_its_bits_and_another_does_not(rng: np.random.Generator) -> None:
    values = values_of(4097, "fp32", rng)
    first, again, other = (stored_bf16(values, seed=seed)[0] for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_what_is_not_finite_stays_so_and_what_is_finite_stays_finite() -> None:
    bad = np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFF80FFFF], np.uint32).view(np.float32)
    good = np.array([0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F0001, 0x7F7EFFFF], np.uint32).view(np.float32)
    for seed in range(50):
        stored = reference.load(stored_bf16(bad, seed=seed, beta1=0.75)[0], "bf16")
        assert stored[:2].tolist() == [np.inf, -np.inf]
        assert np.isnan(stored[2:]).all()
        stored = reference.load(stored_bf16(good, seed=seed)[0], "bf16")
        np.testing.assert_allclose(stored, good, rtol=2**-7)


def test_values_of_bf16_are_stored_as_they_are() -> None:
    bits = np.arange(65_536, dtype=np.uint32).astype(np.uint16)
    values = reference.load(bits, "bf16")
    finite = np.isfinite(values)
    np.testing.assert_array_equal(stored_bf16(values, seed=9)[0][finite], bits[finite])


# ----------------------------------------------------------------------------------------------------------- 8 bits


def published_map(signed: bool) -> Array:
    """The 256 sorted entries as the paper's library fills them, in fp64."""
    entries = []
    for i in range(7):
        borders = np.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1)
        middles = 10.0 ** (i - 6) * (borders[:-1] + borders[1:]) / 2
        entries += [*middles.tolist(), *((-middles).tolist() if signed else [])]
    return np.sort(np.array([*entries, 0.0, 1.0]))


def decoded(codes: Array, scales: Array, kind: str) -> Array:
    values = np.zeros(codes.size, np.float32)
    moments.decode_kernel(kind)(codes, scales, values)
    return values


def encoded(values: Array, kind: str) -> tuple[Array, Array]:
    codes, scales = np.zeros(values.size, np.uint8), np.zeros(-(-values.size // 256), np.float32)
    moments.encode_kernel(kind)(values, codes, scales)
    return codes, scales


@pytest.mark.parametrize("kind", moments.MAPS)
def test_the_256_entries_are_those_of_the_published_map(kind: str) -> None:
    entries = published_map(kind == "signed")
    assert len(entries) == 256
    ours = decoded(np.arange(256, dtype=np.uint8), np.ones(1, np.float32), kind)
    np.testing.assert_allclose(ours, entries, rtol=2**-23, atol=0)
    assert ours[-1] == 1.0


@pytest.mark.parametrize("kind", moments.MAPS)
def test_the_code_changes_at_the_very_float_where_the_next_entry_is_nearer(kind: str) -> None:
    signed = kind == "signed"
    up = [Fraction(entry) for entry in dynamic_map.entries_of(signed)]
    entries = [*(-entry for entry in up[-2:0:-1]), *up] if signed else up
    probes, expected = [1e6], [255]
    for code, (low, high) in enumerate(pairwise(entries)):
        middle = (low + high) / 2
        steps = np.array([float(middle)], np.float32).view(np.int32) + np.arange(-50, 51, dtype=np.int32)
        for probe in steps.astype(np.int32).view(np.float32).tolist():
            is_upper = Fraction(probe) > middle or (Fraction(probe) == middle and middle > 0)
            probes.append(probe)
            expected.append(code + is_upper)
    # 1e6 in every block makes the scale 1e6 and the factor 1: probes are in the units of the borders.
    blocks = -(-len(probes) // 255)
    values = np.full((blocks, 256), 1e6, np.float32)
    values[:, 1:].flat[: len(probes)] = probes
    codes, scales = encoded(values.ravel(), kind)
    assert (scales == 1e6).all()
    np.testing.assert_array_equal(codes.reshape(blocks, 256)[:, 1:].ravel()[: len(probes)], expected)


@pytest.mark.parametrize("kind", moments.MAPS)
def test_codes_never_fall_where_values_rise(kind: str) -> None:
    bits = np.arange(0x3D000000, 0x49742400, 199, dtype=np.uint32)  # from 0.03 to 1e6, every 199th float
    values = np.full((-(-bits.size // 255), 256), 1e6, np.float32)
    values[:, 1:].flat[: bits.size] = bits.view(np.float32)
    codes = encoded(values.ravel(), kind)[0].reshape(-1, 256)[:, 1:].ravel()[: bits.size]
    assert (np.diff(codes.astype(int)) >= 0).all()
    # With the test before: what rises in steps whose 255 positions are right is right everywhere between.
    assert len(np.unique(codes)) == (129 if kind == "signed" else 256)


@pytest.mark.parametrize("kind", moments.MAPS)
def test_a_round_trip_gives_the_nearest_entry_and_a_second_one_nothing_new(kind: str, rng: np.random.Generator) -> None:
    for numel in SIZES[:12]:
        values = (rng.standard_normal(numel) * 10.0 ** rng.integers(-7, 1, numel)).astype(np.float32)
        values = values if kind == "signed" else np.abs(values)
        values[::256] = 10.0  # the largest of its block, positive: there is no code for -1
        codes, scales = encoded(values, kind)
        oracle = [np.zeros_like(codes), np.zeros_like(scales), np.zeros_like(values)]
        reference.encode_8bit(values, *oracle[:2], signed=kind == "signed")
        reference.decode_8bit(*oracle, signed=kind == "signed")
        back = decoded(codes, scales, kind)
        for mine, theirs in zip((codes, scales, back), oracle, strict=True):
            assert_same_bits(mine, theirs)
        entries = published_map(kind == "signed")
        for start in range(0, numel, 256):
            part, scale = values[start : start + 256].astype(np.float64), float(scales[start // 256])
            error = np.abs(back[start : start + 256] - part)
            least = np.abs(part[:, None] - entries * scale).min(axis=1)
            assert (error <= least + 2**-21 * np.abs(part)).all()
        np.testing.assert_array_equal(encoded(back, kind)[0], codes)


@pytest.mark.parametrize("kind", moments.MAPS)
def test_a_block_of_zeros_has_scale_0_and_stays_zero_and_so_do_zeroed_state_tensors(kind: str) -> None:
    codes, scales = encoded(np.zeros(600, np.float32), kind)
    assert not scales.any()
    assert not decoded(codes, scales, kind).any()
    assert not decoded(np.zeros(600, np.uint8), np.zeros(3, np.float32), kind).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [256, 300, 511])
def test_what_is_not_finite_makes_its_own_block_nan_and_no_other(bad: float, position: int) -> None:
    values = np.ones(1000, np.float32)
    values[position] = bad
    codes, scales = encoded(values, "signed")
    assert scales.view(np.uint32)[1] == 0x7FC00000
    back = decoded(codes, scales, "signed")
    assert np.isnan(back[256:512]).all()
    assert (np.delete(back, np.s_[256:512]) == 1.0).all()


@pytest.mark.parametrize("largest", [1e-45, 1e-38, 2.0**-107, 2.0**-106, 1e-30, 1.0, 3.4e38])
def test_blocks_of_every_magnitude_are_finite(largest: float) -> None:
    values = (np.linspace(0, 1, 256) * largest).astype(np.float32)
    back = decoded(*encoded(values, "unsigned"), "unsigned")
    np.testing.assert_allclose(back, values, rtol=0.2, atol=max(float(values[-1]), 2.0**-106) / 200)
    if largest >= 2.0**-106:
        assert back[-1] == values[-1]


def test_values_behind_the_last_element_have_no_part_in_its_scale() -> None:
    state_tensors = [
        np.zeros(3, np.uint8),
        np.full(1, 1e30, np.float32),
        np.zeros(3, np.uint8),
        np.full(1, 1e30, np.float32),
    ]
    state_tensors[0][:], state_tensors[2][:] = (
        127,
        0,
    )  # zeros under a large scale; behind them a zeroed code would be -0.99 * 1e30
    p, gradient = np.ones(3, np.float32), np.full(3, 1e-3, np.float32)
    adam.step_kernel("fp32", "fp32", state="8bit")(
        p, *state_tensors, gradient, p, 0, 1e-2, 0.9, 0.99, 1e-8, 0.0, 0.1, 0.1, 1.0, True
    )
    assert state_tensors[1][0] == pytest.approx(1e-4)
    assert state_tensors[3][0] == pytest.approx(1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state": "4bit"}, r"'4bit'.*fp32, bf16, 8bit"),
        ({"state": "8bit", "amsgrad": True}, "amsgrad"),
        ({"master": "half"}, r"'half'.*plain, split"),
        ({"master": "split"}, "needs weights bf16, not fp16"),
    ],
)
def test_a_form_that_does_not_exist_is_named_with_what_there_is(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adam.step_kernel("bf16", "fp16", **arguments)
