"""Adam and AdamW: one fused pass over master, moments, gradient and weights.

Owns: the arithmetic of the step: torch.optim.Adam's single-tensor path in fp32, operation by operation, fused where
torch's vector kernels fuse (sqrt and division are correctly rounded here; torch's may be off by one ulp).
Does not: know chunks or groups; thread (workers.py); know the forms in which moments are stored (stochastic.py,
dynamic_map.py).
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import register_jitable

from offload.kernels.dynamic_map import BLOCK_8BIT_NUMEL, BlockScale, DynamicMap, each_block
from offload.kernels.jit import UINT8, UINT16, compiled, emitter, variant_of, written
from offload.kernels.simd import (
    BOOL,
    F32,
    I8,
    I16,
    I32,
    I64,
    WIDTH,
    Cpu,
    Vector,
    Window,
    cgutils,
    each_window,
    splat,
    vector_of,
    zeroed_variable,
)  # fmt: skip
from offload.kernels.step import Gradient, Master, array_types, splats, stepped
from offload.kernels.stochastic import RandomBits, store_rounded, stream_keys

STATES: Final = ("fp32", "bf16", "8bit")
HYPER: Final = (*(types.float64,) * 8, types.boolean)
NUM_HYPER: Final = 11
"""How many `constants` gives."""


@cache
def step_kernel(
    gradient: str, weights: str, *, master: str = "plain", state: str = "fp32", amsgrad: bool = False
) -> Callable[..., None]:
    """The kernel for these dtypes ("fp32", "bf16", "fp16") and forms of master and state; compiled on first use.

    Arguments, in this order; arrays of n elements, updated in place; nobody checks lengths:
    - master fp32, or remainder uint16 where the master is split (step.py, Note [Master]);
    - exp_avg, exp_avg_sq: fp32, or bf16 bits, rounded stochastically (stochastic.py); with amsgrad (fp32 state alone)
      then max_exp_avg_sq. 8bit: exp_avg uint8, exp_avg_scale (ceil(n / 256),) fp32, exp_avg_sq, exp_avg_sq_scale
      likewise (dynamic_map.py): one scale for 256 elements, so element 0 must start a block;
    - gradient, only read; weights: only written where the master is plain, and may be the master itself where fp32;
    - first: the global number of element 0; no bits depend on it unless the state is bf16;
    - lr, beta1, beta2, eps, weight_decay; 1 - beta1^t; sqrt(1 - beta2^t); the factor on the gradient (negative to
      maximise); decoupled: AdamW's decay, else L2;
    - seed: int64, for bf16 state alone; another one for each step.

    The update uses the new moments before they are rounded to bf16 or eight bits.
    """
    if state not in STATES:
        raise ValueError(f"step kernel with state {state!r}: expected one of {', '.join(STATES)}.")
    if amsgrad and state != "fp32":
        raise ValueError(f"amsgrad keeps its maxima in fp32 state alone, not in {state}.")
    make = {"fp32": _amsgrad_step if amsgrad else _fp32_step, "bf16": _bf16_step, "8bit": _8bit_step}[state]
    return make(variant_of(gradient, weights, master, "amsgrad" if amsgrad else state), gradient, weights, master)


def _fp32_step(variant: str, gradient: str, weights: str, master: str) -> Callable[..., None]:
    arrays = array_types(gradient, weights, master, [written("fp32")] * 2)

    @compiled(types.void(*arrays, *HYPER))
    def step(
        array0: Any, exp_avg: Any, exp_avg_sq: Any, gradient: Any, weights: Any, first: Any, lr: Any, beta1: Any,
        beta2: Any, eps: Any, weight_decay: Any, correction1: Any, correction2_sqrt: Any, scale: Any, decoupled: Any,
    ) -> None:  # fmt: skip
        hyper = constants(lr, beta1, beta2, eps, weight_decay, correction1, correction2_sqrt, scale, decoupled)
        emit_fp32_step(variant, (len(array0), hyper, array0, gradient, weights, exp_avg, exp_avg_sq))

    return step


def _amsgrad_step(variant: str, gradient: str, weights: str, master: str) -> Callable[..., None]:
    arrays = array_types(gradient, weights, master, [written("fp32")] * 3)

    @compiled(types.void(*arrays, *HYPER))
    def step(
        array0: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any, gradient: Any, weights: Any, first: Any,
        lr: Any, beta1: Any, beta2: Any, eps: Any, weight_decay: Any, correction1: Any, correction2_sqrt: Any,
        scale: Any, decoupled: Any,
    ) -> None:  # fmt: skip
        hyper = constants(lr, beta1, beta2, eps, weight_decay, correction1, correction2_sqrt, scale, decoupled)
        emit_fp32_step(variant, (len(array0), hyper, array0, gradient, weights, exp_avg, exp_avg_sq, max_exp_avg_sq))

    return step


def _bf16_step(variant: str, gradient: str, weights: str, master: str) -> Callable[..., None]:
    arrays = array_types(gradient, weights, master, [UINT16] * 2)

    @compiled(types.void(*arrays, *HYPER, types.int64))
    def step(
        array0: Any, exp_avg: Any, exp_avg_sq: Any, gradient: Any, weights: Any, first: Any, lr: Any, beta1: Any,
        beta2: Any, eps: Any, weight_decay: Any, correction1: Any, correction2_sqrt: Any, scale: Any, decoupled: Any,
        seed: Any,
    ) -> None:  # fmt: skip
        hyper = constants(lr, beta1, beta2, eps, weight_decay, correction1, correction2_sqrt, scale, decoupled)
        keys = stream_keys(seed, first)
        emit_bf16_step(variant, (len(array0), hyper, array0, gradient, weights, exp_avg, exp_avg_sq, first, keys))

    return step


def _8bit_step(variant: str, gradient: str, weights: str, master: str) -> Callable[..., None]:
    arrays = array_types(gradient, weights, master, [UINT8, written("fp32")] * 2)

    @compiled(types.void(*arrays, *HYPER))
    def step(
        array0: Any, exp_avg: Any, exp_avg_scale: Any, exp_avg_sq: Any, exp_avg_sq_scale: Any, gradient: Any,
        weights: Any, first: Any, lr: Any, beta1: Any, beta2: Any, eps: Any, weight_decay: Any, correction1: Any,
        correction2_sqrt: Any, scale: Any, decoupled: Any,
    ) -> None:  # fmt: skip
        hyper = constants(lr, beta1, beta2, eps, weight_decay, correction1, correction2_sqrt, scale, decoupled)
        state_tensors = (exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale)
        emit_8bit_step(variant, (len(array0), hyper, array0, gradient, weights, state_tensors))

    return step


@register_jitable
def constants(
    lr: Any, beta1: Any, beta2: Any, eps: Any, weight_decay: Any, correction1: Any, correction2_sqrt: Any, scale: Any,
    decoupled: Any,
) -> Any:  # fmt: skip
    """What the loop needs. As in torch, computed in fp64 and rounded once; lerp counts from the nearer end."""
    near = abs(np.float32(1.0 - beta1)) < np.float32(0.5)
    weight = np.float32(1.0 - beta1) if near else np.float32(np.float32(1.0 - beta1) - np.float32(1.0))
    decay = np.float32(1.0 - lr * weight_decay) if decoupled else np.float32(1.0)
    return (
        (not decoupled) and weight_decay != 0.0, near, np.float32(scale), np.float32(weight_decay), decay, weight,
        np.float32(beta2), np.float32(1.0 - beta2), np.float32(-(lr / correction1)), np.float32(correction2_sqrt),
        np.float32(eps),
    )  # fmt: skip


class Arithmetic:
    """Emits the step of sixteen elements, with moments in fp32. Arguments: of `constants`, then array 0, gradient,
    weights."""

    __slots__ = (
        "_beta2", "_correction2_sqrt", "_cpu", "_decay", "_eps", "_gradient", "_has_l2", "_is_near", "_master",
        "_rest2", "_step", "_weight", "is_general",
    )  # fmt: skip

    def __init__(self, builder: Any, cpu: Cpu, words: list[str], arguments: tuple[Any, ...]) -> None:
        gradient_dtype, weights_dtype, master = words[:3]
        array0, gradient, weights = arguments[NUM_HYPER : NUM_HYPER + 3]
        self._cpu = cpu
        has_l2, is_near = (builder.trunc(each, BOOL) for each in arguments[:2])
        self.is_general = builder.or_(has_l2, builder.not_(is_near))
        """Whether the loop needs L2 or the farther end of the interpolation: else it is spared both."""
        self._has_l2, self._is_near = splat(builder, has_l2), splat(builder, is_near)
        scale, l2, *hyper = splats(builder, arguments[2:NUM_HYPER])
        self._decay, self._weight, self._beta2, self._rest2, self._step, self._correction2_sqrt, self._eps = hyper
        self._master = Master(cpu, master, weights_dtype, array0, weights)
        self._gradient = Gradient(cpu, gradient_dtype, gradient, scale, l2)

    def moments(self, window: Window, moments: list[Vector], is_general: bool) -> list[Vector]:
        """The new moments, from this window's gradient. The third, if any, is amsgrad's."""
        m, v, *largest = moments
        g = self._gradient.load(window, None)
        nearer_end = m
        if is_general:
            g = self._has_l2.choose(self._gradient.load(window, self._master), g)
            nearer_end = self._is_near.choose(m, g)
        m = self._cpu.fma(self._weight, g - m, nearer_end)
        v = self._cpu.fma(self._rest2 * g, g, v * self._beta2)
        return [m, v, *(each.exceeds_or_is_nan(v).choose(each, v) for each in largest)]

    def update(self, window: Window, moments: list[Vector]) -> None:
        """Step this window's master and weights by its new moments."""
        p = self._master.load(window) * self._decay
        p = p + (self._step * moments[0]) / (moments[-1].sqrt() / self._correction2_sqrt + self._eps)
        self._master.store(window, p)


@emitter
def emit_fp32_step(builder: Any, cpu: Cpu, words: list[str], numel: Any, *arguments: Any) -> None:
    """Moments in fp32, with amsgrad's third state tensor or without."""
    state_tensors = arguments[NUM_HYPER + 3 :]
    arithmetic = Arithmetic(builder, cpu, words, arguments)

    def emit(window: Window, is_general: bool) -> None:
        moments = arithmetic.moments(window, [window.load(each, F32) for each in state_tensors], is_general)
        arithmetic.update(window, moments)
        for state_tensor, moment in zip(state_tensors, moments, strict=True):
            window.store(state_tensor, moment)

    stepped(builder, I64(0), numel, arithmetic.is_general, emit)


@emitter
def emit_bf16_step(builder: Any, cpu: Cpu, words: list[str], numel: Any, *arguments: Any) -> None:
    """Moments in bf16."""
    if words[2] == "split":
        cpu.order_in_pairs()
    exp_avg, exp_avg_sq, first, *keys = arguments[NUM_HYPER + 3 :]
    state_tensors = (exp_avg, exp_avg_sq)
    arithmetic = Arithmetic(builder, cpu, words, arguments)
    random = RandomBits(builder, cpu, first, *keys)

    def emit(window: Window, is_general: bool) -> None:
        old = [cpu.widen("bf16", window.load(state_tensor, I16)) for state_tensor in state_tensors]
        moments = arithmetic.moments(window, old, is_general)
        arithmetic.update(window, moments)
        store_rounded(builder, cpu, window, state_tensors, moments, random.next())

    random.each_page(numel, lambda start, stop: stepped(builder, start, stop, arithmetic.is_general, emit))


class Stored8Bit:
    """Emits one 8-bit state tensor of a step, block by block: decoded, new values held in fp32, encoded."""

    __slots__ = ("_buffer", "_builder", "_codes", "_cpu", "_factor", "_map", "_new", "_old_scale", "_scale", "_scales")

    def __init__(self, builder: Any, cpu: Cpu, signed: bool, codes: Any, scales: Any) -> None:
        self._builder = builder
        self._cpu = cpu
        self._map = DynamicMap(builder, cpu, signed, has_signs=signed)
        self._codes = codes
        self._scales = scales
        self._scale = BlockScale(builder, zeroed_variable(builder, vector_of(I32)), has_signs=signed)
        block = ir.ArrayType(vector_of(F32), BLOCK_8BIT_NUMEL // WIDTH)
        self._buffer = builder.bitcast(cgutils.alloca_once(builder, block), F32.as_pointer())

    def begin(self, start: Any, number: Any) -> None:
        """At element `start` begins block `number`."""
        self._old_scale = splat(self._builder, self._builder.load(self._builder.gep(self._scales, [number])))
        self._new = self._builder.gep(self._buffer, [self._builder.neg(start)])  # so that windows index it, too
        self._scale.clear()

    def load(self, window: Window) -> Vector:
        """The old values, fp32."""
        return self._map.decode(window.load(self._codes, I8), self._old_scale)

    def hold(self, window: Window, values: Vector) -> None:
        """The new values."""
        self._scale.add(window.existing(values, self._cpu.numbers(self._builder)))
        window.whole().store(self._new, values)

    def held(self, window: Window) -> Vector:
        """The new values again."""
        return window.whole().load(self._new, F32)

    def finish(self, number: Any) -> None:
        """Store the block's new scale."""
        self._factor = self._scale.finish(self._builder.gep(self._scales, [number]))

    def store(self, window: Window, values: Vector) -> None:
        """Store codes of the new values, after `finish`."""
        window.store(self._codes, self._map.encode(values * self._factor))


@emitter
def emit_8bit_step(builder: Any, cpu: Cpu, words: list[str], numel: Any, *arguments: Any) -> None:
    """Moments in blocks of eight bits."""
    if words[2] == "split":
        cpu.order_in_pairs()
    exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale = arguments[NUM_HYPER + 3 :]
    arithmetic = Arithmetic(builder, cpu, words, arguments)
    state_tensors = (
        Stored8Bit(builder, cpu, True, exp_avg, exp_avg_scale),
        Stored8Bit(builder, cpu, False, exp_avg_sq, exp_avg_sq_scale),
    )

    def emit(window: Window, is_general: bool) -> None:
        moments = arithmetic.moments(window, [state_tensor.load(window) for state_tensor in state_tensors], is_general)
        for state_tensor, moment in zip(state_tensors, moments, strict=True):
            state_tensor.hold(window, moment)

    # In the same loop as encoding: square roots and divisions run while integer units compute codes.
    def update(window: Window) -> None:
        moments = [state_tensor.held(window) for state_tensor in state_tensors]
        arithmetic.update(window, moments)
        for state_tensor, moment in zip(state_tensors, moments, strict=True):
            state_tensor.store(window, moment)

    def emit_block(start: Any, stop: Any, number: Any) -> None:
        for state_tensor in state_tensors:
            state_tensor.begin(start, number)
        stepped(builder, start, stop, arithmetic.is_general, emit)
        for state_tensor in state_tensors:
            state_tensor.finish(number)
        each_window(builder, start, stop, update)

    each_block(builder, numel, emit_block)
