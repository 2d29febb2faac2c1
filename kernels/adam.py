"""Adam and AdamW: one fused pass over master, moments, gradient and weights.

Owns: the arithmetic of the step (torch.optim.AdamW's single-tensor order, in fp32).
Does not: know pieces or groups; thread (workers.py).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from offload.kernels.jit import ARRAY, BLOCK_NUMEL, KIND, WEIGHT_KIND, compiled, load, require, source_key, store


@cache
def step_kernel(gradient: str, weights: str) -> Callable[..., None]:
    """The kernel for this gradient dtype and weight dtype ("fp32", "bf16", "fp16"); compiled on first use.

    Arguments: master, exp_avg, exp_avg_sq (n,) fp32 in place; gradient (n,); weights_out (n,); first: position of
    element 0 in its flat; lr, beta1, beta2, eps, weight_decay, 1 - beta1^t, sqrt(1 - beta2^t), gradient scale;
    decoupled: AdamW's decay, else L2.
    """
    require(gradient, weights)
    gradient_kind, weight_kind, key = KIND[gradient], WEIGHT_KIND[weights], source_key()
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
        grad_scale, step_size = np.float32(scale), np.float32(lr / correction1)
        one_minus_beta1, one_minus_beta2 = np.float32(1.0 - beta1), np.float32(1.0 - beta2)
        beta2_32, correction2, eps_32 = np.float32(beta2), np.float32(correction2_sqrt), np.float32(eps)
        a = 0
        while a < len(master):
            b = min(len(master), a + BLOCK_NUMEL - (first + a) % BLOCK_NUMEL)
            # Slices indexed from 0: with offsets LLVM would not vectorise.
            ps, ms, vs, gs, ws = master[a:b], exp_avg[a:b], exp_avg_sq[a:b], grad[a:b], weights_out[a:b]
            for i in range(len(ps)):
                p = ps[i]
                g = load(gs[i], gradient_kind) * grad_scale + l2 * p
                p = p * decay
                m = ms[i] + one_minus_beta1 * (g - ms[i])
                v = vs[i] * beta2_32 + one_minus_beta2 * (g * g)
                p = p - step_size * (m / (np.sqrt(v) / correction2 + eps_32))
                ms[i] = m
                vs[i] = v
                ps[i] = p
                ws[i] = store(p, weight_kind)
            a = b

    return step
