"""How kernels are compiled, and the conversions between 16-bit values and fp32.

Owns: the numba options of every kernel, the cache on disk, bit conversions as inlined functions.
Does not: compile anything at import: factories of the other files do when a session or bench asks.

16-bit values are uint16 arrays of their bits: numba knows neither dtype on the CPU. Every kernel of a file is cached
under a key that includes the source of this one: numba itself would not notice a change here.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from offload.errors import ConfigError

BLOCK_NUMEL: Final = 65_536
"""Kernels begin anew at absolute multiples of this: bits do not depend on how a caller cuts (see offload/units.py)."""

ARRAY: Final[dict[str, Any]] = {
    "fp32": types.float32[::1],
    "bf16": types.uint16[::1],
    "fp16": types.uint16[::1],
}
INDICES: Final = types.int64[::1]
SUMS: Final = types.float64[::1]


def compiled(signature: Any, *, reassociate: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile now for `signature`, without the GIL; cached on disk where a folder is writable.

    No automatic contraction: a vector body and its scalar tail must round alike. `reassociate` is for sums in fp64.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        fastmath = {"reassoc", "contract"} if reassociate else False
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
        try:
            return numba.njit(signature, cache=True, **options)(function)  # type: ignore[no-any-return]
        except RuntimeError:  # no folder for the cache is writable: numba says so while decorating
            return numba.njit(signature, cache=False, **options)(function)  # type: ignore[no-any-return]

    return decorate


def source_key() -> str:
    """Changes whenever a kernel's source does; part of every closure, and so of numba's cache key."""
    folder = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def require(*dtypes: str) -> None:
    """Raise where this CPU cannot convert one of these dtypes: the conversion would crash on a missing symbol."""
    if "fp16" in dtypes and not has_half_instructions():
        raise ConfigError("this CPU has no instructions for fp16 (F16C); use precision='bf16' or 'fp32'.")


def has_half_instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU converts fp16 in hardware."""
    if os.environ.get("NUMBA_CPU_NAME") == "generic":
        return False
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    return "f16c" in text or "asimdhp" in text


# ------------------------------------------------------------------------------------------------- conversions


@intrinsic
def bits_of(typing: Any, value: Any) -> Any:
    """fp32 to its uint32 bits."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), emit


@intrinsic
def float_of(typing: Any, value: Any) -> Any:
    """uint32 bits to fp32."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), emit


@intrinsic
def half_to_float(typing: Any, value: Any) -> Any:
    """fp16 bits to fp32, in hardware."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), emit


@intrinsic
def float_to_half(typing: Any, value: Any) -> Any:
    """fp32 to fp16 bits, to nearest, ties to even, in hardware."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), emit


@numba.njit(inline="always")
def load_fp32(value: Any) -> Any:
    """fp32 stays."""
    return value


@numba.njit(inline="always")
def load_bf16(value: Any) -> Any:
    """bf16 bits to fp32: exact."""
    return float_of(np.uint32(np.uint32(value) << np.uint32(16)))


@numba.njit(inline="always")
def load_fp16(value: Any) -> Any:
    """fp16 bits to fp32: exact."""
    return half_to_float(value)


@numba.njit(inline="always")
def store_fp32(value: Any) -> Any:
    """fp32 stays."""
    return value


@numba.njit(inline="always")
def store_bf16(value: Any) -> Any:
    """fp32 to bf16 bits, to nearest, ties to even; NaN becomes 0x7FC0."""
    u = bits_of(value)
    rounded = np.uint32(u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1)))
    nan = (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(np.uint32(0x7FC0) if nan else rounded >> np.uint32(16))


@numba.njit(inline="always")
def store_fp16(value: Any) -> Any:
    """fp32 to fp16 bits, to nearest, ties to even."""
    return float_to_half(value)


@numba.njit(inline="always")
def store_bf16_ties_away(value: Any) -> Any:
    """fp32 to bf16 bits, to nearest, ties away from zero: what step kernels do (design: a 16-bit remainder exists)."""
    u = bits_of(value)
    nan = (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    u = np.uint32(0x7FC00000) if nan else u
    return np.uint16(np.uint32(u + np.uint32(0x8000)) >> np.uint32(16))


LOAD: Final[dict[str, Any]] = {"fp32": load_fp32, "bf16": load_bf16, "fp16": load_fp16}
STORE: Final[dict[str, Any]] = {"fp32": store_fp32, "bf16": store_bf16, "fp16": store_fp16}
STORE_WEIGHT: Final[dict[str, Any]] = {"fp32": store_fp32, "bf16": store_bf16_ties_away, "fp16": store_fp16}
