"""Ranks: the other processes that train the same model. (To be completed.)"""

from typing import Any, Protocol


class Ranks(Protocol):
    """The ranks of one session."""

    rank: int
    world_size: int
    num_local: int

    def exchange(self, text: str) -> list[str]:
        """What every rank gave, by rank."""

    def close(self) -> None:
        """Leave."""


class ProcessRanks:
    """By torch.distributed."""

    @staticmethod
    def join(process_group: Any, *, device: Any, wait_timeout_s: float) -> Any:
        """None on one rank."""
        return None
