"""Ranks in a world of one that do shard: every collective is a copy, so that what several ranks do runs in one process.

It must then equal what a single rank computes, bit for bit, under every device double.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class LoneRanks:
    """As `offload.ranks.protocol.Ranks`."""

    rank = 0
    world_size = 1
    local_rank = 0
    num_local = 1
    is_sharded = True

    def __init__(self) -> None:
        self.order: list[str] = []
        self.num_totals = 0
        self.closed = False

    @property
    def saving(self) -> "LoneRanks":
        return self

    def ask(self, what: str) -> None:
        """The lane does it, and says so in `order`."""

    def check_order(self, what: str) -> None:
        self.order.append(what)

    def all_gather(self, whole: Tensor, shard: Tensor) -> None:
        if whole.data_ptr() != shard.data_ptr():
            whole.copy_(shard)

    def all_to_all(self, received: Tensor, sent: Tensor) -> None:
        received.copy_(sent)

    def reduce_scatter(self, shard: Tensor, whole: Tensor) -> None:
        shard.copy_(whole)

    def totals(self, values: np.ndarray) -> np.ndarray:
        self.num_totals += 1
        return values[None].copy()

    def exchange(self, text: str) -> Sequence[str]:
        return [text]

    def unite(self, bits: np.ndarray, what: str = "unite") -> np.ndarray:
        return bits.copy()

    def broadcast(self, tensor: Tensor) -> None:
        """The first rank is this one."""

    def fill_in(self, tensor: Tensor) -> None:
        """No other has a part."""

    def note_failure(self, text: str) -> None:
        """There is nobody to tell."""

    def failed(self) -> str | None:
        return None

    def close(self) -> None:
        self.closed = True


def lone_ranks(device: torch.device) -> LoneRanks:
    return LoneRanks()
