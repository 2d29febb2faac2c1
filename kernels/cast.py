"""Casts between fp32, bf16 and fp16.

Owns: torch's casts, bit for bit: to nearest, ties to even, subnormals kept, overflow to infinity.
Does not: make working weights from masters (master_copy.py: bf16 ties away from zero).

A NaN stays a NaN, but its payload may differ from torch's, which depends on torch's build and on the position in the
array: bf16 gets 0x7FC0; fp16 and fp32 keep sign or payload as the CPU does.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types

from offload.kernels.jit import compiled, emitter, read_from, variant_of, written
from offload.kernels.simd import I64, MEMORY, Cpu, Window, each_window


@cache
def cast_kernel(source: str, target: str) -> Callable[..., None]:
    """`(source (n,), target (n,))`; between equal dtypes a copy of the bits."""
    variant = variant_of(source, target)

    @compiled(types.void(read_from(source), written(target)))
    def cast(source: Any, target: Any) -> None:
        emit_cast(variant, (source, target, len(source)))

    return cast


@emitter
def emit_cast(builder: Any, cpu: Cpu, words: list[str], source: Any, target: Any, numel: Any) -> None:
    """One loop; between 16-bit dtypes through fp32, which holds both exactly."""
    source_dtype, target_dtype = words

    def emit(window: Window) -> None:
        raw = window.load(source, MEMORY[source_dtype])
        if source_dtype != target_dtype:
            raw = cpu.round_to_even(target_dtype, cpu.widen(source_dtype, raw))
        window.store(target, raw)

    each_window(builder, I64(0), numel, emit)
