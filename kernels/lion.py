"""Lion: one fused pass over master, momentum, gradient and weights.

Owns: the arithmetic of Chen et al., Symbolic Discovery of Optimization Algorithms (2023), in the operations of its
authors' PyTorch code: p = p * (1 - lr * weight_decay); c = exp_avg * beta1 + g * (1 - beta1); p = p - lr * sign(c);
exp_avg = exp_avg * beta2 + g * (1 - beta2), the last one fused as `add_(g, alpha=...)` is. The sign of a NaN is 0, as
torch's is.
Does not: know chunks or groups; thread (workers.py). The decay is always decoupled.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from offload.kernels.jit import compiled, emitter, variant_of, written
from offload.kernels.simd import F32, Cpu, Window, each_of
from offload.kernels.step import Gradient, Master, array_types, splats


@cache
def step_kernel(gradient: str, weights: str, *, master: str = "plain") -> Callable[..., None]:
    """The kernel for these dtypes ("fp32", "bf16", "fp16") and form of master ("plain", "split").

    Arguments, in this order: master fp32 or remainder uint16 (step.py, Note [Master]); exp_avg fp32; gradient; weights;
    first (no bits depend on it); lr, beta1, beta2, weight_decay; the factor on the gradient (negative to maximise).
    """
    variant = variant_of(gradient, weights, master)
    arrays = array_types(gradient, weights, master, [written("fp32")])

    @compiled(types.void(*arrays, *(types.float64,) * 5))
    def step(
        array0: Any, exp_avg: Any, gradient: Any, weights: Any, first: Any, lr: Any, beta1: Any, beta2: Any,
        weight_decay: Any, scale: Any,
    ) -> None:  # fmt: skip
        hyper = (
            np.float32(scale), np.float32(1.0 - lr * weight_decay), np.float32(lr), np.float32(-lr), np.float32(beta1),
            np.float32(1.0 - beta1), np.float32(beta2), np.float32(1.0 - beta2),
        )  # fmt: skip
        emit_lion(variant, (len(array0), array0, exp_avg, gradient, weights, hyper))

    return step


@emitter
def emit_lion(
    builder: Any, cpu: Cpu, words: list[str], numel: Any, array0: Any, exp_avg: Any, gradient: Any, weights: Any,
    *hyper: Any,
) -> None:  # fmt: skip
    """One loop: the decay never meets the gradient."""
    scale, decay, lr, minus_lr, beta1, rest1, beta2, rest2 = splats(builder, hyper)
    masters = Master(cpu, words[2], words[1], array0, weights)
    gradients = Gradient(cpu, words[0], gradient, scale, None)

    def emit(window: Window) -> None:
        p, m = masters.load(window), window.load(exp_avg, F32)
        g = gradients.load(window, None)
        p = p * decay
        c = m * beta1 + g * rest1
        # -0 leaves every number as it is, also -0.
        update = c.exceeds(0.0).choose(minus_lr, c.like(0.0).exceeds(c).choose(lr, c.like(-0.0)))
        masters.store(window, p + update)
        window.store(exp_avg, cpu.fma(g, rest2, m * beta2))

    each_of(builder, numel, emit)
