"""Adagrad: one fused pass over master, sum of squares, gradient and weights.

Owns: the arithmetic of torch.optim.Adagrad's single-tensor path in fp32, operation by operation, fused where torch's
vector kernels fuse (sqrt and division are correctly rounded here; torch's may be off by one ulp).
Does not: know chunks or groups; thread (workers.py); sparse gradients.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from offload.kernels.jit import compiled, emitter, variant_of, written
from offload.kernels.simd import BOOL, F32, I64, Cpu, Window
from offload.kernels.step import Gradient, Master, array_types, splats, stepped


@cache
def step_kernel(gradient: str, weights: str, *, master: str = "plain") -> Callable[..., None]:
    """The kernel for these dtypes ("fp32", "bf16", "fp16") and form of master ("plain", "split").

    Arguments, in this order: master fp32 or remainder uint16 (step.py, Note [Master]); sum fp32; gradient; weights;
    first (no bits depend on it); clr = lr / (1 + (t - 1) * lr_decay), eps, weight_decay (L2); the factor on the
    gradient (negative to maximise).
    """
    variant = variant_of(gradient, weights, master)
    arrays = array_types(gradient, weights, master, [written("fp32")])

    @compiled(types.void(*arrays, *(types.float64,) * 4))
    def step(
        array0: Any, total: Any, gradient: Any, weights: Any, first: Any, clr: Any, eps: Any, weight_decay: Any,
        scale: Any,
    ) -> None:  # fmt: skip
        hyper = (np.float32(scale), np.float32(weight_decay), np.float32(-clr), np.float32(eps))
        emit_adagrad(variant, (len(array0), weight_decay != 0.0, array0, total, gradient, weights, hyper))

    return step


@emitter
def emit_adagrad(
    builder: Any, cpu: Cpu, words: list[str], numel: Any, has_l2: Any, array0: Any, total: Any, gradient: Any,
    weights: Any, *hyper: Any,
) -> None:  # fmt: skip
    """One loop with and one without L2."""
    scale, l2, step, eps = splats(builder, hyper)
    masters = Master(cpu, words[2], words[1], array0, weights)
    gradients = Gradient(cpu, words[0], gradient, scale, l2)

    def emit(window: Window, add_l2: bool) -> None:
        p = masters.load(window)
        g = gradients.load(window, masters if add_l2 else None)
        squares = cpu.fma(g, g, window.load(total, F32))
        masters.store(window, p + (step * g) / (squares.sqrt() + eps))
        window.store(total, squares)

    stepped(builder, I64(0), numel, builder.trunc(has_l2, BOOL), emit)
