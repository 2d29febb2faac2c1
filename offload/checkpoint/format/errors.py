"""The exceptions of checkpoints.

    CheckpointError                    a checkpoint cannot be saved, found or loaded as asked
    └── CorruptCheckpointError         its files are not what its manifest says

Owns: these two. A full disk is `DiskFullError`, any other failed transfer `TransferError`.
Does not: raise them.
"""

from offload.errors import OffloadError


class CheckpointError(OffloadError, ValueError):
    """A checkpoint cannot be saved, found or loaded as asked."""


class CorruptCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, short or altered; nothing of it was used."""
