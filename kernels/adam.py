"""Adam and AdamW: one fused pass over master, moments, gradient and weights.

Owns: the arithmetic of the step (torch.optim.AdamW's single-tensor order, in fp32).
Does not: know pieces or groups; thread (workers.py).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types

from offload.kernels.jit import ARRAY, BLOCK_NUMEL, LOAD, STORE_WEIGHT, compiled, require, source_key


@cache
def step_kernel(gradient: str, weights: str) -> Callable[..., None]:
    """The kernel for this gradient dtype and weight dtype ("fp32", "bf16", "fp16"); compiled on first use.

    Arguments: master, exp_avg, exp_avg_sq (n,) fp32 in place; gradient (n,); weights_out (n,); first: position of
    element 0 in its flat; lr, beta1, beta2, eps, weight_decay, 1 - beta1^t, sqrt(1 - beta2^t), gradient scale;
    decoupled: AdamW's decay, else L2.
    """
    require(gradient, weights)
    load, store, key = LOAD[gradient], STORE_WEIGHT[weights], source_key()

    @numba.njit(inline="always")
    def block(
        master: Any, exp_avg: Any, exp_avg_sq: Any, grad: Any, weights_out: Any, scale: Any, decay: Any, l2: Any,
        beta1: Any, one_minus_beta1: Any, beta2: Any, one_minus_beta2: Any, step_size: Any, correction2: Any, eps: Any,
    ) -> None:  # fmt: skip
        for i in range(len(master)):
            p = master[i]
            g = load(grad[i]) * scale + l2 * p
            p = p * decay
            m = exp_avg[i] + one_minus_beta1 * (g - exp_avg[i])
            v = exp_avg_sq[i] * beta2 + one_minus_beta2 * (g * g)
            p = p - step_size * (m / (np.sqrt(v) / correction2 + eps))
            exp_avg[i] = m
            exp_avg_sq[i] = v
            master[i] = p
            weights_out[i] = store(p)

    fp32, fp64 = types.float32[::1], types.float64
    signature = types.void(
        fp32, fp32, fp32, ARRAY[gradient], ARRAY[weights], types.int64,
        fp64, fp64, fp64, fp64, fp64, fp64, fp64, fp64, types.boolean,
    )  # fmt: skip

    @compiled(signature)
    def step(
        master: Any, exp_avg: Any, exp_avg_sq: Any, grad: Any, weights_out: Any, first: Any, lr: Any, beta1: Any,
        beta2: Any, eps: Any, weight_decay: Any, correction1: Any, correction2_sqrt: Any, scale: Any, decoupled: Any,
    ) -> None:  # fmt: skip
        if not key:  # binds the source key into the closure, and so into the cache's
            return
        decay = np.float32(1.0 - lr * weight_decay) if decoupled else np.float32(1.0)
        l2 = np.float32(0.0) if decoupled else np.float32(weight_decay)
        a = 0
        while a < len(master):
            b = min(len(master), a + BLOCK_NUMEL - (first + a) % BLOCK_NUMEL)
            block(
                master[a:b], exp_avg[a:b], exp_avg_sq[a:b], grad[a:b], weights_out[a:b], np.float32(scale), decay, l2,
                np.float32(beta1), np.float32(1.0 - beta1), np.float32(beta2), np.float32(1.0 - beta2),
                np.float32(lr / correction1), np.float32(correction2_sqrt), np.float32(eps),
            )  # fmt: skip
            a = b

    return step
