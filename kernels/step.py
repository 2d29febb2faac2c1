"""What the step kernels of all optimizers share.

Owns: how a step reads and writes master and working weights; the gradient with its factor and L2 decay.
Does not: know an optimizer's arithmetic (adam.py, lion.py, adagrad.py, sgd.py).

Note [Master]: `plain` is an fp32 array, and the weights are only written. `split` exists for bf16 weights: the master
is the weight and a remainder of 16 bits (split.py), so that both take four bytes together. A step of either leaves
the same weights and the same master, bit for bit: where weights are bf16, a NaN of the master is made 0x7FC00000
before it is stored in either form.
"""

from collections.abc import Callable
from typing import Any, Final

from numba import types

from offload.kernels.jit import UINT16, element_of, read_from, written
from offload.kernels.simd import F32, I16, I32, MEMORY, Cpu, Vector, Window, each_window, splat, with_one_nan
from offload.kernels.split import joined, parts_of

MASTERS: Final = ("plain", "split")


def array_types(gradient: str, weights: str, master: str, state_tensors: list[Any]) -> list[Any]:
    """numba's types of array 0, the state tensors, the gradient, the weights, and of `first`."""
    if master not in MASTERS:
        raise ValueError(f"step kernel with master {master!r}: expected one of {', '.join(MASTERS)}.")
    if master == "split" and weights != "bf16":
        raise ValueError(f"a split master needs weights bf16, not {weights}: only bf16 is the upper half of fp32.")
    element_of(weights)
    array0 = written("fp32") if master == "plain" else UINT16
    return [array0, *state_tensors, read_from(gradient), written(weights), types.int64]


class Master:
    """Emits loads and stores of the master and the working weights. See Note [Master]."""

    __slots__ = ("_array0", "_cpu", "_dtype", "_is_split", "_weights")

    def __init__(self, cpu: Cpu, kind: str, dtype: str, array0: Any, weights: Any) -> None:
        self._cpu = cpu
        self._is_split = kind == "split"
        self._dtype = dtype
        self._array0 = array0
        self._weights = weights

    def load(self, window: Window) -> Vector:
        """The master, fp32."""
        if not self._is_split:
            return window.load(self._array0, F32)
        return joined(self._cpu, window.load(self._weights, I16), window.load(self._array0, I16)).to("bitcast", F32)

    def store(self, window: Window, master: Vector) -> None:
        """The new master and its weights."""
        if self._dtype != "bf16":
            window.store(self._array0, master)
            window.store(self._weights, self._cpu.round_weights(self._dtype, master))
            return
        bits = with_one_nan(master.to("bitcast", I32))
        weights, remainder = parts_of(self._cpu, bits)
        window.store(self._array0, remainder if self._is_split else bits.to("bitcast", F32))
        window.store(self._weights, weights)


class Gradient:
    """Emits loads of the gradient: times its factor, and with L2 decay where the loop has it."""

    __slots__ = ("_cpu", "_dtype", "_l2", "_scale", "_values")

    def __init__(self, cpu: Cpu, dtype: str, values: Any, scale: Vector, l2: Vector | None) -> None:
        self._cpu = cpu
        self._dtype = dtype
        self._values = values
        self._scale = scale
        self._l2 = l2

    def load(self, window: Window, l2_of: Master | None) -> Vector:
        """gradient * factor [+ master * L2], fused as torch's `grad.add(param, alpha=weight_decay)` is."""
        g = self._cpu.widen(self._dtype, window.load(self._values, MEMORY[self._dtype])) * self._scale
        return g if l2_of is None or self._l2 is None else self._cpu.fma(l2_of.load(window), self._l2, g)


def with_and_without(builder: Any, condition: Any, emit: Callable[[bool], None]) -> None:
    """`emit(True)` where the boolean holds, else `emit(False)`.

    Two loops instead of a product with 0 in one, which would turn an infinite weight into NaN.
    """
    with builder.if_else(condition) as (then, otherwise):
        with then:
            emit(True)
        with otherwise:
            emit(False)


def stepped(builder: Any, start: Any, stop: Any, condition: Any, emit: Callable[[Window, bool], None]) -> None:
    """Emit two loops over [start, stop), one for each value of a condition (i1): `emit(window, the value)`."""
    with_and_without(
        builder, condition, lambda value: each_window(builder, start, stop, lambda window: emit(window, value))
    )


def splats(builder: Any, scalars: tuple[Any, ...]) -> list[Vector]:
    """Each scalar in every element of a vector."""
    return [splat(builder, scalar) for scalar in scalars]
