"""The machine code of a kernel. A kernel from numba's cache on disk has none to show, so it is compiled anew."""

from collections.abc import Callable
from typing import Any

import numba


def assembly_of(kernel: Callable[..., Any]) -> str:
    """Assembly of a compiled kernel, with the options of its own compilation less the cache."""
    signature = kernel.nopython_signatures[0]  # type: ignore[attr-defined]
    options = {**kernel.targetoptions, "nopython": True}  # type: ignore[attr-defined]
    again = numba.jit(signature, **options)(kernel.py_func)  # type: ignore[attr-defined]
    return "\n".join(again.inspect_asm().values())
