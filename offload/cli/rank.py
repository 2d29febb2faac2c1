"""The rank that this process is, when torchrun starts several of a command.

Owns: joining and leaving torch.distributed, also after torchrun has started the ranks again; this rank's part of a
batch; what the ranks tell each other about a step.
Does not: share the model (offload.enable does) or say anything: the first rank speaks for all.
Threads: the main thread.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from offload.device.choose import default_accelerator
from offload.disk.named_folder import remove_leftovers
from offload.errors import ConfigError
from offload.ranks.watch import RankWatch, of_this_attempt, store_of_session

MEET_TIMEOUT_S: Final = 600.0
"""How long the ranks wait for each other at the start: as torch does in init_process_group, which comes before."""


class Rank:
    """One of `world_size`."""

    def __init__(self, rank: int, world_size: int, device: str | None, watch: RankWatch | None = None) -> None:
        """`watch`: None for the only one."""
        self.rank = rank
        self.world_size = world_size
        self.device = device
        """What it computes on; None: the default."""
        self._watch = watch

    @property
    def is_first(self) -> bool:
        """Whether it speaks for all."""
        return self.rank == 0

    def check_batch(self, num_sequences: int) -> None:
        """Raise ConfigError for a batch that cannot be divided."""
        if num_sequences % self.world_size:
            raise ConfigError(
                f"--batch {num_sequences} cannot be divided among {self.world_size} ranks; give a multiple of that."
            )

    def part_of(self, batch: Any) -> Any:
        """This rank's sequences of a whole batch."""
        length = len(batch) // self.world_size
        return batch[self.rank * length : (self.rank + 1) * length]

    def agree(self, loss: float, *, is_ending: bool) -> tuple[float, bool]:
        """The loss over the whole batch, and whether any rank was asked to end. RankFailedError where one has ended."""
        if self._watch is None:
            return loss, is_ending
        both = torch.tensor([loss, float(is_ending)], dtype=torch.float64, device=self.device)
        try:
            dist.all_reduce(both)
        except RuntimeError as error:
            raise self._watch.broken("the loss of a step", error) from error
        total, num_ending = both.tolist()
        return total / self.world_size, num_ending > 0


@contextmanager
def rank_of_this_process() -> Iterator[Rank]:
    """By the variables that torchrun sets; alone without them. Leaves torch.distributed as it was."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Rank(0, 1, None)
        return
    accelerator = default_accelerator()
    device = None if accelerator is None else f"{accelerator.type}:{os.environ.get('LOCAL_RANK', '0')}"
    dist.init_process_group(device_id=None if device is None else torch.device(device), **_store_of_torchrun())
    rank, world_size = dist.get_rank(), dist.get_world_size()
    watch = RankWatch(store_of_session(dist.group.WORLD, rank), rank, world_size, MEET_TIMEOUT_S)
    try:
        watch.meet()
        yield Rank(rank, world_size, device, watch)
    except BaseException as error:
        watch.note_failure(rank, f"{type(error).__name__}: {error}")
        raise
    finally:
        watch.close()
        dist.destroy_process_group()


def _store_of_torchrun() -> dict[str, Any]:
    """How to find the other ranks; nothing where torch finds them by itself.

    Where torchrun's own process holds the store, torch would read what ranks wrote that have been killed since.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return {}
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    tcp_store: Any = getattr(dist, "TCPStore")  # noqa: B009 - public, and yet not exported for type checkers
    store = tcp_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=False)
    return {"store": of_this_attempt(store), "rank": rank, "world_size": world_size}


def remove_what_killed_ranks_left(folders: Sequence[Path]) -> None:
    """Swap folders with names, where torchrun has started the ranks again: each restart would leave the disk less room.

    By one rank of each node, before the ranks join: none measures the room, or makes a folder, in the meantime.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    for folder in folders:
        if folder.is_dir():
            remove_leftovers(folder)
