"""Weights from masters, as the step kernels round them."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from offload.kernels.jit import ARRAY, WEIGHT_KIND, compiled, require, source_key, store


@cache
def copy_kernel(weights: str) -> Callable[..., None]:
    """`(master (n,) fp32, weights_out (n,))`: bf16 ties away from zero, fp16 ties to even."""
    require(weights)
    kind, key = WEIGHT_KIND[weights], source_key()

    @compiled(types.void(types.float32[::1], ARRAY[weights]))
    def copy(master: Any, weights_out: Any) -> None:
        if not key:
            return
        for i in range(len(master)):
            weights_out[i] = store(master[i], kind)

    return copy


def copy_weights(master: np.ndarray[Any, Any], weights_out: np.ndarray[Any, Any], weights: str) -> None:
    """Round `master` (n,) fp32 into `weights_out` (n,), bits of dtype `weights`."""
    copy_kernel(weights)(master, weights_out)
