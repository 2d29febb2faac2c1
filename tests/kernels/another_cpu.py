"""A process that compiles kernels for the CPU that its environment names: `python another_cpu.py OUTPUT.npz`.

Writes what they leave. One step each from finite values, the same in every process.
"""

import sys
from typing import Any

import numpy as np

from offload.kernels import cast, moments, reduce, split
from tests.kernels.values import Array, values_of
from tests.kernels.variants import VARIANTS, make_state

NUMEL = 1000
FORMS = (("bf16", "bf16", "split"), ("fp16", "fp16", "plain"))


def steps() -> dict[str, Array]:
    """What one step of each variant leaves; half of them on each form, to compile less."""
    left = {}
    for number, variant in enumerate(VARIANTS):
        form = FORMS[number % 2]
        state = make_state(variant, NUMEL, form, np.random.default_rng(number), special=False)
        variant.kernel(*form[:2], master=form[2])(*state, 256, *variant.hypers[1])
        if form[2] == "split":
            joined = np.zeros(NUMEL, np.float32)
            split.join_kernel()(state[-1], state[0], joined)
            state[0] = joined
        left |= {f"{variant.name}-{i}": array for i, array in enumerate(state)}
    return left


def exact() -> dict[str, Array]:
    """What kernels leave that contain no multiply-add, or only such as are exact."""
    rng = np.random.default_rng(0)
    values = values_of(NUMEL, "fp32", rng)
    halves, sums = np.zeros(NUMEL, np.uint16), np.zeros(1)
    cast.cast_kernel("fp32", "fp16")(values, halves)
    home = values_of(NUMEL, "bf16", rng, special=False)
    reduce.store_kernel("fp32", "bf16", True)(values[::-1].copy(), home, np.array([1]), np.array([NUMEL]), sums)
    left = {"halves": halves, "home": home, "sums": sums}
    finite = values_of(NUMEL, "fp32", rng, special=False)
    for kind in moments.MAPS:
        codes, scales, back = np.zeros(NUMEL, np.uint8), np.zeros(4, np.float32), np.zeros(NUMEL, np.float32)
        moments.encode_kernel(kind)(finite, codes, scales)
        moments.decode_kernel(kind)(codes, scales, back)
        left |= {f"{kind}-codes": codes, f"{kind}-scales": scales, f"{kind}-back": back}
    return left


def everything() -> dict[str, Any]:
    """Both, with names that tell them apart."""
    return {f"step {k}": v for k, v in steps().items()} | {f"exact {k}": v for k, v in exact().items()}


if __name__ == "__main__":
    np.savez(sys.argv[1], **everything())
