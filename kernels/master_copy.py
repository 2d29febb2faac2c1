"""Working weights from masters, as the step kernels round them.

Owns: the rounding pass without a step (start, load, entries that are not stepped).
Does not: step (adam.py) or cast as torch does (cast.py).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from offload.kernels.jit import compiled, emitter, read_from, variant_of, written
from offload.kernels.simd import F32, I64, Cpu, Window, each_window


@cache
def copy_kernel(weights: str) -> Callable[..., None]:
    """`(master (n,) fp32, weights_out (n,))`: bf16 ties away from zero, fp16 ties to even."""
    variant = variant_of(weights)

    @compiled(types.void(read_from("fp32"), written(weights)))
    def copy(master: Any, weights_out: Any) -> None:
        emit_copy(variant, (master, weights_out, len(master)))

    return copy


@emitter
def emit_copy(builder: Any, cpu: Cpu, words: list[str], master: Any, weights_out: Any, numel: Any) -> None:
    """One loop."""

    def emit(window: Window) -> None:
        window.store(weights_out, cpu.round_weights(words[0], window.load(master, F32)))

    each_window(builder, I64(0), numel, emit)


def copy_weights(master: np.ndarray[Any, Any], weights_out: np.ndarray[Any, Any], weights: str) -> None:
    """Round `master` (n,) fp32 into `weights_out` (n,), bits of dtype `weights`."""
    copy_kernel(weights)(master, weights_out)
