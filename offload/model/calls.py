"""Calls of a partition's outermost module, from forward to the end of the backward that needs them.

Owns: the states of a call and the moves between them.
Does not: hook or fetch anything (hooks.py).
Threads: the training thread and autograd's own; never two at once. Pure.
"""

import weakref
from collections.abc import Mapping
from enum import StrEnum
from typing import Final

import torch
from torch import nn

from offload.errors import InternalError


class CallState(StrEnum):
    """Who holds the partitions of a call, and whether anybody will again."""

    FORWARD = "in its forward"
    COVERED = "recomputed, in a node of a backward that holds its partitions longer"
    WAITING = "waiting for its backward"
    HELD = "held by a backward"
    SUSPENDED = "held by a backward, but without its partitions while another call is recomputed"
    OVER = "over"


LEGAL: Final[Mapping[CallState, frozenset[CallState]]] = {
    CallState.FORWARD: frozenset({CallState.WAITING, CallState.OVER}),
    CallState.COVERED: frozenset({CallState.OVER}),
    CallState.WAITING: frozenset({CallState.HELD}),
    CallState.HELD: frozenset({CallState.SUSPENDED, CallState.WAITING}),
    CallState.SUSPENDED: frozenset({CallState.HELD, CallState.WAITING}),
    CallState.OVER: frozenset(),
}
"""A backward that has ended leaves a call waiting: its graph may be retained."""


class Call:
    """One call of a partition's outermost module. Graphs hold it, so it does not hold the module."""

    __slots__ = ("_module", "first_node", "has_inputs", "name", "pids", "state", "versions")

    def __init__(self, module: nn.Module, pids: tuple[int, ...], versions: tuple[int, ...], state: CallState) -> None:
        self._module = weakref.ref(module)
        self.name = type(module).__name__
        self.pids = pids
        self.versions = versions
        """Of the weights that its forward used."""
        self.state = state
        self.first_node: int = torch._C._autograd._get_sequence_nr()
        """Number of the first autograd node that it may have made."""
        self.has_inputs = False
        """An input needs a gradient."""

    def become(self, new: CallState) -> None:
        """Move to another state. Raises InternalError where the present one does not allow it."""
        if new not in LEGAL[self.state]:
            raise InternalError(f"a call of {self.name} is {self.state}, and cannot become {new}. Please report it.")
        self.state = new

    def is_of(self, module: nn.Module) -> bool:
        """It is this module that is called."""
        return self._module() is module

    def made(self, node: int) -> bool:
        """Its forward may have made the autograd node of this number; older ones are of its inputs."""
        return node >= self.first_node
