"""SGD: one fused pass over master, momentum buffer, gradient and weights.

Owns: the arithmetic of torch.optim.SGD's single-tensor path in fp32, operation by operation, fused where torch's vector
kernels fuse: bit for bit, but where the tail of a tensor takes torch's scalar code, which may not fuse.
Does not: know chunks or groups; thread (workers.py); sparse gradients.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from offload.kernels.jit import compiled, emitter, variant_of, written
from offload.kernels.simd import BOOL, F32, I64, Cpu, Vector, Window
from offload.kernels.step import Gradient, Master, array_types, splats, stepped


@cache
def step_kernel(gradient: str, weights: str, *, master: str = "plain", momentum: bool = True) -> Callable[..., None]:
    """The kernel for these dtypes ("fp32", "bf16", "fp16") and form of master ("plain", "split").

    Arguments, in this order: master fp32 or remainder uint16 (step.py, Note [Master]); momentum_buffer fp32, only
    written in a first step; gradient; weights; first (no bits depend on it); lr, momentum, dampening, weight_decay
    (L2); the factor on the gradient (negative to maximise); nesterov; is_first_step: the buffer becomes the gradient.
    Without momentum there is no buffer, and after first: lr, weight_decay, the factor on the gradient.
    """
    if not momentum:
        return _plain_kernel(gradient, weights, master)
    variant = variant_of(gradient, weights, master)
    arrays = array_types(gradient, weights, master, [written("fp32")])

    @compiled(types.void(*arrays, *(types.float64,) * 5, types.boolean, types.boolean))
    def step(
        array0: Any, buffer: Any, gradient: Any, weights: Any, first: Any, lr: Any, momentum: Any, dampening: Any,
        weight_decay: Any, scale: Any, nesterov: Any, is_first_step: Any,
    ) -> None:  # fmt: skip
        hyper = (
            np.float32(scale), np.float32(weight_decay), np.float32(-lr), np.float32(momentum),
            np.float32(1.0 - dampening),
        )  # fmt: skip
        emit_momentum(
            variant,
            (len(array0), weight_decay != 0.0, nesterov, is_first_step, array0, buffer, gradient, weights, hyper),
        )

    return step


def _plain_kernel(gradient: str, weights: str, master: str) -> Callable[..., None]:
    variant = variant_of(gradient, weights, master)
    arrays = array_types(gradient, weights, master, [])

    @compiled(types.void(*arrays, *(types.float64,) * 3))
    def step(
        array0: Any, gradient: Any, weights: Any, first: Any, lr: Any, weight_decay: Any, scale: Any
    ) -> None:  # fmt: skip
        hyper = (np.float32(scale), np.float32(weight_decay), np.float32(-lr))
        emit_plain(variant, (len(array0), weight_decay != 0.0, array0, gradient, weights, hyper))

    return step


@emitter
def emit_momentum(
    builder: Any, cpu: Cpu, words: list[str], numel: Any, has_l2: Any, nesterov: Any, is_first_step: Any,
    array0: Any, buffer: Any, gradient: Any, weights: Any, *hyper: Any,
) -> None:  # fmt: skip
    """One loop with and one without L2."""
    scale, l2, step, momentum, undamped = splats(builder, hyper)
    nesterov, is_first_step = (builder.trunc(flag, BOOL) for flag in (nesterov, is_first_step))
    masters = Master(cpu, words[2], words[1], array0, weights)
    gradients = Gradient(cpu, words[0], gradient, scale, l2)

    def emit(window: Window, add_l2: bool) -> None:
        p = masters.load(window)
        g = gradients.load(window, masters if add_l2 else None)
        moved = cpu.fma(g, undamped, window.load(buffer, F32) * momentum)
        kept = Vector(builder, builder.select(is_first_step, g.value, moved.value))
        ahead = cpu.fma(kept, momentum, g)
        direction = Vector(builder, builder.select(nesterov, ahead.value, kept.value))
        masters.store(window, cpu.fma(direction, step, p))
        window.store(buffer, kept)

    stepped(builder, I64(0), numel, builder.trunc(has_l2, BOOL), emit)


@emitter
def emit_plain(
    builder: Any, cpu: Cpu, words: list[str], numel: Any, has_l2: Any, array0: Any, gradient: Any, weights: Any,
    *hyper: Any,
) -> None:  # fmt: skip
    """One loop with and one without L2."""
    scale, l2, step = splats(builder, hyper)
    masters = Master(cpu, words[2], words[1], array0, weights)
    gradients = Gradient(cpu, words[0], gradient, scale, l2)

    def emit(window: Window, add_l2: bool) -> None:
        p = masters.load(window)
        masters.store(window, cpu.fma(gradients.load(window, masters if add_l2 else None), step, p))

    stepped(builder, I64(0), numel, builder.trunc(has_l2, BOOL), emit)
