"""Sums of squares and gradient offload, against the oracle."""

import math
import re
from itertools import product

import numpy as np
import pytest

from offload.kernels import reduce
from offload.units import BLOCK_NUMEL
from tests.kernels import reference
from tests.kernels.assembly import assembly_of
from tests.kernels.values import DTYPES, SIZES, assert_same_bits, values_of, without_payload

PAIRS = list(product(DTYPES, DTYPES))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_have_the_bits_of_the_oracle_and_the_value_of_an_exact_sum(dtype: str, rng: np.random.Generator) -> None:
    for numel in (size for size in SIZES if size <= BLOCK_NUMEL):
        values = values_of(numel + 3, dtype, rng, special=False)
        starts, stops = np.array([3, 0, 2]), np.array([numel + 3, numel, 2])
        ours, oracle = np.full(3, 7.0), np.zeros(3)
        reduce.square_sums_kernel(dtype)(values, starts, stops, ours)
        reference.square_sums(values, starts, stops, oracle, dtype=dtype)
        np.testing.assert_array_equal(ours, oracle)
        exact = math.fsum((reference.load(values[3:], dtype).astype(np.float64) ** 2).tolist())
        assert ours[0] == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_element_makes_its_own_sum_not_finite_wherever_it_stands(dtype: str, bad: float) -> None:
    for position in range(100):
        values = np.ones(200, np.float32)
        values[position] = bad
        out = np.zeros(2)
        bits = reference.round_to_even(values, dtype)
        reduce.square_sums_kernel(dtype)(bits, np.array([0, 100]), np.array([100, 200]), out)
        assert not math.isfinite(out[0])
        assert out[1] == 100.0


def test_a_block_of_the_largest_values_has_a_finite_sum() -> None:
    values = np.full(BLOCK_NUMEL, np.finfo(np.float32).max, np.float32)
    out = np.zeros(1)
    reduce.square_sums_kernel("fp32")(values, np.array([0]), np.array([BLOCK_NUMEL]), out)
    assert math.isfinite(out[0])


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("pair", PAIRS, ids="-to-".join)
def test_offloading_writes_its_segments_alone_and_sums_what_they_then_hold(
    pair: tuple[str, str], add: bool, rng: np.random.Generator
) -> None:
    source, home = values_of(70_000, pair[0], rng), values_of(70_000, pair[1], rng)
    starts, stops = np.array([3, 50, 51, 200, 66_001]), np.array([50, 50, 99, 4300, 70_000])
    oracle, sums, expected = home.copy(), np.zeros(5), np.zeros(5)
    reduce.store_kernel(*pair, add)(source, home, starts, stops, sums)
    reference.store(source, oracle, starts, stops, expected, dtypes=pair, add=add)
    assert_same_bits(without_payload(home, pair[1]), without_payload(oracle, pair[1]))
    np.testing.assert_array_equal(sums, expected)
    again = np.zeros(5)
    reduce.square_sums_kernel(pair[1])(home, starts, stops, again)
    np.testing.assert_array_equal(sums, again)


def test_a_sum_that_overflows_the_home_is_not_finite() -> None:
    home, out = np.full(5, 0x7BFF, np.uint16), np.zeros(1)  # 65504, the largest fp16
    reduce.store_kernel("fp16", "fp16", True)(home.copy(), home, np.array([0]), np.array([5]), out)
    assert math.isinf(out[0])


@pytest.mark.parametrize(
    "pair", [("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32")], ids="-to-".join
)
def test_offloading_adds_squares_in_whole_vectors(pair: tuple[str, str]) -> None:
    assembly = assembly_of(reduce.store_kernel(*pair, True))
    assert re.search(r"vaddpd[^\n]*%[yz]mm|fadd\s+v\d+\.2d", assembly)
    assert re.search(r"vmulpd[^\n]*%[yz]mm|fmul\s+v\d+\.2d", assembly)
    assert not re.search(r"vmulsd", assembly)
