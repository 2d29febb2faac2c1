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

from offload.checkpoint.format.errors import CheckpointError
from offload.checkpoint.format.save import Ranks


@dataclass(slots=True)
class Outcome:
    """What a rank tells of its step, and what all have told."""

    own: dict[str, Any] = field(default_factory=dict)
    """Filled within the step: whatever JSON holds."""
    of_all: list[dict[str, Any]] = field(default_factory=list)
    """By rank; after the step."""


@contextmanager
def together(ranks: Ranks | None, what: str) -> Iterator[Outcome]:
    """A step of all ranks (None: of the only one). Its error on any rank is an error on all: here this rank's own, else
    CheckpointError, which names the rank and its error."""
    outcome = Outcome()
    try:
        yield outcome
    except BaseException as error:
        if ranks is not None:
            ranks.exchange(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise
    if ranks is None:
        outcome.of_all = [outcome.own]
        return
    outcome.of_all = [json.loads(text) for text in ranks.exchange(json.dumps(outcome.own))]
    for rank, other in enumerate(outcome.of_all):
        if "error" in other:
            raise CheckpointError(f"{what} failed on rank {rank}, so on all: {other['error']}")
