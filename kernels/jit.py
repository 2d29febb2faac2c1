"""How kernels are compiled and cached.

Owns: the numba options of every kernel, the types of their arguments, the cache on disk and what makes it stale.
Does not: compile at import (the factories in the other files do, when a session or a benchmark asks for a kernel);
define arithmetic (simd.py).

Note [Cache]: numba keys an entry by signature, CPU, the function's bytecode and the values it closes over, and drops
a file's entries when that file changes. It does not see a change of what the function calls; and a closure over a
function or intrinsic has another hash in every process, so it would never hit. So a kernel closes over one text
alone, its `variant`: the names of its dtypes and a hash of all sources of this folder.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import numba
from numba import types
from numba.extending import intrinsic

from offload.kernels.simd import ELEMENT, Cpu

VECTOR_OF_INT64: Final = types.Array(types.int64, 1, "C", readonly=True)
VECTOR_OF_FLOAT64: Final = types.Array(types.float64, 1, "C")
UINT16: Final = types.Array(types.uint16, 1, "C")
UINT16_READ: Final = types.Array(types.uint16, 1, "C", readonly=True)
UINT8: Final = types.Array(types.uint8, 1, "C")
UINT8_READ: Final = types.Array(types.uint8, 1, "C", readonly=True)


def read_from(dtype: str) -> Any:
    """The type of an array of `dtype` that a kernel only reads (memory mapped without write access is accepted)."""
    return types.Array(element_of(dtype), 1, "C", readonly=True)


def written(dtype: str) -> Any:
    """The type of an array of `dtype` that a kernel writes."""
    return types.Array(element_of(dtype), 1, "C")


def element_of(dtype: str) -> Any:
    """numba's element type for the name of a dtype."""
    if dtype not in ELEMENT:
        raise ValueError(f"kernel for dtype {dtype!r}: expected one of {', '.join(ELEMENT)}.")
    return ELEMENT[dtype]


def compiled(signature: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile now for `signature`, without the GIL; cached on disk where a folder is writable."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        # error_model: Python's would branch on every division. No fastmath: see Note [Vectors].
        if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
            raise RuntimeError("NUMBA_DISABLE_JIT is set, but kernels have no form that Python can run; unset it.")
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": False}
        try:
            return numba.njit(signature, cache=True, **options)(function)  # type: ignore[no-any-return]
        except Exception:  # what is wrong with the function itself comes again below
            # No folder is writable (numba says so while decorating), the disk is full, or an entry is damaged.
            return numba.njit(signature, cache=False, **options)(function)  # type: ignore[no-any-return]

    return decorate


def emitter(emit: Callable[..., None]) -> Any:
    """An intrinsic `(variant, arguments)` whose body `emit(builder, cpu, words, *arguments)` writes.

    `words` are those of the variant; an array arrives as a pointer to its first element, a tuple as its members, the
    rest as LLVM values.
    """

    def typed(typing: Any, variant: Any, arguments: Any) -> Any:
        words = variant.literal_value.split()[:-1]

        def unpacked(context: Any, builder: Any, kind: Any, value: Any) -> list[Any]:
            if isinstance(kind, types.BaseTuple):
                kinds: Any = kind
                members = [(each, builder.extract_value(value, i)) for i, each in enumerate(kinds)]
                return [member for pair in members for member in unpacked(context, builder, *pair)]
            is_array = isinstance(kind, types.Array)
            return [context.make_array(kind)(context, builder, value).data if is_array else value]

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit(builder, Cpu(context), words, *unpacked(context, builder, signature.args[1], args[1]))
            return context.get_dummy_value()

        return types.none(variant, arguments), generate

    return intrinsic(prefer_literal=True)(typed)


def variant_of(*words: str) -> str:
    """What a kernel closes over: its variant, and last the hash of the sources. See Note [Cache]."""
    return " ".join((*words, sources_hash()))


@cache
def sources_hash() -> str:
    """Changes whenever a kernel's source does."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
