"""Stochastic rounding of fp32 to bf16, for moments kept in 16 bits.

Owns: the random bits and the rounding.
Does not: step (adam.py); seed (the caller: another seed for every step).

A value between two neighbours of bf16 becomes the upper one with a probability in proportion to where it lies, in
steps of 2^-16, so that its expectation is itself. The random bits are a hash of (seed, global number of the element):
they repeat, and do not depend on how a flat parameter is cut into chunks. Inf and NaN stay what they are; finite values
beyond 0x7F7F0000 are truncated, so that no random bit makes an infinity.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numba.extending import register_jitable

from offload.kernels.simd import (
    I32,
    I64,
    WIDTH,
    Cpu,
    Vector,
    Window,
    call,
    cgutils,
    splat,
    vector_of,
    with_one_nan,
    zeroed_variable,
)

TOP: Final = 0x7F7EFFFF
"""Bits of the largest value that may be rounded up: what lies above, NaNs included, is not."""

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

    __slots__ = ("_builder", "_cpu", "_first", "_key", "_keys", "_number")

    def __init__(self, builder: Any, cpu: Cpu, first: Any, key: Any, next_key: Any) -> None:
        self._builder = builder
        self._cpu = cpu
        self._first = builder.trunc(first, I32)
        self._keys = (key, next_key)
        self._number = zeroed_variable(builder, vector_of(I32))

    def each_page(self, numel: Any, emit: Callable[[Any, Any], None]) -> None:
        """Emit a loop over the two parts of a slice that lie before and behind a multiple of 2^32 elements, of which a
        slice crosses one at most: `emit(start, stop)`, in which every window from `start` on takes bits, in order."""
        builder = self._builder
        before = builder.sub(I64(2**32), builder.zext(self._first, I64))
        border = builder.select(builder.icmp_signed("<", numel, before), numel, before)
        with cgutils.for_range(builder, I64(2)) as loop:
            is_second = builder.icmp_signed("!=", loop.index, I64(0))
            start = builder.select(is_second, border, I64(0))
            key = builder.select(is_second, self._keys[1], self._keys[0])
            halves = (key, builder.lshr(key, key.type(32)))
            self._key = [splat(builder, builder.trunc(half, I32)) for half in halves]
            first = splat(builder, builder.add(self._first, builder.trunc(start, I32)))
            builder.store((first + self._cpu.numbers(builder)).value, self._number)
            emit(start, builder.select(is_second, numel, border))

    def next(self) -> Vector:
        """The bits of the next window's elements."""
        number = Vector(self._builder, self._builder.load(self._number))
        self._builder.store((number + WIDTH).value, self._number)
        # Constants of a low-bias integer hash (C. Wellons, hash-prospector); the second key keeps the streams of two
        # seeds from being each other's permutation by XOR.
        x = number ^ self._key[0]
        x = (x ^ (x >> 16)) * 0x21F0AAAD ^ self._key[1]
        x = (x ^ (x >> 15)) * 0xD35A2D97
        return x ^ (x >> 15)


def store_rounded(
    builder: Any, cpu: Cpu, window: Window, state_tensors: tuple[Any, ...], moments: list[Vector], random: Vector
) -> None:
    """Store moments as bf16 bits, each rounded by its half of 32 random bits.

    Where one of sixteen is not finite or nearly not, which a branch finds out for both moments at once, rounding takes
    more instructions.
    """
    exp_avg, exp_avg_sq = (moment.to("bitcast", I32) for moment in moments)
    noise = (random & 0xFFFF, random >> 16)
    # exp_avg_sq has no sign, unless it is a NaN: as an unsigned number that is above all others.
    largest = call(f"llvm.umax.v{WIDTH}i32", exp_avg & 0x7FFFFFFF, exp_avg_sq)
    with builder.if_else(cpu.any_above(largest, TOP), likely=False) as (special, ordinary):
        with special:
            for state_tensor, moment, each in zip(state_tensors, (exp_avg, exp_avg_sq), noise, strict=True):
                bits = with_one_nan(moment)
                is_top = (bits & 0x7FFFFFFF).above(TOP)
                window.store(state_tensor, cpu.upper_halves(bits + is_top.choose(bits.like(0), each)))
        with ordinary:
            for state_tensor, moment, each in zip(state_tensors, (exp_avg, exp_avg_sq), noise, strict=True):
                window.store(state_tensor, cpu.upper_halves(moment + each))
