"""A step that all ranks take, and how it ended: one that fails tells the others, so that none goes on without it.

Owns: the exchange of outcomes, and the error of a rank whose peer has failed.
Does not: know what is done in the step.
Threads: that of the ranks' `exchange`: the training thread.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from offload.checkpoint.format.errors import CheckpointError, CorruptCheckpointError
from offload.ranks.protocol import TextExchange


@dataclass(slots=True)
class Outcome:
    """What a rank tells of its step, and what all have told."""

    here: dict[str, Any] = field(default_factory=dict)
    """Filled within the step: whatever JSON holds."""
    by_rank: list[dict[str, Any]] = field(default_factory=list)
    """After the step."""


@contextmanager
def on_all_ranks(ranks: TextExchange, what: str) -> Iterator[Outcome]:
    """A step of all ranks. Its error on any rank is an error on all.

    On the rank where it failed it is raised as it is; on the others as a CheckpointError, which names rank and error:
    a CorruptCheckpointError where that is one.
    """
    outcome = Outcome()
    try:
        yield outcome
    except BaseException as error:
        is_damage = isinstance(error, CorruptCheckpointError)
        ranks.exchange(json.dumps({"error": f"{type(error).__name__}: {error}", "is_damage": is_damage}))
        raise
    outcome.by_rank = [json.loads(text) for text in ranks.exchange(json.dumps(outcome.here))]
    for rank, other in enumerate(outcome.by_rank):
        if "error" in other:
            kind = CorruptCheckpointError if other["is_damage"] else CheckpointError
            raise kind(f"{what} failed on rank {rank}, so on all: {other['error']}")
