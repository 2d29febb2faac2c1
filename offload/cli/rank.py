"""The rank that this process is, when torchrun starts several of a command.

Owns: joining and leaving torch.distributed, this rank's part of a batch, what the ranks tell each other about a step.
Does not: share the model (offload.enable does) or say anything: the first rank speaks for all.
Threads: the main thread.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from offload.device import default_accelerator
from offload.errors import ConfigError


class Rank:
    """One of `world_size`."""

    def __init__(self, rank: int, world_size: int, device: str | None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        """What it computes on; None: the default."""

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
        """The loss over the whole batch, and whether any rank was asked to end."""
        if self.world_size == 1:
            return loss, is_ending
        both = torch.tensor([loss, float(is_ending)], dtype=torch.float64, device=self.device)
        dist.all_reduce(both)
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
    dist.init_process_group(device_id=None if device is None else torch.device(device))
    try:
        yield Rank(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
