"""What a checkpoint holds and who gives and takes it: items, state tensors, runs, and the two protocols.

Owns: the words of this folder, and the contract between it and whatever holds the state of training.
Does not: know sessions, homes or files.
Threads: a source and a sink are used by one thread at a time.

An *item* is anything stored under a name: a trainable or a frozen parameter, a buffer, a tensor of the user's. Its
values lie in one or more *state tensors*, 1-D arrays with one entry per element, or one per block of elements (the
scales of 8-bit moments). A *run* is a contiguous range of entries of one state tensor of one item. Blocks are counted
from the item's first element, so that they do not depend on where a flat parameter puts it: whoever keeps such state
tensors starts every parameter, and every rank's shard of one, at a multiple of the block.

State tensors of a trainable parameter: `master` (fp32) or, split, `weights` (bf16) and `remainder` (uint16); then what
its optimizer keeps. Every other item has the one state tensor `weights`. Moments in 8 bits are a state tensor of codes
(uint8) under the moment's own name and a state tensor of scales under that name and SCALES.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol, Self

import torch
from torch import Tensor

from offload.errors import InternalError
from offload.storage import state_tensors as tensors
from offload.storage.state_tensors import SCALE as SCALES
from offload.storage.state_tensors import WEIGHTS, StateTensor

__all__ = ["MASTER", "REMAINDER", "SCALES", "WEIGHTS", "Item", "Kind", "Run", "StateTensor"]

MASTER: Final = tensors.MASTER.name
REMAINDER: Final = tensors.REMAINDER.name


class Kind(StrEnum):
    """What an item is."""

    TRAINABLE = "trainable"
    FROZEN = "frozen"
    BUFFER = "buffer"
    EXTRA = "extra"
    """A tensor from the user's dictionary or a random state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Something stored by name, as every rank knows it."""

    name: str
    """As in `model.state_dict()`, of the first module that owns it."""
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Outside the session: that of the parameter before `enable`."""
    state_tensors: tuple[StateTensor, ...]
    step: int = 0
    """Optimizer steps this parameter has taken."""
    aliases: tuple[str, ...] = ()
    """Its other names in `model.state_dict()`: tied parameters."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def state_tensor(self, name: str) -> StateTensor | None:
        """The state tensor of that name, if there is one."""
        return next((state_tensor for state_tensor in self.state_tensors if state_tensor.name == name), None)

    def expect(self, name: str) -> StateTensor:
        """The state tensor of that name, which there must be."""
        found = self.state_tensor(name)
        if found is None:
            raise InternalError(f"{self.name!r} has no state tensor {name!r}; it has {self.state_tensors}.")
        return found

    @property
    def is_split(self) -> bool:
        """Whether its master is kept as weights and remainder."""
        return self.state_tensor(REMAINDER) is not None


@dataclass(frozen=True, slots=True)
class Run:
    """Entries [start, stop) of one state tensor of one item."""

    item: str
    state_tensor: str
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Entries in the run."""
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.state_tensor}/{self.item}[{self.start}:{self.stop}]"


class StateSource(Protocol):
    """Gives the state of one rank to a checkpoint. Nothing may change it from `runs` until the last of `values`.

    The runs of all ranks cover every state tensor of every item exactly once; what all ranks have whole (buffers), one
    of them lists. Runs of one state tensor of one item are listed in rising order; all else is free, so that a source
    can go chunk by chunk and list the state tensors of a chunk side by side.
    """

    def items(self) -> Sequence[Item]:
        """All items of the model, the same on every rank, in the order of `model.state_dict()`."""

    def runs(self) -> Sequence[Run]:
        """What this rank holds."""

    def values(self) -> Iterator[Tensor]:
        """The entries of each run: contiguous, on the host, of the state tensor's dtype. Valid until the next."""


class StateSink(Protocol):
    """Takes the state of one rank from a checkpoint, in its own state tensors and in its own order."""

    def items(self) -> Sequence[Item]:
        """All items of the model with the state tensors this session keeps them in; steps are ignored."""

    def runs(self) -> Sequence[Run]:
        """What this rank wants, in the order in which it wants it: chunk by chunk costs no second read of a chunk."""

    def write(self, run: Run, values: Tensor) -> None:
        """Entries of one of the runs: contiguous, on the host, of the state tensor's dtype, valid until this returns.

        The first call comes after every byte that will be used has been verified. Weights that follow from a plain
        master are the sink's own to make.
        """

    def finish(self, steps: Mapping[str, int]) -> None:
        """All runs were written; `steps` are those of the trainable parameters. Not called where loading failed."""


class StateReader(Protocol):
    """Stored items, read by range: an open checkpoint, or an imported folder of another format."""

    @property
    def where(self) -> str:
        """The folder that is read, for errors."""

    @property
    def items(self) -> Mapping[str, Item]:
        """What is stored, by name, in the order of `model.state_dict()`."""

    def verify(self, runs: Iterable[Run]) -> None:
        """Read whatever these runs are made of once and raise where it is not what was written."""

    def read(self, run: Run, out: Tensor) -> None:
        """Entries of a stored state tensor into `out`: contiguous, on the host, of the state tensor's dtype."""


class OpenReader(StateReader, Protocol):
    """One that holds files open. A context manager."""

    def close(self) -> None:
        """Close them. Idempotent."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
