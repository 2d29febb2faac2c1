"""One rank without others: `Ranks` of size 1, which communicates with nobody and copies nothing.

Owns: what each call of `Ranks` means for a single rank.
Does not: exist where there are other ranks (collectives.py).
Threads: any; it has no state.

Note [Single rank]: weights stay in their slots, gradients go home without an average, and no lane for collectives is
made. Where the package asks `is_sharded`, it is for one of these; every other call is made whatever the size.
"""

from typing import Final

from torch import Tensor

from offload.errors import InternalError
from offload.ranks.protocol import F64, U8, TextExchange


class SingleRank:
    """The only rank of a session."""

    rank = 0
    world_size = 1
    local_rank = 0
    num_local = 1
    is_sharded = False

    @property
    def saving(self) -> TextExchange:
        return self

    def ask(self, what: str) -> None:
        """There is nobody to ask."""

    def check_order(self, what: str) -> None:
        """There is no other order."""

    def all_gather(self, whole: Tensor, shard: Tensor) -> None:
        raise _no_shards("all_gather")

    def all_to_all(self, received: Tensor, sent: Tensor) -> None:
        raise _no_shards("all_to_all")

    def reduce_scatter(self, shard: Tensor, whole: Tensor) -> None:
        raise _no_shards("reduce_scatter")

    def totals(self, values: F64) -> F64:
        return values[None]

    def exchange(self, text: str) -> list[str]:
        return [text]

    def unite(self, bits: U8, what: str = "unite") -> U8:
        return bits

    def broadcast(self, tensor: Tensor) -> None:
        """The first rank is this one."""

    def fill_in(self, tensor: Tensor) -> None:
        """No other rank has a part."""

    def note_failure(self, text: str) -> None:
        """There is nobody to tell."""

    def failed(self) -> str | None:
        return None

    def close(self) -> None:
        """Nothing was opened."""


SINGLE_RANK: Final = SingleRank()


def _no_shards(what: str) -> InternalError:
    return InternalError(f"{what} was called for a single rank, which has no shards; check `is_sharded` before it.")
