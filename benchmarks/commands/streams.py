"""The bytes of a fused step without its arithmetic: what step kernels are compared with.

Owns: one pass that reads and writes three fp32 arrays, reads a 16-bit one and writes a 16-bit one, as adam.step_kernel
with 16-bit gradients and weights does: 28 bytes an element.
Does not: measure (adam_contenders.py). What its time measures: the bandwidth that this pattern of five streams reaches
with this machine's memory and these vectors. A step that takes as long is limited by memory, not by its arithmetic.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types

from offload.kernels.jit import compiled, emitter, read_from, variant_of, written
from offload.kernels.simd import F32, MEMORY, Cpu, Window, each_of


@cache
def streams_kernel(weights: str) -> Callable[..., None]:
    """`(a, b, c (n,) fp32; gradient (n,), weights (n,) of dtype `weights`; first)`: bf16 or fp16.

    a, b and c each grow by the gradient; the weights become a, rounded to nearest even. Sliced as a step's arrays are.
    """
    if weights not in ("bf16", "fp16"):
        raise ValueError(f"streams of 28 bytes have weights of 16 bits: bf16 or fp16, not {weights!r}.")
    variant = variant_of(weights)
    fp32 = written("fp32")

    @compiled(types.void(fp32, fp32, fp32, read_from(weights), written(weights), types.int64))
    def streams(a: Any, b: Any, c: Any, gradient: Any, weights: Any, first: Any) -> None:
        emit_streams(variant, (a, b, c, gradient, weights, len(a)))

    return streams


@emitter
def emit_streams(
    builder: Any, cpu: Cpu, words: list[str], a: Any, b: Any, c: Any, gradient: Any, weights: Any, numel: Any
) -> None:
    """One loop."""
    dtype = words[0]

    def emit(window: Window) -> None:
        g = cpu.widen(dtype, window.load(gradient, MEMORY[dtype]))
        sums = [window.load(array, F32) + g for array in (a, b, c)]
        for array, total in zip((a, b, c), sums, strict=True):
            window.store(array, total)
        window.store(weights, cpu.round_to_even(dtype, sums[0]))

    each_of(builder, numel, emit)
