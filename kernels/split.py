"""Split masters: an fp32 master as its bf16 weight and a remainder of 16 bits.

Owns: both directions for whole state tensors.
Does not: step (step.py, Note [Master]).

Note [Split]: u are the master's bits, w the weight's, r the remainder's. w = (u + 0x8000) >> 16 rounds to nearest, ties
away from zero, and r = u & 0xFFFF; back, u = (w << 16) + r with r as a signed number, modulo 2^32: what rounding up
added to w, a negative r takes away. As maps of integers these are a bijection over all 2^32 patterns. As weights, the
NaNs from 0x7FFF8000 and from 0xFFFF8000 on would round to zeros; so a NaN is made 0x7FC00000 before it is split. What
holds: every pattern that is no NaN, infinities included, is restored bit for bit; every NaN is restored as 0x7FC00000;
and the weight is always `Cpu.round_weights` of the master.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types

from offload.kernels.jit import UINT16, UINT16_READ, compiled, emitter, read_from, variant_of, written
from offload.kernels.simd import (
    F32,
    I16,
    I32,
    Cpu,
    Vector,
    Window,
    each_of,
    with_one_nan,
)


def parts_of(cpu: Cpu, bits: Vector) -> tuple[Vector, Vector]:
    """Weight and remainder (i16) of a master's bits (i32) that are no NaN but 0x7FC00000."""
    return cpu.upper_halves(bits + 0x8000), cpu.lower_halves(bits)


def joined(cpu: Cpu, weights: Vector, remainder: Vector) -> Vector:
    """Bits of the master (i32)."""
    return cpu.added_halves(weights, remainder)


@cache
def split_kernel() -> Callable[..., None]:
    """`(master (n,) fp32, weights (n,) uint16, remainder (n,) uint16)`."""
    variant = variant_of("split")

    @compiled(types.void(read_from("fp32"), UINT16, UINT16))
    def split(master: Any, weights: Any, remainder: Any) -> None:
        emit_split(variant, (master, weights, remainder, len(master)))

    return split


@cache
def join_kernel() -> Callable[..., None]:
    """`(weights (n,) uint16, remainder (n,) uint16, master (n,) fp32)`."""
    variant = variant_of("join")

    @compiled(types.void(UINT16_READ, UINT16_READ, written("fp32")))
    def join(weights: Any, remainder: Any, master: Any) -> None:
        emit_join(variant, (weights, remainder, master, len(master)))

    return join


@emitter
def emit_split(builder: Any, cpu: Cpu, words: list[str], master: Any, weights: Any, remainder: Any, numel: Any) -> None:
    """One loop."""

    def emit(window: Window) -> None:
        parts = parts_of(cpu, with_one_nan(window.load(master, F32).to("bitcast", I32)))
        for array, part in zip((weights, remainder), parts, strict=True):
            window.store(array, part)

    each_of(builder, numel, emit)


@emitter
def emit_join(builder: Any, cpu: Cpu, words: list[str], weights: Any, remainder: Any, master: Any, numel: Any) -> None:
    """One loop."""

    def emit(window: Window) -> None:
        window.store(master, joined(cpu, window.load(weights, I16), window.load(remainder, I16)).to("bitcast", F32))

    each_of(builder, numel, emit)
