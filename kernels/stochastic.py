"""Stochastic rounding of fp32 to bf16, for moments kept in 16 bits.

Owns: the random bits and the rounding.
Does not: step (adam.py); seed (the caller: another seed for every step).

A value between two neighbours of bf16 becomes the upper one with a probability in proportion to where it lies, in
steps of 2^-16, so that its expectation is itself. The random bits are a hash of (seed, global number of the element):
they repeat, and do not depend on how a flat parameter is cut into chunks. Inf and NaN stay what they are; finite values
beyond 0x7F7F0000 are truncated, so that no random bit makes an infinity.
"""

from typing import Any, Final

import numpy as np
from numba.extending import register_jitable

from offload.kernels.simd import I16, I32, Vector, Window, numbers, splat, with_one_nan

STATE_TENSORS: Final = ("exp_avg", "exp_avg_sq")
"""Each gets sixteen bits of its own of the hash: the lower, the upper."""

GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
MIX1: Final = np.uint64(0xBF58476D1CE4E5B9)
MIX2: Final = np.uint64(0x94D049BB133111EB)
"""Of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""


@register_jitable
def mixed(word: Any) -> Any:
    """The output function of splitmix64."""
    word = (word ^ (word >> np.uint64(30))) * MIX1
    word = (word ^ (word >> np.uint64(27))) * MIX2
    return word ^ (word >> np.uint64(31))


@register_jitable
def stream_keys(seed: Any, first: Any) -> Any:
    """Keys of 64 bits for the 2^32 elements around element `first`, and for the 2^32 behind them."""
    page = np.uint64(first) >> np.uint64(32)
    start = mixed(np.uint64(seed) + GOLDEN)
    return mixed(start + page * GOLDEN), mixed(start + (page + np.uint64(1)) * GOLDEN)


class RandomBits:
    """Emits 32 random bits for each element of a slice that starts at element `first`."""

    __slots__ = ("_builder", "_first", "_keys")

    def __init__(self, builder: Any, first: Any, key: Any, next_key: Any) -> None:
        self._builder = builder
        self._first = splat(builder, builder.trunc(first, I32))
        self._keys = [self._halves(each) for each in (key, next_key)]

    def of(self, window: Window) -> Vector:
        """The bits of this window's elements."""
        index = splat(self._builder, self._builder.trunc(window.index, I32))
        number = self._first + index + numbers(self._builder)
        wrapped = self._first.above(number)  # behind a multiple of 2^32: a slice crosses one at most
        key0, key1 = (wrapped.choose(after, now) for now, after in zip(*self._keys, strict=True))
        # Constants of a low-bias integer hash (C. Wellons, hash-prospector); the second key keeps the streams of two
        # seeds from being each other's permutation by XOR.
        x = number ^ key0
        x = (x ^ (x >> 16)) * 0x21F0AAAD ^ key1
        x = (x ^ (x >> 15)) * 0xD35A2D97
        return x ^ (x >> 15)

    def _halves(self, key: Any) -> list[Vector]:
        upper = self._builder.lshr(key, key.type(32))
        return [splat(self._builder, self._builder.trunc(half, I32)) for half in (key, upper)]


def round_stochastic(value: Vector, random: Vector, state_tensor: str) -> Vector:
    """bf16 bits of fp32 values, by this state tensor's half of 32 random bits."""
    bits = with_one_nan(value.to("bitcast", I32))
    noise = random & 0xFFFF if state_tensor == STATE_TENSORS[0] else random >> 16
    is_top = (bits & 0x7FFFFFFF).above(0x7F7EFFFF)
    return ((bits + is_top.choose(bits.like(0), noise)) >> 16).to("trunc", I16)
