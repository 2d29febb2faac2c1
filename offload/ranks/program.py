"""What a rank asks of the others, in the order in which its program does.

Owns: the record of the latest requests, and where two records part.
Does not: make the requests (collectives.py) or bring the record to other ranks (watch.py).
Threads: written by the training thread, and autograd's own in its place; read by any.

Note [Same program]: collectives run on several threads, each with a group and an order of its own. So ranks whose
programs differ may wait for each other in different groups, for ever: one reads weights on the training thread while
another, further on, gathers the next block. But one thread asks for all of it, so there is one order over all groups,
the same on every rank. Ranks that wait long show each other what they asked for; where two records differ at one
number, the ranks have diverged, whatever their speed.
"""

import json
import threading
from collections import deque
from typing import Final

NUM_KEPT: Final = 1024
"""Requests that are remembered: more than a rank can be ahead, which is a backward over some hundred blocks."""


class Program:
    """Of one rank."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_asked = 0
        self._latest: deque[str] = deque(maxlen=NUM_KEPT)

    def ask(self, what: str) -> None:
        """The rank asks the others for one thing more."""
        with self._lock:
            self._num_asked += 1
            self._latest.append(what)

    def told(self) -> str:
        """The record, for the others."""
        with self._lock:
            return json.dumps([self._num_asked - len(self._latest), list(self._latest)])


def parting(one: str, other: str) -> tuple[str, str] | None:
    """What two ranks asked for at the first number where their records differ; None where they do not."""
    (first, asked), (other_first, other_asked) = json.loads(one), json.loads(other)
    start = max(first, other_first)
    pairs = zip(asked[start - first :], other_asked[start - other_first :], strict=False)
    return next(((a, b) for a, b in pairs if a != b), None)
