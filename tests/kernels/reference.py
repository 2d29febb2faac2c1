"""Oracles: the kernels' arithmetic in plain numpy, with the same arguments and the names of the dtypes.

Owns: what the kernels are checked against: the same bits on CPUs with fused multiply-add. Slow.
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


def split(master: Array, weights: Array, remainder: Array) -> None:
    """bf16 weights and remainders of masters; a NaN is 0x7FC00000."""
    bits = np.where(np.isnan(master), np.uint32(0x7FC00000), master.view(np.uint32))
    weights[:] = round_weights(master, "bf16")
    remainder[:] = bits.astype(np.uint16)


def join(weights: Array, remainder: Array, master: Array) -> None:
    """Masters of bf16 weights and remainders."""
    low = remainder.view(np.int16).astype(np.int64)
    master[:] = ((weights.astype(np.int64) << 16) + low).astype(np.uint32).view(np.float32)


def _load_master(array0: Array, weights: Array, master: str) -> Array:
    if master == "plain":
        return array0.copy()
    joined = np.empty(array0.size, np.float32)
    join(weights, array0, joined)
    return joined


def _store_master(p: Array, array0: Array, weights: Array, master: str, dtype: str) -> None:
    if master == "split":
        split(p, weights, array0)
        return
    array0[:] = (
        np.where(np.isnan(p), np.uint32(0x7FC00000), p.view(np.uint32)).view(np.float32) if dtype == "bf16" else p
    )
    weights[:] = round_weights(p, dtype)


def _mixed(word: int) -> int:
    mask = 2**64 - 1
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & mask
    word = (word ^ word >> 27) * 0x94D049BB133111EB & mask
    return word ^ word >> 31


def random_bits(seed: int, first: int, numel: int) -> Array:
    """32 random bits for each element: a hash of the seed and the element's number."""
    out = np.empty(numel, np.uint32)
    numbers = np.arange(first, first + numel, dtype=np.uint64)
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    start = _mixed(seed + golden & mask)
    for page in np.unique(numbers >> np.uint64(32)).tolist():
        key = _mixed(start + page * golden & mask)
        here = numbers >> np.uint64(32) == page
        x = numbers[here].astype(np.uint32) ^ np.uint32(key & 0xFFFFFFFF)
        x = (x ^ x >> np.uint32(16)) * np.uint32(0x21F0AAAD) ^ np.uint32(key >> 32)
        x = (x ^ x >> np.uint32(15)) * np.uint32(0xD35A2D97)
        out[here] = x ^ x >> np.uint32(15)
    return out


def round_stochastic(values: Array, noise: Array) -> Array:
    """bf16 bits of fp32 values, rounded up where the lower sixteen bits and the noise carry."""
    bits = np.where(np.isnan(values), np.uint32(0x7FC00000), values.view(np.uint32))
    is_top = bits & np.uint32(0x7FFFFFFF) >= np.uint32(0x7F7F0000)
    return (bits + np.where(is_top, np.uint32(0), noise) >> np.uint32(16)).astype(np.uint16)


def entries_8bit(signed: bool) -> Array:
    """The entries that are not negative, in units of 1e-6, in fp64: decades cut in parts, the middles of the parts."""
    entries = [0.0]
    for decade in range(7):
        borders = np.linspace(0.1, 1.0, (2**decade if signed else 2 ** (decade + 1)) + 1)
        entries += ((borders[:-1] + borders[1:]) / 2 * 10.0**decade).tolist()
    return np.array([*entries, 1e6]).astype(np.float32).astype(np.float64)


def encode_8bit(values: Array, codes: Array, scales: Array, *, signed: bool) -> None:
    """Per block of 256 its scale, and the codes of the nearest entries; ties to the larger magnitude."""
    entries = entries_8bit(signed)
    borders = (entries[:-1] + entries[1:]) / 2  # exact: sums of fp32 of one magnitude
    for block, start in enumerate(range(0, values.size, 256)):
        part = values[start : start + 256]
        largest = np.max(np.abs(part))
        scales[block] = max(largest, np.float32(2.0**-106)) if largest > 0 else largest
        if not np.isfinite(largest):
            scales[block] = np.nan
        with np.errstate(all="ignore"):
            x = part * (np.float32(1e6) / (scales[block] if largest != 0 else np.float32(1.0)))
        counts = np.searchsorted(borders, np.abs(x).astype(np.float64), side="right")
        counts[np.isnan(x)] = 0
        signed_codes = np.maximum(np.where(np.signbit(x), -counts, counts) + 127, 0)
        codes[start : start + 256] = signed_codes if signed else counts


def decode_8bit(codes: Array, scales: Array, values: Array, *, signed: bool) -> None:
    """Entry times scale: entries in fp32, each a product of two numbers, a power of ten and one between 1 and 10."""
    entries = entries_8bit(signed)
    decades = np.clip(np.floor(np.log10(np.maximum(entries, 0.1) + 1e-9)) + 1, 0, 6)
    powers = (10.0 ** (decades - 7)).astype(np.float32)
    table = powers * (entries * 10.0 ** (1 - decades)).astype(np.float32)
    table[-1] = 1.0
    counts = codes.astype(np.int64) - 127 if signed else codes.astype(np.int64)
    found = np.where(counts < 0, -table[np.abs(counts)], table[np.abs(counts)]).astype(np.float32)
    with np.errstate(all="ignore"):
        values[:] = found * np.repeat(scales, 256)[: values.size]


def step(
    *arguments: Any, dtypes: tuple[str, str], master: str = "plain", state: str = "fp32", amsgrad: bool = False
) -> None:
    """One step of Adam or AdamW in place; arguments as adam.step_kernel's; `dtypes`: of gradient and weights."""
    array0, *rest = arguments
    if state == "fp32":
        state_tensors, rest = rest[: 2 + amsgrad], rest[2 + amsgrad :]
        _adam(array0, list(state_tensors), *rest, dtypes=dtypes, master=master)
    elif state == "bf16":
        state_tensors, (gradient, weights, first, *hyper, seed) = rest[:2], rest[2:]
        moments = [load(state_tensor, "bf16") for state_tensor in state_tensors]
        _adam(array0, moments, gradient, weights, first, *hyper, dtypes=dtypes, master=master)
        bits = random_bits(seed, first, array0.size)
        state_tensors[0][:] = round_stochastic(moments[0], bits & np.uint32(0xFFFF))
        state_tensors[1][:] = round_stochastic(moments[1], bits >> np.uint32(16))
    else:
        state_tensors, rest = rest[:4], rest[4:]
        moments = [np.empty(array0.size, np.float32) for _ in range(2)]
        for moment, k in zip(moments, (0, 2), strict=True):
            decode_8bit(state_tensors[k], state_tensors[k + 1], moment, signed=k == 0)
        _adam(array0, moments, *rest, dtypes=dtypes, master=master)
        for moment, k in zip(moments, (0, 2), strict=True):
            encode_8bit(moment, state_tensors[k], state_tensors[k + 1], signed=k == 0)


def _adam(
    array0: Array, moments: list[Array], gradient: Array, weights: Array, first: int, lr: float, beta1: float,
    beta2: float, eps: float, weight_decay: float, bias_correction1: float, bias_correction2_sqrt: float,
    gradient_scale: float, decoupled: bool, *, dtypes: tuple[str, str], master: str,
) -> None:  # fmt: skip
    exp_avg, exp_avg_sq, *largest = moments
    f = np.float32
    with np.errstate(all="ignore"):
        g = load(gradient, dtypes[0]) * f(gradient_scale)
        p = _load_master(array0, weights, master)
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
        for each in largest:
            each[:] = np.maximum(each, exp_avg_sq)
        denominator = np.sqrt((largest or [exp_avg_sq])[0]) / f(bias_correction2_sqrt) + f(eps)
        p += (f(-(lr / bias_correction1)) * exp_avg) / denominator
    _store_master(p, array0, weights, master, dtypes[1])


def lion(
    array0: Array, exp_avg: Array, gradient: Array, weights: Array, first: int, lr: float, beta1: float, beta2: float,
    weight_decay: float, scale: float, *, dtypes: tuple[str, str], master: str = "plain",
) -> None:  # fmt: skip
    """One step of Lion in place; arguments as lion.step_kernel's."""
    f = np.float32
    with np.errstate(all="ignore"):
        g = load(gradient, dtypes[0]) * f(scale)
        p = _load_master(array0, weights, master) * f(1.0 - lr * weight_decay)
        direction = np.nan_to_num(np.sign(exp_avg * f(beta1) + g * f(1.0 - beta1)), nan=0.0)
        p = np.where(direction == 0, p, p - f(lr) * direction).astype(np.float32)
        exp_avg[:] = fma(g, f(1.0 - beta2), exp_avg * f(beta2))
    _store_master(p, array0, weights, master, dtypes[1])


def adagrad(
    array0: Array, total: Array, gradient: Array, weights: Array, first: int, clr: float, eps: float,
    weight_decay: float, scale: float, *, dtypes: tuple[str, str], master: str = "plain",
) -> None:  # fmt: skip
    """One step of Adagrad in place; arguments as adagrad.step_kernel's."""
    f = np.float32
    with np.errstate(all="ignore"):
        g = load(gradient, dtypes[0]) * f(scale)
        p = _load_master(array0, weights, master)
        if weight_decay != 0.0:
            g = fma(p, f(weight_decay), g)
        total[:] = fma(g, g, total)
        p += (f(-clr) * g) / (np.sqrt(total) + f(eps))
    _store_master(p, array0, weights, master, dtypes[1])


def sgd(
    array0: Array, buffer: Array, gradient: Array, weights: Array, first: int, lr: float, momentum: float,
    dampening: float, weight_decay: float, scale: float, nesterov: bool, is_first_step: bool, *,
    dtypes: tuple[str, str], master: str = "plain",
) -> None:  # fmt: skip
    """One step of SGD with momentum in place; arguments as sgd.step_kernel's."""
    f = np.float32
    with np.errstate(all="ignore"):
        g = load(gradient, dtypes[0]) * f(scale)
        p = _load_master(array0, weights, master)
        if weight_decay != 0.0:
            g = fma(p, f(weight_decay), g)
        buffer[:] = g if is_first_step else fma(g, f(1.0 - dampening), buffer * f(momentum))
        p = fma(fma(buffer, f(momentum), g) if nesterov else buffer, f(-lr), p)
    _store_master(p, array0, weights, master, dtypes[1])


def sgd_without_momentum(
    array0: Array, gradient: Array, weights: Array, first: int, lr: float, weight_decay: float, scale: float, *,
    dtypes: tuple[str, str], master: str = "plain",
) -> None:  # fmt: skip
    """One step of plain SGD in place; arguments as sgd.step_kernel(momentum=False)'s."""
    f = np.float32
    with np.errstate(all="ignore"):
        g = load(gradient, dtypes[0]) * f(scale)
        p = _load_master(array0, weights, master)
        if weight_decay != 0.0:
            g = fma(p, f(weight_decay), g)
        p = fma(g, f(-lr), p)
    _store_master(p, array0, weights, master, dtypes[1])


def streams(a: Array, b: Array, c: Array, gradient: Array, weights: Array, first: int, *, dtype: str) -> None:
    """a, b, c each grow by the gradient; the weights are a, rounded to even."""
    with np.errstate(all="ignore"):
        g = load(gradient, dtype)
        for array in (a, b, c):
            array += g
        weights[:] = round_to_even(a, dtype)


def cast(source: Array, target: Array, *, dtypes: tuple[str, str]) -> None:
    """target = source, to nearest, ties to even; `dtypes`: of source and target."""
    target[:] = source if dtypes[0] == dtypes[1] else round_to_even(load(source, dtypes[0]), dtypes[1])


def square_sums(values: Array, starts: Array, stops: Array, out: Array, *, dtype: str) -> None:
    """out[i] = the sum of squares of segment i, in sixteen accumulators that are then added by halves."""
    for k, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        rows = np.zeros((-(-(stop - start) // 16) + 1, 16))
        rows.reshape(-1)[16 : 16 + stop - start] = load(values[start:stop], dtype)
        with np.errstate(invalid="ignore"):
            total = np.add.accumulate(rows * rows, axis=0)[-1]
            for half in (8, 4, 2, 1):
                total = total[:half] + total[half:]
        out[k] = total[0]


def store(
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
