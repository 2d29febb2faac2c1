"""Oracles: the kernels' arithmetic in plain numpy, with the same arguments and the names of the dtypes.

Owns: what the kernels are checked against (tests/kernels): the same bits on CPUs with fused multiply-add. Slow; nothing
else uses it.
"""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def load(values: Array, dtype: str) -> Array:
    """fp32 of an array of this dtype's bits."""
    if dtype == "bf16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.view(np.float16).astype(np.float32) if dtype == "fp16" else values


def round_to_even(values: Array, dtype: str) -> Array:
    """Bits of `dtype` of fp32 values, to nearest, ties to even; a bf16 NaN is 0x7FC0."""
    if dtype == "bf16":
        u = values.view(np.uint32)
        rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
    if dtype == "fp16":
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(np.float16).view(np.uint16)
    return values.copy()


def round_weights(master: Array, dtype: str) -> Array:
    """Bits of the weights: bf16 ties away from zero (NaN is 0x7FC0), the others ties to even."""
    if dtype == "bf16":
        bits = np.where(np.isnan(master), np.uint32(0x7FC00000), master.view(np.uint32))
        return ((bits + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
    return round_to_even(master, dtype)


def fma(a: Any, b: Any, c: Any) -> Array:
    """a * b + c of fp32 values, rounded once.

    The product is exact in fp64. The sum is rounded to odd there (an inexact one gets an odd last bit), so that
    rounding it once more to fp32 gives what one rounding would have given.
    """
    product, addend = np.float64(a) * np.float64(b), np.float64(c)
    total = np.asarray(product + addend)
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(np.int64)
    is_even_and_inexact = np.isfinite(total) & (error != 0) & ((bits & 1) == 0)
    outwards = (error > 0) == (total > 0)
    bits = np.where(is_even_and_inexact, np.where(outwards, bits + 1, bits - 1), bits)
    return bits.view(np.float64).astype(np.float32)


def step(
    master: Array, exp_avg: Array, exp_avg_sq: Array, gradient: Array, weights_out: Array, first: int, lr: float,
    beta1: float, beta2: float, eps: float, weight_decay: float, bias_correction1: float,
    bias_correction2_sqrt: float, gradient_scale: float, decoupled: bool, *, dtypes: tuple[str, str],
) -> None:  # fmt: skip
    """One step of Adam or AdamW in place; `dtypes`: of gradient and weights."""
    f = np.float32
    with np.errstate(all="ignore"):
        g = load(gradient, dtypes[0]) * f(gradient_scale)
        p = master.copy()
        if decoupled:
            p *= f(1.0 - lr * weight_decay)
        elif weight_decay != 0.0:
            g = fma(p, f(weight_decay), g)
        weight = f(1.0 - beta1)
        if abs(weight) < 0.5:
            exp_avg[:] = fma(weight, g - exp_avg, exp_avg)
        else:
            exp_avg[:] = fma(weight - f(1.0), g - exp_avg, g)
        exp_avg_sq[:] = fma(f(1.0 - beta2) * g, g, exp_avg_sq * f(beta2))
        denominator = np.sqrt(exp_avg_sq) / f(bias_correction2_sqrt) + f(eps)
        p += (f(-(lr / bias_correction1)) * exp_avg) / denominator
    master[:] = p
    weights_out[:] = round_weights(master, dtypes[1])


def cast(source: Array, target: Array, *, dtypes: tuple[str, str]) -> None:
    """target = source, to nearest, ties to even; `dtypes`: of source and target."""
    target[:] = source if dtypes[0] == dtypes[1] else round_to_even(load(source, dtypes[0]), dtypes[1])


def square_sums(values: Array, starts: Array, stops: Array, out: Array, *, dtype: str) -> None:
    """out[i] = the sum of squares of segment i, over sixteen lanes that are then added by halves."""
    for k, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        lanes = np.zeros((-(-(stop - start) // 16) + 1, 16))
        lanes.reshape(-1)[16 : 16 + stop - start] = load(values[start:stop], dtype)
        with np.errstate(invalid="ignore"):
            total = np.add.accumulate(lanes * lanes, axis=0)[-1]
            for half in (8, 4, 2, 1):
                total = total[:half] + total[half:]
        out[k] = total[0]


def land(
    source: Array, home: Array, starts: Array, stops: Array, out: Array, *, dtypes: tuple[str, str], add: bool
) -> None:
    """Segments of home = source, or home + source in fp32; out as `square_sums` of home; `dtypes`: source, home."""
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        part = slice(start, stop)
        with np.errstate(over="ignore", invalid="ignore"):
            if add:
                total = load(home[part], dtypes[1]) + load(source[part], dtypes[0])
                home[part] = round_to_even(total, dtypes[1])
            else:
                cast(source[part], home[part], dtypes=dtypes)
    square_sums(home, starts, stops, out, dtype=dtypes[1])
