"""A checksum of 64 bits over whole 256-byte stripes.

Owns: the arithmetic. Each of 32 accumulators of 64 bits takes a word of every stripe: xor, multiply by an odd constant,
rotate. Then one more accumulator takes these 32 in the same way.
Does not: know what the bytes are or where sums are kept (offload/disk/checksums.py).

Every step is a bijection of its accumulator and of its word, so a change within one word always changes the sum; any
other change goes unseen once in 2^64. It is no protection against somebody who wants a collision.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
from numba import types

from offload.kernels.jit import compiled

NUM_ACCUMULATORS: Final = 32
"""Words in a stripe: enough vectors in flight to hide the latency of a multiplication."""

PRIME: Final = np.uint64(0x9E3779B185EBCA87)
"""The first prime of xxHash: odd, its bits well spread."""

LEFT: Final = np.uint64(29)
RIGHT: Final = np.uint64(35)
"""Together 64: the rotation brings the high bits, which depend on all lower ones, down again."""

HALF: Final = np.uint64(32)

READ: Final = types.Array(types.uint64, 1, "C", readonly=True)
WRITTEN: Final = types.Array(types.uint64, 1, "C")


@cache
def checksum_kernel() -> Callable[..., int]:
    """`(words (n,) uint64 with n a multiple of 32, accumulators (32,) uint64, overwritten)`; the
    sum."""

    @compiled(types.uint64(READ, WRITTEN))
    def checksum(words: Any, accumulators: Any) -> Any:
        for i in range(NUM_ACCUMULATORS):
            accumulators[i] = np.uint64(i + 1) * PRIME
        for stripe in range(len(words) // NUM_ACCUMULATORS):
            of_stripe = words[stripe * NUM_ACCUMULATORS : (stripe + 1) * NUM_ACCUMULATORS]
            for i in range(NUM_ACCUMULATORS):
                mixed = (accumulators[i] ^ of_stripe[i]) * PRIME
                accumulators[i] = (mixed << LEFT) | (mixed >> RIGHT)
        total = np.uint64(len(words))
        for i in range(NUM_ACCUMULATORS):
            mixed = (total ^ accumulators[i]) * PRIME
            total = (mixed << LEFT) | (mixed >> RIGHT)
        total = (total ^ (total >> HALF)) * PRIME
        return total ^ (total >> HALF)

    return checksum
