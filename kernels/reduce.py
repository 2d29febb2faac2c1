"""Sums of squares and gradient offload: the passes over gradients.

Owns: fp64 sums over segments, conversion and accumulation of gradients in the same pass.
Does not: cut segments (offload/partition.py).

A sum has sixteen accumulators: element i of the segment is added to accumulator i % 16, and the accumulators are then
added by halves. Squares of fp32 values are exact in fp64, so a sum depends on the segment's values alone, not on the
CPU or on where the segment lies.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types

from offload.kernels.jit import VECTOR_OF_FLOAT64, VECTOR_OF_INT64, compiled, emitter, read_from, variant_of, written
from offload.kernels.simd import F64, MEMORY, Cpu, Vector, Window, each_window, vector_of, zeroed_variable


@cache
def square_sums_kernel(values: str) -> Callable[..., None]:
    """`(values (n,), starts (k,), stops (k,), out (k,) fp64)`: the sum of squares of each segment.

    Segments hold up to BLOCK_NUMEL elements. A sum is not finite exactly where an element is not: squares of fp32 do
    not overflow fp64.
    """
    variant = variant_of(values)

    @compiled(types.void(read_from(values), VECTOR_OF_INT64, VECTOR_OF_INT64, VECTOR_OF_FLOAT64))
    def square_sums(values: Any, starts: Any, stops: Any, out: Any) -> None:
        for k in range(len(starts)):
            emit_square_sum(variant, (values, starts[k], stops[k], out, k))

    return square_sums


@cache
def store_kernel(source: str, home: str, add: bool) -> Callable[..., None]:
    """`(source (n,), home (n,), starts (k,), stops (k,), out (k,) fp64)`, one pass.

    In the segments, and nowhere else, home = source, or home + source in fp32; rounded to nearest, ties to even,
    where home has 16 bits. out = the sums of squares of what home then holds.
    """
    variant = variant_of(source, home, "add" if add else "set")

    @compiled(types.void(read_from(source), written(home), VECTOR_OF_INT64, VECTOR_OF_INT64, VECTOR_OF_FLOAT64))
    def store(source: Any, home: Any, starts: Any, stops: Any, out: Any) -> None:
        for k in range(len(starts)):
            emit_store(variant, (source, home, starts[k], stops[k], out, k))

    return store


class SquareSum:
    """Emits a sum of squares in fp64 over windows."""

    __slots__ = ("_builder", "_sums")

    def __init__(self, builder: Any) -> None:
        self._builder = builder
        self._sums = zeroed_variable(builder, vector_of(F64))

    def add(self, values: Vector) -> None:
        """Add the squares of fp32 values."""
        wide = values.to("fpext", F64)
        self._builder.store((Vector(self._builder, self._builder.load(self._sums)) + wide * wide).value, self._sums)

    def store(self, out: Any, position: Any) -> None:
        """out[position] = the sum."""
        total = Vector(self._builder, self._builder.load(self._sums)).total()
        self._builder.store(total, self._builder.gep(out, [position]))


@emitter
def emit_square_sum(
    builder: Any, cpu: Cpu, words: list[str], values: Any, start: Any, stop: Any, out: Any, position: Any
) -> None:
    """One segment."""
    total = SquareSum(builder)

    def emit(window: Window) -> None:
        total.add(cpu.widen(words[0], window.load(values, MEMORY[words[0]])))

    each_window(builder, start, stop, emit)
    total.store(out, position)


@emitter
def emit_store(
    builder: Any, cpu: Cpu, words: list[str], source: Any, home: Any, start: Any, stop: Any, out: Any, position: Any
) -> None:
    """One segment."""
    source_dtype, home_dtype, mode = words
    total = SquareSum(builder)

    def emit(window: Window) -> None:
        raw = window.load(source, MEMORY[source_dtype])
        value = cpu.widen(source_dtype, raw)
        if mode == "add":
            value = cpu.widen(home_dtype, window.load(home, MEMORY[home_dtype])) + value
        kept = raw if mode == "set" and source_dtype == home_dtype else cpu.round_to_even(home_dtype, value)
        window.store(home, kept)
        total.add(cpu.widen(home_dtype, kept))

    each_window(builder, start, stop, emit)
    total.store(out, position)
