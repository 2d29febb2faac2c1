"""The memory and the hyper-parameters that the contenders of `offload bench adam` share.

Owns: which arrays there are, their values, and that each begins on a page of its own in one region, as the product
gets its memory.
Does not: step them (adam_contenders.py, peers.py).
Threads: filled by one thread; stepped by any.
"""

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from offload.kernels.dynamic_map import BLOCK_8BIT_NUMEL
from offload.memory.ledger import Ledger
from offload.memory.region import Region, bits, typed
from offload.units import MIB, round_up

LR: Final = 1e-4
BETAS: Final = (0.9, 0.999)
EPS: Final = 1e-8
WEIGHT_DECAY: Final = 0.1

MASTER_STD: Final = 0.02
GRADIENT_STD: Final = 1.0
"""As gradients of fp16 are with loss scaling: no denormals, which some CPUs convert slowly."""
FILL_NUMEL: Final = 2**20
"""Random values repeat after so many: drawing them all would take longer than the measurement."""

ARRAY_ALIGN_BYTES: Final = 2 * MIB
"""A huge page."""


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array: `numel_per` elements of the parameters share an entry."""

    dtype: torch.dtype
    numel_per: int = 1

    def num_bytes(self, numel: int) -> int:
        """Bytes for `numel` parameters."""
        return -(-numel // self.numel_per) * self.dtype.itemsize


FP32: Final = ArraySpec(torch.float32)
BITS: Final = ArraySpec(torch.uint16)
CODES: Final = ArraySpec(torch.uint8)
SCALES: Final = ArraySpec(torch.float32, BLOCK_8BIT_NUMEL)

ARRAYS: Final[dict[str, ArraySpec]] = {
    # of the reference, of the kernels with a plain master, of torch
    "master": FP32, "exp_avg": FP32, "exp_avg_sq": FP32, "weights": BITS,
    "gradient_bf16": BITS, "gradient_fp16": BITS, "gradient_fp32": FP32,
    # adding it changes nothing: the reference may share what the others step
    "gradient_zero": BITS,
    # of kernels with a split master, with fp32 moments from above or their own
    "weights_split": BITS, "remainder": BITS,
    "exp_avg_bf16": BITS, "exp_avg_sq_bf16": BITS,
    "exp_avg_8bit": CODES, "exp_avg_scale": SCALES, "exp_avg_sq_8bit": CODES, "exp_avg_sq_scale": SCALES,
}  # fmt: skip


def arrays_bytes(numel: int) -> int:
    """Bytes of all arrays for `numel` parameters."""
    return sum(round_up(spec.num_bytes(numel), ARRAY_ALIGN_BYTES) for spec in ARRAYS.values())


def bias_corrections(num_steps: int) -> tuple[float, float]:
    """`1 - beta1^t` and `sqrt(1 - beta2^t)`."""
    return 1.0 - BETAS[0] ** num_steps, math.sqrt(1.0 - BETAS[1] ** num_steps)


class AdamArrays:
    """All arrays for `numel` parameters, by name. Their memory goes when nothing refers to it any more."""

    def __init__(self, numel: int, seed: int) -> None:
        self.numel = numel
        region = Region(arrays_bytes(numel), owner="bench adam", ledger=Ledger({}))
        self._tensors: dict[str, Tensor] = {}
        offset = 0
        for name, spec in ARRAYS.items():
            num_bytes = spec.num_bytes(numel)
            self._tensors[name] = typed(region.tensor[offset : offset + num_bytes], spec.dtype)
            offset += round_up(num_bytes, ARRAY_ALIGN_BYTES)
        self._fill(np.random.default_rng(seed))

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def numel_per(self, name: str) -> int:
        """Parameters that share an entry of the array."""
        return ARRAYS[name].numel_per

    def bits(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """The array as kernels take it."""
        return bits(self._tensors[name])

    def _fill(self, rng: np.random.Generator) -> None:
        block = torch.from_numpy(rng.standard_normal(min(self.numel, FILL_NUMEL), np.float32))
        master, gradient = block * MASTER_STD, block * GRADIENT_STD
        values = {
            "master": master,
            "gradient_fp32": gradient.bfloat16().float(),
            "gradient_bf16": gradient.bfloat16(),
            "gradient_fp16": gradient.half(),
            "weights": master.bfloat16(),
            "weights_split": master.bfloat16(),
        }
        for name, source in values.items():
            target = self._tensors[name].view(source.dtype)
            for start in range(0, self.numel, FILL_NUMEL):
                target[start : start + FILL_NUMEL] = source[: self.numel - start]
