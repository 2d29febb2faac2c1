"""Whole state tensors of moments between fp32 and the form in which they are stored.

Owns: taking moments over from fp32 and giving them back, without a step.
Does not: step (adam.py); define the 8-bit maps (dynamic_map.py); convert bf16 (cast.py: what is converted once is
rounded to nearest, only steps round stochastically).
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Final

from numba import types

from offload.kernels.dynamic_map import BlockScale, DynamicMap, each_block
from offload.kernels.jit import UINT8, UINT8_READ, compiled, emitter, read_from, variant_of, written
from offload.kernels.simd import F32, I8, I32, Cpu, Window, each_window, splat, vector_of, zeroed_variable

MAPS: Final = ("signed", "unsigned")
"""exp_avg is stored by the signed map, exp_avg_sq by the unsigned one."""


@cache
def encode_kernel(kind: str) -> Callable[..., None]:
    """`(values (n,) fp32, codes (n,) uint8, scales (ceil(n / 256),) fp32)`; kind: signed or unsigned.

    Element 0 starts a block. The unsigned map stores magnitudes.
    """
    variant = variant_of(_checked(kind))

    @compiled(types.void(read_from("fp32"), UINT8, written("fp32")))
    def encode(values: Any, codes: Any, scales: Any) -> None:
        emit_encode(variant, (values, codes, scales, len(values)))

    return encode


@cache
def decode_kernel(kind: str) -> Callable[..., None]:
    """`(codes (n,) uint8, scales (ceil(n / 256),) fp32, values (n,) fp32)`: the inverse, as a step reads them."""
    variant = variant_of(_checked(kind))

    @compiled(types.void(UINT8_READ, read_from("fp32"), written("fp32")))
    def decode(codes: Any, scales: Any, values: Any) -> None:
        emit_decode(variant, (codes, scales, values, len(values)))

    return decode


def _checked(kind: str) -> str:
    if kind not in MAPS:
        raise ValueError(f"8-bit map {kind!r}: expected one of {', '.join(MAPS)}.")
    return kind


@emitter
def emit_encode(builder: Any, cpu: Cpu, words: list[str], values: Any, codes: Any, scales: Any, numel: Any) -> None:
    """Two passes over each block: its scale, its codes."""
    dynamic = DynamicMap(builder, cpu, words[0] == "signed")
    scale = BlockScale(builder, zeroed_variable(builder, vector_of(I32)))

    def emit(start: Any, stop: Any, number: Any) -> None:
        scale.clear()
        each_window(builder, start, stop, lambda window: scale.add(window.load(values, F32)))
        factor = scale.finish(builder.gep(scales, [number]))

        def encode(window: Window) -> None:
            window.store(codes, dynamic.encode(window.load(values, F32) * factor))

        each_window(builder, start, stop, encode)

    each_block(builder, numel, emit)


@emitter
def emit_decode(builder: Any, cpu: Cpu, words: list[str], codes: Any, scales: Any, values: Any, numel: Any) -> None:
    """Entry times scale."""
    dynamic = DynamicMap(builder, cpu, words[0] == "signed")

    def emit(start: Any, stop: Any, number: Any) -> None:
        scale = splat(builder, builder.load(builder.gep(scales, [number])))

        def decode(window: Window) -> None:
            window.store(values, dynamic.decode(window.load(codes, I8), scale))

        each_window(builder, start, stop, decode)

    each_block(builder, numel, emit)
