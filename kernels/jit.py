"""How kernels are compiled and cached.

Owns: the numba options of every kernel, the types of their arguments, the cache on disk and what makes it stale.
Does not: compile anything at import: factories of the other files do when a session or bench asks. No arithmetic
(lanes.py).

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

from offload.kernels.lanes import ELEMENT, Cpu

VECTOR_OF_INT64: Final = types.Array(types.int64, 1, "C", readonly=True)
VECTOR_OF_FLOAT64: Final = types.Array(types.float64, 1, "C")


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
        # error_model: Python's would branch on every division. No fastmath: see Note [Lanes].
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": False}
        try:
            return numba.njit(signature, cache=True, **options)(function)  # type: ignore[no-any-return]
        except (RuntimeError, OSError, EOFError):
            # No folder is writable (numba says so while decorating), the disk is full, or an entry is cut short.
            return numba.njit(signature, cache=False, **options)(function)  # type: ignore[no-any-return]

    return decorate


def emitter(emit: Callable[..., None]) -> Any:
    """An intrinsic `(variant, arguments)` whose body `emit(builder, cpu, words, *arguments)` writes.

    `words` are those of the variant; an array arrives as a pointer to its first element, the rest as LLVM values.
    """

    def typed(typing: Any, variant: Any, arguments: Any) -> Any:
        words = variant.literal_value.split()[:-1]

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            unpacked = []
            for position, kind in enumerate(signature.args[1]):
                value = builder.extract_value(args[1], position)
                is_array = isinstance(kind, types.Array)
                unpacked.append(context.make_array(kind)(context, builder, value).data if is_array else value)
            emit(builder, Cpu(context), words, *unpacked)
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
