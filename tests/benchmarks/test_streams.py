"""The streams that `offload bench adam` compares kernels with."""

import numpy as np
import pytest

from benchmarks.commands import streams
from tests.kernels import reference
from tests.kernels.values import SIZES, assert_same_bits, values_of, without_payload


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_streams_have_the_bits_of_the_oracle(dtype: str, rng: np.random.Generator) -> None:
    for numel in SIZES[:12]:
        ours = [*(values_of(numel, "fp32", rng) for _ in range(3)), *(values_of(numel, dtype, rng) for _ in range(2))]
        oracle = [array.copy() for array in ours]
        streams.streams_kernel(dtype)(*ours, 0)
        reference.streams(*oracle, 0, dtype=dtype)
        for mine, theirs in zip(ours[:4], oracle[:4], strict=True):
            assert_same_bits(mine, theirs)
        assert_same_bits(without_payload(ours[4], dtype), without_payload(oracle[4], dtype))


def test_streams_exist_for_weights_of_16_bits_alone() -> None:
    with pytest.raises(ValueError, match="bf16 or fp16, not 'fp32'"):
        streams.streams_kernel("fp32")
