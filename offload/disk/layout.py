"""Where records lie in the swap files.

Owns: extents, and the choice of the file for each.
Does not: touch a disk (disk/swap_file.py makes files of `bytes_by_file`).
Threads: made and filled by one thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from offload.errors import InternalError
from offload.units import DISK_ALIGN_BYTES, round_up


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of one swap file; offset and length are multiples of 4 KiB, as direct I/O wants them."""

    file_index: int
    offset: int
    num_bytes: int

    def __post_init__(self) -> None:
        if self.file_index < 0 or self.offset < 0 or self.num_bytes < 0:
            raise InternalError(f"{self}: no field may be negative.")
        if self.offset % DISK_ALIGN_BYTES or self.num_bytes % DISK_ALIGN_BYTES:
            raise InternalError(f"{self}: offset and length must be multiples of {DISK_ALIGN_BYTES}.")


class Layout:
    """Gives out extents one after another, spread over the files in proportion to `shares` (equal where None).

    Allocate in the order of use: then consecutive records lie on different disks and are read side by side.
    """

    def __init__(self, num_files: int, shares: Sequence[float] | None = None) -> None:
        shares = tuple(shares) if shares is not None else (1.0,) * num_files
        if num_files < 1 or len(shares) != num_files or min(shares) <= 0:
            raise InternalError(f"a layout needs one file or more and a share above 0 for each, got {shares!r}.")
        self._shares = shares
        self._num_bytes = [0] * num_files

    @property
    def bytes_by_file(self) -> tuple[int, ...]:
        """Bytes that each file needs for what was allocated so far."""
        return tuple(self._num_bytes)

    def allocate(self, num_bytes: int) -> Extent:
        """The next extent, of `num_bytes` padded to 4 KiB: in the file that is least full for its share with it."""
        padded_bytes = round_up(num_bytes, DISK_ALIGN_BYTES)
        index = min(range(len(self._shares)), key=lambda i: ((self._num_bytes[i] + padded_bytes) / self._shares[i], i))
        extent = Extent(index, self._num_bytes[index], padded_bytes)
        self._num_bytes[index] += padded_bytes
        return extent
