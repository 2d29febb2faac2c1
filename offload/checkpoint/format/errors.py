"""The exceptions of checkpoints.

    CheckpointError                    a checkpoint cannot be saved, found or loaded as asked
    └── CorruptCheckpointError         its files are not what its manifest says

Owns: these two, and how others are quoted. A full disk is `DiskFullError`, any other failed transfer `TransferError`.
Does not: raise them.
"""

from typing import Final

from offload.errors import OffloadError

SHOWN_CHARACTERS: Final = 200
"""Of an error of Python's own, which may quote a whole file."""


class CheckpointError(OffloadError, ValueError):
    """A checkpoint cannot be saved, found or loaded as asked."""


class CorruptCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, short or altered; nothing of it was used."""


def shown(error: BaseException) -> str:
    """An error of Python's own, within ours."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"
