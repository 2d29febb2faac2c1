"""The mean over ranks, against numpy's sums in rank order."""

import re
from itertools import product

import numpy as np
import pytest

from offload.kernels import mean
from tests.kernels import reference
from tests.kernels.assembly import assembly_of, hot_loops
from tests.kernels.values import DTYPES, SIZES, Array, assert_same_bits, values_of, without_payload


def oracle(received: Array, dtype: str) -> Array:
    """Sums in fp32 in the order of ranks, times 1/W, one rounding to even."""
    total = reference.load(received[0], dtype).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for row in received[1:]:
            total = total + reference.load(row, dtype).astype(np.float32)
        return reference.round_to_even(total * np.float32(1.0 / len(received)), dtype)


def mean_of(received: Array, dtype: str) -> Array:
    out = np.full(received.shape[1], 77, received.dtype)
    mean.mean_of_shards_kernel(dtype)(received, out, 1.0 / len(received))
    return out


@pytest.mark.parametrize(("dtype", "num_ranks"), list(product(DTYPES, (1, 2, 3, 4, 8))))
def test_the_mean_has_the_bits_of_sums_in_rank_order(dtype: str, num_ranks: int, rng: np.random.Generator) -> None:
    for numel in SIZES:
        received = np.stack([values_of(numel, dtype, rng) for _ in range(num_ranks)])
        assert_same_bits(
            without_payload(mean_of(received, dtype), dtype), without_payload(oracle(received, dtype), dtype)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_on_one_rank_is_not_finite_in_the_mean(dtype: str) -> None:
    bad = np.array([np.nan, np.inf, -np.inf, np.inf, 1.0], np.float32)
    other = np.array([1.0, 1.0, 1.0, -np.inf, 3.0], np.float32)
    for rows in ([bad, other], [other, bad]):
        result = mean_of(np.stack([reference.round_to_even(row, dtype) for row in rows]), dtype)
        expected = np.array([np.nan, np.inf, -np.inf, np.nan, 2.0], np.float32)
        np.testing.assert_array_equal(reference.load(result, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_negative_zero_on_all_ranks_stays_one(dtype: str) -> None:
    zeros = np.stack([reference.round_to_even(np.full(17, -0.0, np.float32), dtype)] * 3)
    np.testing.assert_array_equal(mean_of(zeros, dtype), zeros[0])


def test_the_order_of_ranks_decides_where_sums_round() -> None:
    large, small = np.full(5, 2.0**25, np.float32), np.full(5, 1.0, np.float32)
    assert mean_of(np.stack([large, -large, small]), "fp32")[0] == np.float32(1 / 3)
    assert mean_of(np.stack([large, small, -large]), "fp32")[0] == 0.0


def test_sums_of_halves_that_their_dtype_cannot_hold_have_a_finite_mean() -> None:
    largest = np.full((4, 33), 0x7BFF, np.uint16)  # 65504, the largest fp16
    np.testing.assert_array_equal(mean_of(largest, "fp16"), largest[0])


def test_rows_are_only_read_also_where_memory_is_mapped_without_write_access(rng: np.random.Generator) -> None:
    received = np.stack([values_of(100, "bf16", rng) for _ in range(2)])
    before = received.copy()
    received.flags.writeable = False
    mean_of(received, "bf16")
    np.testing.assert_array_equal(received, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_added_in_whole_vectors(dtype: str) -> None:
    assembly = assembly_of(mean.mean_of_shards_kernel(dtype))
    assert any(re.search(r"vaddps[^\n]*%[yz]mm|fadd\s+v\d+\.4s", loop) for loop in hot_loops(assembly))
    assert not re.search(r"vaddss|fadd\s+s\d", assembly)
