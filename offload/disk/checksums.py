"""What every extent held when it was written.

Owns: one checksum for each extent of the swap files, and the comparison when it is read again.
Does not: move bytes (disk/io_queue.py, which asks here where it was given a table), know the arithmetic
(kernels/checksum.py).
Threads: any, at once for different extents; a write and a read of one extent are ordered by their futures anyway.
"""

from collections.abc import Iterable, Mapping
from typing import Final, Self

import numpy as np
import torch

from offload.disk.layout import Extent
from offload.disk.swap_file import SwapFiles
from offload.errors import DiskCorruptionError, InternalError
from offload.kernels.checksum import NUM_ACCUMULATORS, checksum_kernel

WORD_BYTES: Final = 8


class Checksums:
    """Checksums of the extents of one run's swap files."""

    def __init__(self, files: Mapping[int, str], sums: Mapping[Extent, int]) -> None:
        self._files = dict(files)
        self._sums = dict(sums)

    @classmethod
    def of(cls, files: SwapFiles) -> Self:
        """Of files to which nothing was written yet."""
        checksum_kernel()  # compiled now, not in the first transfer
        return cls({index: str(file) for index, file in enumerate(files.files)}, {})

    def taken(self, extents: Iterable[Extent], files: Mapping[int, str]) -> "Checksums":
        """Those of these extents as they are now, for clones of the files."""
        return Checksums(files, {extent: self._sums[extent] for extent in extents if extent in self._sums})

    def record(self, extent: Extent, buffer: torch.Tensor) -> None:
        """`buffer` (torch.uint8) is what `extent` holds from now on."""
        self.note(extent, checksum_of(buffer))

    def verify(self, extent: Extent, buffer: torch.Tensor) -> None:
        """Raise DiskCorruptionError unless `buffer`, just read, is what was recorded for `extent`."""
        self.compare(extent, checksum_of(buffer))

    def note(self, extent: Extent, checksum: int) -> None:
        """As `record`, for a checksum already taken."""
        self._sums[extent] = checksum

    def compare(self, extent: Extent, got: int) -> None:
        """As `verify`, for a checksum already taken: the error then keeps no buffer alive."""
        wanted = self._sums.get(extent)
        file = self._files[extent.file_index]
        if wanted is None:
            raise InternalError(
                f"{file}: {extent.num_bytes} bytes at offset {extent.offset} were read with checksum=True and never "
                "written as one extent; only what was written can be read."
            )
        if got != wanted:
            raise DiskCorruptionError(
                f"{file}: {extent.num_bytes} bytes at offset {extent.offset} are not those that were written: wanted "
                f"checksum {wanted:016x}, got {got:016x}. The disk, its cable or the memory flips bits, or somebody "
                "else wrote to the file (look at dmesg, smartctl, an ECC log); resume from the last checkpoint."
            )


def checksum_of(buffer: torch.Tensor) -> int:
    """Of contiguous torch.uint8 on the host whose length is a multiple of 256, as that of every extent is."""
    words = buffer.numpy()
    if words.nbytes % (NUM_ACCUMULATORS * WORD_BYTES):
        raise InternalError(f"a checksum of {words.nbytes} bytes was asked for; extents are whole pages.")
    return int(checksum_kernel()(words.view(np.uint64), np.empty(NUM_ACCUMULATORS, np.uint64)))
