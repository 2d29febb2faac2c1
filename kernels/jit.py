"""How kernels are compiled, and the conversions between 16-bit values and fp32.

Owns: the numba options of every kernel, the cache on disk, bit conversions as intrinsics.
Does not: compile anything at import: factories of the other files do when a session or bench asks.

16-bit values are uint16 arrays of their bits: numba knows neither dtype on the CPU. Every kernel is cached under a key
that includes the sources of all of them: numba itself would not notice a change in this file.
"""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numba
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

# Dtypes as numbers: a number in a closure is part of numba's cache key by value; a compiled function there would be
# new in every process, and nothing would ever be found in the cache.
FP32: Final = 0
BF16: Final = 1
FP16: Final = 2
BF16_TIES_AWAY: Final = 3

KIND: Final = {"fp32": FP32, "bf16": BF16, "fp16": FP16}
WEIGHT_KIND: Final = {"fp32": FP32, "bf16": BF16_TIES_AWAY, "fp16": FP16}
"""How step kernels round weights: bf16 to nearest, ties away from zero, so that a 16-bit remainder exists."""

_I16, _I32 = ir.IntType(16), ir.IntType(32)


def _load(typing: Any, value: Any, kind: Any) -> Any:
    """fp32 of a value of dtype `kind` (a constant): exact."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if kind.literal_value == FP32:
            return args[0]
        if kind.literal_value == FP16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())
        wide = builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(value, kind), emit


def _store(typing: Any, value: Any, kind: Any) -> Any:
    """A value of dtype `kind` (a constant) from fp32: to nearest, ties to even, or as the kind says.

    NaN becomes 0x7FC0 in bf16, whatever its payload was.
    """
    result = types.float32 if kind.literal_value == FP32 else types.uint16

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if kind.literal_value == FP32:
            return args[0]
        if kind.literal_value == FP16:
            return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), _I16)
        constant = partial(ir.Constant, _I32)
        bits = builder.bitcast(args[0], _I32)
        bits = builder.select(builder.fcmp_unordered("uno", args[0], args[0]), constant(0x7FC00000), bits)
        if kind.literal_value == BF16_TIES_AWAY:
            half = constant(0x8000)
        else:
            half = builder.add(constant(0x7FFF), builder.and_(builder.lshr(bits, constant(16)), constant(1)))
        return builder.trunc(builder.lshr(builder.add(bits, half), constant(16)), _I16)

    return result(types.float32, kind), emit


load: Final[Any] = intrinsic(prefer_literal=True)(_load)
store: Final[Any] = intrinsic(prefer_literal=True)(_store)
