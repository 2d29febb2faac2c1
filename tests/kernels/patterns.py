"""A kernel that tries split masters on every pattern of 32 bits."""

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types

from offload.kernels.jit import compiled, emitter, variant_of
from offload.kernels.simd import (
    F32,
    I32,
    I64,
    WIDTH,
    Cpu,
    Vector,
    Window,
    each_window,
    splat,
    vector_of,
    with_one_nan,
    zeroed_variable,
)
from offload.kernels.split import joined, parts_of


@cache
def count_wrong_kernel() -> Callable[..., None]:
    """`(start, stop, out (3,) int64)`: over the patterns of 32 bits in [start, stop), start and stop in 0 .. 2^32:

    out[0] += those whose parts, taken without regard to NaN, do not give them back;
    out[1] += those that, split as a master, are not restored as Note [Split] says;
    out[2] += those whose weight is another than that of `Cpu.round_weights`. At most 2^31 patterns in a call.
    """
    variant = variant_of("count")

    @compiled(types.void(types.int64, types.int64, types.Array(types.int64, 1, "C")))
    def count(start: Any, stop: Any, out: Any) -> None:
        emit_count(variant, (start, stop, out))

    return count


@emitter
def emit_count(builder: Any, cpu: Cpu, words: list[str], start: Any, stop: Any, out: Any) -> None:
    """Sixteen counters of 32 bits for each question."""
    counters = [zeroed_variable(builder, vector_of(I32)) for _ in range(3)]

    def emit(window: Window) -> None:
        bits = splat(builder, builder.trunc(window.index, I32)) + cpu.numbers(builder)
        canonical = with_one_nan(bits)
        weights, remainder = parts_of(cpu, canonical)
        wrong = (
            joined(cpu, *parts_of(cpu, bits)) ^ bits,
            joined(cpu, weights, remainder) ^ canonical,
            (cpu.round_weights("bf16", bits.to("bitcast", F32)) ^ weights).to("zext", I32),
        )
        for counter, each in zip(counters, wrong, strict=True):
            one = each.above(0).choose(each.like(1), each.like(0))
            builder.store(
                (Vector(builder, builder.load(counter)) + window.existing(one, cpu.numbers(builder))).value, counter
            )

    each_window(builder, start, stop, emit)
    for position, counter in enumerate(counters):
        for i in range(WIDTH):
            element = builder.extract_element(builder.load(counter), I32(i))
            target = builder.gep(out, [I64(position)])
            builder.store(builder.add(builder.load(target), builder.zext(element, I64)), target)
