"""What a forked child, as a data loader's worker is, must not use.

Owns: the list of those who hold such things, and the one callback that Python's fork makes.
Does not: know what they hold.
Threads: any may add; a child has the forking thread alone.
"""

import os
import weakref
from typing import Final, Protocol


class Holder(Protocol):
    """Holds what a child must not use or keep."""

    def abandon(self) -> None:
        """In a forked child, before anything else runs there."""


_holders: "Final[weakref.WeakSet[Holder]]" = weakref.WeakSet()


def abandon_in_children(holder: Holder) -> None:
    """Call `holder.abandon()` in every forked child, as long as it lives."""
    _holders.add(holder)


def _abandon_all() -> None:
    for holder in list(_holders):
        holder.abandon()
    _holders.clear()


os.register_at_fork(after_in_child=_abandon_all)
