"""The mean over ranks of a shard of a gradient.

Owns: the sum of the ranks' contributions in fp32, in rank order, times 1/W, and one rounding.
Does not: move contributions between ranks (offload/ranks/collectives.py).

An element's bits depend on its contributions alone: on no library's algorithm, and not on how a caller cuts.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types

from offload.kernels.jit import compiled, element_of, emitter, variant_of, written
from offload.kernels.simd import (
    F32,
    I64,
    MEMORY,
    Cpu,
    Vector,
    Window,
    cgutils,
    each_of,
    splat,
    vector_of,
    zeroed_variable,
)


@cache
def mean_of_shards_kernel(dtype: str) -> Callable[..., None]:
    """`(received (W, n), out (n,), scale fp32)`: out = (received[0] + received[1] + …) * scale, row by row in fp32;
    rounded to nearest, ties to even, where the dtype has 16 bits. W is 1 or more.
    """
    variant = variant_of(dtype)

    @compiled(types.void(types.Array(element_of(dtype), 2, "C", readonly=True), written(dtype), types.float32))
    def mean_of_shards(received: Any, out: Any, scale: Any) -> None:
        emit_mean(variant, (received, out, scale, len(received), len(out)))

    return mean_of_shards


@emitter
def emit_mean(
    builder: Any, cpu: Cpu, words: list[str], received: Any, out: Any, scale: Any, num_rows: Any, numel: Any
) -> None:
    """All rows of one window, then the next window."""
    dtype = words[0]
    scales = splat(builder, scale)

    def emit(window: Window) -> None:
        # The first row is taken as it is: 0.0 + -0.0 would lose a sign.
        total = zeroed_variable(builder, vector_of(F32))
        builder.store(cpu.widen(dtype, window.load(received, MEMORY[dtype])).value, total)
        with cgutils.for_range_slice(builder, I64(1), num_rows, I64(1), intp=I64) as (row, _):
            values = window.load(builder.gep(received, [builder.mul(row, numel)]), MEMORY[dtype])
            builder.store((Vector(builder, builder.load(total)) + cpu.widen(dtype, values)).value, total)
        mean = Vector(builder, builder.load(total)) * scales
        window.store(out, cpu.round_to_even(dtype, mean))

    each_of(builder, numel, emit)
