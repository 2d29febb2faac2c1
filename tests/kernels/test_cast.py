"""Casts against torch and against the oracle."""

import re
from itertools import product

import numpy as np
import pytest
import torch

from offload.kernels import cast
from tests.kernels import reference
from tests.kernels.assembly import assembly_of
from tests.kernels.values import DTYPES, SIZES, Array, assert_same_bits, values_of, without_payload

PAIRS = list(product(DTYPES, DTYPES))
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def empty(numel: int, dtype: str) -> Array:
    return np.zeros(numel, np.float32 if dtype == "fp32" else np.uint16)


def torch_cast(source: Array, pair: tuple[str, str]) -> Array:
    tensor = torch.from_numpy(source).view(TORCH[pair[0]]).to(TORCH[pair[1]])
    return tensor.numpy() if pair[1] == "fp32" else tensor.view(torch.uint16).numpy()


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[0] != "fp32"], ids="-to-".join)
def test_all_65536_patterns_are_cast_as_torch_does(pair: tuple[str, str]) -> None:
    source = np.arange(65_536, dtype=np.uint32).astype(np.uint16)
    target = empty(source.size, pair[1])
    cast.cast_kernel(*pair)(source, target)
    theirs = torch_cast(source, pair)
    assert_same_bits(without_payload(target, pair[1]), without_payload(theirs, pair[1]))


@pytest.mark.parametrize("target", ["bf16", "fp16"])
def test_values_near_every_rounding_border_are_cast_as_torch_does(target: str) -> None:
    middle = reference.load(np.arange(65_536, dtype=np.uint32).astype(np.uint16), target).view(np.uint32)
    half = 0x8000 if target == "bf16" else 0x1000
    offsets = np.array([0, 1, half - 1, half, half + 1, 2 * half - 1], np.uint32)
    subnormal_halves = np.arange(0x33000000 - 99, 0x38800000, 1021, dtype=np.uint32)
    source = np.concatenate([(middle[:, None] + offsets).ravel(), subnormal_halves]).view(np.float32)
    ours = empty(source.size, target)
    cast.cast_kernel("fp32", target)(source, ours)
    theirs = torch_cast(source, ("fp32", target))
    assert_same_bits(without_payload(ours, target), without_payload(theirs, target))


@pytest.mark.parametrize("pair", PAIRS, ids="-to-".join)
def test_casts_of_every_size_give_the_bits_of_the_oracle_and_write_nothing_else(
    pair: tuple[str, str], rng: np.random.Generator
) -> None:
    for numel in SIZES:
        source = values_of(numel + 1, pair[0], rng)
        ours = values_of(numel + 5, pair[1], rng)
        oracle = ours.copy()
        cast.cast_kernel(*pair)(source[1:], ours[3 : 3 + numel])
        reference.cast(source[1:], oracle[3 : 3 + numel], dtypes=pair)
        assert_same_bits(without_payload(ours, pair[1]), without_payload(oracle, pair[1]))


def test_memory_without_write_access_can_be_cast_from() -> None:
    source, target = np.ones(20, np.float32), empty(20, "bf16")
    source.flags.writeable = False
    cast.cast_kernel("fp32", "bf16")(source, target)
    assert (target == 0x3F80).all()


def test_an_unknown_dtype_is_named_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'fp8'.*fp32, bf16, fp16"):
        cast.cast_kernel("fp8", "fp32")


@pytest.mark.parametrize("pair", [("fp32", "fp16"), ("fp16", "fp32")], ids="-to-".join)
def test_half_conversions_use_the_instruction(pair: tuple[str, str]) -> None:
    assert re.search(r"vcvtp[hs]2p[hs][^\n]*%[yz]mm|fcvtn|fcvtl", assembly_of(cast.cast_kernel(*pair)))
