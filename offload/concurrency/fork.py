"""What has to be let go in a forked child, as a data loader's worker is.

Owns: the list of those who want to know, and the one callback that Python's fork makes.
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
    """Ask `holder`, as long as it lives, to let go in every forked child."""
    _holders.add(holder)


def _let_go() -> None:
    for holder in list(_holders):
        holder.abandon()
    _holders.clear()


os.register_at_fork(after_in_child=_let_go)
