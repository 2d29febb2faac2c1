"""Adam and AdamW: one fused pass over master, moments, gradient and weights.

Owns: the arithmetic of the step: torch.optim.Adam's single-tensor path in fp32, operation by operation, fused where
torch's vector kernels fuse (sqrt and division are correctly rounded here; torch's may be off by one ulp).
Does not: know pieces or groups; thread (workers.py).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from offload.kernels.jit import compiled, emitter, read_from, variant_of, written
from offload.kernels.lanes import F32, MEMORY, Cpu, Lanes, Window, each_window, splat


@cache
def step_kernel(gradient: str, weights: str) -> Callable[..., None]:
    """The kernel for this gradient dtype and weight dtype ("fp32", "bf16", "fp16"); compiled on first use.

    Arguments: master, exp_avg, exp_avg_sq (n,) fp32, updated in place; gradient (n,); weights_out (n,), which may be
    the master itself where it is fp32; first: position of element 0 in its flat (no bits depend on it here, see
    Note [Lanes]; kernels with state in blocks need it); lr, beta1, beta2, eps, weight_decay; 1 - beta1^t;
    sqrt(1 - beta2^t); the factor on the gradient; decoupled: AdamW's decay, else L2.
    All arrays have the length of the master; nobody checks.
    """
    variant = variant_of(gradient, weights)
    state, fp64 = written("fp32"), types.float64
    signature = types.void(
        state, state, state, read_from(gradient), written(weights), types.int64,
        fp64, fp64, fp64, fp64, fp64, fp64, fp64, fp64, types.boolean,
    )  # fmt: skip

    @compiled(signature)
    def step(
        master: Any, exp_avg: Any, exp_avg_sq: Any, gradient: Any, weights_out: Any, first: Any, lr: Any, beta1: Any,
        beta2: Any, eps: Any, weight_decay: Any, bias_correction1: Any, bias_correction2_sqrt: Any,
        gradient_scale: Any, decoupled: Any,
    ) -> None:  # fmt: skip
        # As in torch, the constants are computed in fp64 and rounded once. lerp counts from the nearer end.
        near = abs(np.float32(1.0 - beta1)) < np.float32(0.5)
        weight = np.float32(1.0 - beta1) if near else np.float32(np.float32(1.0 - beta1) - np.float32(1.0))
        decay = np.float32(1.0 - lr * weight_decay) if decoupled else np.float32(1.0)
        emit_step(
            variant,
            (
                master, exp_avg, exp_avg_sq, gradient, weights_out, len(master),
                (not decoupled) and weight_decay != 0.0, near, np.float32(gradient_scale), np.float32(weight_decay),
                decay, weight, np.float32(beta2), np.float32(1.0 - beta2), np.float32(-(lr / bias_correction1)),
                np.float32(bias_correction2_sqrt), np.float32(eps),
            ),
        )  # fmt: skip

    return step


@emitter
def emit_step(
    builder: Any, cpu: Cpu, words: list[str], master: Any, exp_avg: Any, exp_avg_sq: Any, gradient: Any,
    weights_out: Any, numel: Any, has_l2: Any, near: Any, *constants: Any,
) -> None:  # fmt: skip
    """Two loops, with and without L2: a product with 0 in one loop would turn an infinite weight into NaN."""
    gradient_dtype, weights_dtype = words
    near = builder.trunc(near, ir.IntType(1))
    scale, l2, decay, weight, beta2, rest2, step, correction2_sqrt, eps = (splat(builder, c) for c in constants)

    def emit(window: Window, add_l2: bool) -> None:
        p, m, v = (window.load(plane, F32) for plane in (master, exp_avg, exp_avg_sq))
        g = cpu.widen(gradient_dtype, window.load(gradient, MEMORY[gradient_dtype])) * scale
        if add_l2:
            g = cpu.fma(p, l2, g)
        p = p * decay
        nearer_end = Lanes(builder, builder.select(near, m.value, g.value))
        m = cpu.fma(weight, g - m, nearer_end)
        v = cpu.fma(rest2 * g, g, v * beta2)
        p = p + (step * m) / (v.sqrt() / correction2_sqrt + eps)
        for plane, lanes in ((master, p), (exp_avg, m), (exp_avg_sq, v)):
            window.store(plane, lanes)
        window.store(weights_out, cpu.round_weights(weights_dtype, p))

    with builder.if_else(builder.trunc(has_l2, ir.IntType(1))) as (then, otherwise):
        with then:
            each_window(builder, ir.Constant(numel.type, 0), numel, lambda window: emit(window, True))
        with otherwise:
            each_window(builder, ir.Constant(numel.type, 0), numel, lambda window: emit(window, False))
