"""Oracles: the kernels' arithmetic in plain numpy, with the same arguments.

Owns: what the kernels are checked against (tests/kernels). Slow; nothing else uses it.
"""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def load(values: Array, dtype: str) -> Any:
    """fp32 of an array of this dtype's bits."""
    if dtype == "bf16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.view(np.float16).astype(np.float32) if dtype == "fp16" else values


def round_weights(master: Array, dtype: str) -> Array:
    """Bits of the weights: bf16 ties away from zero (NaN is 0x7FC0), fp16 ties to even."""
    if dtype == "bf16":
        bits = np.where(np.isnan(master), np.uint32(0x7FC00000), master.view(np.uint32))
        return ((bits + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
    if dtype == "fp16":
        with np.errstate(over="ignore"):
            return master.astype(np.float16).view(np.uint16)
    return master.copy()


def step(
    master: Array, exp_avg: Array, exp_avg_sq: Array, gradient: Array, weights_out: Array, first: int, lr: float,
    beta1: float, beta2: float, eps: float, weight_decay: float, correction1: float, correction2_sqrt: float,
    scale: float, decoupled: bool, *, dtypes: tuple[str, str],
) -> None:  # fmt: skip
    """One step of Adam or AdamW in place; `dtypes`: of gradient and weights."""
    f = np.float32
    with np.errstate(all="ignore"):
        g = load(gradient, dtypes[0]) * f(scale)
        p: Any = master.copy()
        if decoupled:
            p *= f(1.0 - lr * weight_decay)
        else:
            g = g + f(weight_decay) * p
        exp_avg += f(1.0 - beta1) * (g - exp_avg)
        exp_avg_sq[:] = exp_avg_sq * f(beta2) + f(1.0 - beta2) * (g * g)
        p -= f(lr / correction1) * (exp_avg / (np.sqrt(exp_avg_sq) / f(correction2_sqrt) + f(eps)))
    master[:] = p
    weights_out[:] = round_weights(master, dtypes[1])
