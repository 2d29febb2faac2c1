"""The interface `Ranks`: what the ranks of a session do together.

Owns: the signatures, and which thread may make which call.
Does not: implement them (single.py for one rank, collectives.py over torch.distributed).
Threads: each method names its own. All ranks make the same calls in the same order within each of these threads.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

F64 = np.ndarray[Any, np.dtype[np.float64]]
U8 = np.ndarray[Any, np.dtype[np.uint8]]


class TextExchange(Protocol):
    """Texts between all ranks, for one thread. All of them make the same number of calls."""

    rank: int
    world_size: int

    def exchange(self, text: str) -> Sequence[str]:
        """What every rank gave, by rank."""


@runtime_checkable
class Ranks(Protocol):
    """All ranks of a session.

    Errors: RankFailedError where one has failed, WaitTimeoutError where one does not come, RanksDivergedError where
    they are about to do different things.
    """

    rank: int
    world_size: int
    local_rank: int
    """Position among the ranks of this node."""
    num_local: int
    """Ranks of this node, which share its memory and disks."""
    is_sharded: bool
    """Each rank keeps its shard of everything, and they are exchanged. False for a single rank: nothing is copied."""

    @property
    def saving(self) -> TextExchange:
        """For the thread that saves."""

    def ask(self, what: str) -> None:
        """Training thread: `what` has been submitted to the collective lane. Does not wait. See Note [Same program]."""

    def check_order(self, what: str) -> None:
        """Collective lane: RanksDivergedError unless every rank is about to do `what`."""

    def all_gather(self, whole: Tensor, shard: Tensor) -> None:
        """Collective lane: whole = the W shards in rank order, uint8; `shard` may be its own place in `whole`.

        This and the next two return when it is over on the host, and are issued on the current stream elsewhere.
        """

    def all_to_all(self, received: Tensor, sent: Tensor) -> None:
        """Collective lane: part i of `sent` goes to rank i, part i of `received` comes from it; uint8, equal parts."""

    def reduce_scatter(self, shard: Tensor, whole: Tensor) -> None:
        """Collective lane: shard = the sum over ranks of its place in `whole`, in their dtype."""

    def totals(self, values: F64) -> F64:
        """Step lane: (W, n), the n values of every rank."""

    def exchange(self, text: str) -> list[str]:
        """Training thread: every rank's text, by rank."""

    def unite(self, bits: U8, what: str = "unite") -> U8:
        """Training thread: the element-wise maximum over ranks, all of which are about to do `what`."""

    def broadcast(self, tensor: Tensor) -> None:
        """Training thread: the values of rank 0, bit for bit, in place; any dtype, strides and device."""

    def fill_in(self, tensor: Tensor) -> None:
        """Training thread: every element bit for bit from the rank where its bits are not all zero, in place.

        There is one such rank at most. Any dtype, strides and device.
        """

    def note_failure(self, text: str) -> None:
        """Any thread: this rank cannot go on; the errors of the others will say so. Does not wait."""

    def failed(self) -> str | None:
        """Any thread: which rank has failed and why, None where none is known to have. Does not wait for ranks."""

    def close(self) -> None:
        """Training thread, when the others use nothing of this any more: leave. May be called twice; never hangs."""
