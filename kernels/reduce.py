"""Sums of squares and landing: the passes over gradients.

Owns: fp64 sums over segments, conversion and accumulation of gradients in the same pass.
Does not: cut segments (offload/partition.py) or add them up in order (`fold` does, where asked).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from offload.kernels.jit import ARRAY, INDICES, KIND, SUMS, compiled, load, require, source_key, store


@cache
def square_sums_kernel(values: str) -> Callable[..., None]:
    """`(values (n,), starts (k,), stops (k,), out (k,) fp64)`: the sum of squares of each segment.

    A sum is not finite exactly where an element is not: squares of fp32 do not overflow fp64.
    """
    require(values)
    kind, key = KIND[values], source_key()

    @compiled(types.void(ARRAY[values], INDICES, INDICES, SUMS), reassociate=True)
    def square_sums(array: Any, starts: Any, stops: Any, out: Any) -> None:
        if not key:
            return
        for k in range(len(starts)):
            segment = array[starts[k] : stops[k]]
            total = 0.0
            for i in range(len(segment)):
                x = np.float64(load(segment[i], kind))
                total += x * x
            out[k] = total

    return square_sums


@cache
def land_kernel(source: str, home: str, add: bool) -> Callable[..., None]:
    """`(source (n,), home (n,), starts (k,), stops (k,), out (k,) fp64)`: in the segments, home = source, or
    home + source in fp32; out = the sums of squares of what home then holds."""
    require(source, home)
    source_kind, home_kind, key = KIND[source], KIND[home], source_key()

    @compiled(types.void(ARRAY[source], ARRAY[home], INDICES, INDICES, SUMS), reassociate=True)
    def land(values: Any, target: Any, starts: Any, stops: Any, out: Any) -> None:
        if not key:
            return
        for k in range(len(starts)):
            came = values[starts[k] : stops[k]]
            held = target[starts[k] : stops[k]]
            total = 0.0
            for i in range(len(came)):
                x = load(came[i], source_kind)
                if add:
                    x = load(held[i], home_kind) + x
                kept = store(x, home_kind)
                held[i] = kept
                y = np.float64(load(kept, home_kind))
                total += y * y
            out[k] = total

    return land


def fold(sums: np.ndarray[Any, Any]) -> float:
    """The sum, strictly in order."""
    total = 0.0
    for value in sums.tolist():
        total += value
    return total
