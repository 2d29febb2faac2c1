"""Values that kernels are tested on, and how results are compared."""

from typing import Any

import numpy as np

from offload.units import BLOCK_NUMEL
from tests.kernels import reference

Array = np.ndarray[Any, Any]
DTYPES = ("fp32", "bf16", "fp16")
SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 4097, BLOCK_NUMEL - 1, BLOCK_NUMEL, BLOCK_NUMEL + 1, 200_001]
SPECIAL = np.array([0.0, -0.0, 1e-45, -1e-40, 1.2e-38, 6e-8, 65_504, 65_520, 3e38, np.inf, -np.inf, np.nan], np.float32)


def values_of(numel: int, dtype: str, rng: np.random.Generator, *, special: bool = True) -> Array:
    """Values of many magnitudes, every seventh a special one, as an array of `dtype`."""
    values = (rng.standard_normal(numel) * 10.0 ** rng.integers(-4, 4, numel)).astype(np.float32)
    if special:
        values[::7] = rng.choice(SPECIAL, len(values[::7]))
    return reference.round_to_even(values, dtype)


def assert_same_bits(ours: Array, theirs: Array) -> None:
    """Equal bits; a NaN equals a NaN of any payload in fp32, whose payloads IEEE leaves open."""
    if ours.dtype == np.float32:
        nan = np.isnan(ours)
        np.testing.assert_array_equal(nan, np.isnan(theirs))
        ours, theirs = ours[~nan].view(np.uint32), theirs[~nan].view(np.uint32)
    np.testing.assert_array_equal(ours, theirs)


def without_payload(bits: Array, dtype: str) -> Array:
    """The bits with one for all NaNs of a 16-bit dtype, as `assert_same_bits` does for fp32."""
    if dtype == "fp32":
        return bits
    return np.where(np.isnan(reference.load(bits, dtype)), np.uint16(0x7E00), bits)
