"""Agreement of the ranks on gradients: when a partition's are averaged, and which parameters have one.

Owns: the moment at which each partition is due, and the union over ranks of what has arrived.
Does not: hold or move gradients (rank_reduction.py, ranks/exchange.py).
Threads: autograd's own thread during backward, else the training thread; never two at once.

Note [Due]: which parameters of a partition get a gradient may depend on a rank's data (routing, a skipped branch), so
a partition is averaged at a point that the program decides: when a backward releases it for the last time. How often
a backward does is what the backward before did; in the first, once. What comes later than expected, or is released
less often, is averaged when the backward ends, in partition order, after the ranks have agreed on which.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from offload.model.partitions import Partition
from offload.ranks.protocol import Ranks


class Agreement:
    """Of one session's ranks."""

    def __init__(self, ranks: Ranks, partitions: Sequence[Partition]) -> None:
        self._ranks = ranks
        self._num_entries = [len(partition.trainable.entries) for partition in partitions]
        self._starts = np.cumsum([0, *self._num_entries]).tolist()
        self._expected: Counter[int] = Counter()
        self._released: Counter[int] = Counter()
        self._arrived: dict[int, set[int]] = {}
        self._num_dropped = self._drops = 0
        """Since the last union: how many, and a sum over which."""

    def released(self, pid: int) -> bool:
        """A backward has released a partition; whether its gradients are due now."""
        if not self._num_entries[pid]:
            return False
        self._released[pid] += 1
        return self._released[pid] == (self._expected[pid] or 1)

    def arrived(self, pid: int, positions: Collection[int]) -> None:
        """These entries of a partition have a gradient on this rank."""
        self._arrived.setdefault(pid, set()).update(positions)

    def end_backward(self) -> list[int]:
        """The backward is over: partitions that it released less often than expected, in order. They are due."""
        late = sorted(pid for pid, count in self._released.items() if count < (self._expected[pid] or 1))
        self._expected, self._released = self._released, Counter()
        return late

    def dropped(self, pid: int, position: int) -> None:
        """The user has dropped the gradient of an entry, which every rank has to do."""
        self._num_dropped += 1
        self._drops = crc32(f"{pid} {position}".encode(), self._drops)

    def unite(self, waiting: Collection[int], what: str, details: str = "") -> tuple[list[int], Mapping[int, set[int]]]:
        """Partitions of which some rank has gradients `waiting` to be averaged, in order; and, by partition, the
        entries that have a gradient on any rank since the last call. All ranks must call it, about to do `what` with
        the same `details`, and have dropped the same.
        """
        if self._num_dropped:
            what += f" after {self._num_dropped} gradients were dropped ({self._drops:08x})"
        self._num_dropped = self._drops = 0
        flags = np.zeros(self._starts[-1] + len(self._num_entries), np.uint8)
        for pid, positions in self._arrived.items():
            for position in positions:
                flags[self._starts[pid] + position] = 1
        for pid in waiting:
            flags[self._starts[-1] + pid] = 1
        flags = self._ranks.unite(flags, f"{what}{details}")
        self._arrived.clear()
        united: dict[int, set[int]] = {}
        for pid, (start, stop) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            if flags[start:stop].any():
                united[pid] = set(np.flatnonzero(flags[start:stop]).tolist())
        return np.flatnonzero(flags[self._starts[-1] :]).tolist(), united


def options_of(optimizer: torch.optim.Optimizer | None) -> str:
    """What the groups of an optimizer say in plain values. Every rank steps its own part of each parameter by them."""
    groups = optimizer.param_groups if optimizer is not None else []
    lines = []
    for index, group in enumerate(groups):
        options = {name: _plain(value) for name, value in group.items() if name not in ("params", "param_names")}
        lines.append(
            f"group {index} "
            + ", ".join(f"{name}={text}" for name, text in options.items() if text not in ("", "None", "False"))
        )
    return "; ".join(lines)


def _plain(value: Any) -> str:
    """Empty for what has no plain value, as what it says of itself may differ between processes."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, float):
        return f"{value:.9g}"  # not to the last bit, in which the math libraries of two nodes may differ
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_plain, value))})"
    return str(value) if isinstance(value, int | str | None) else ""
