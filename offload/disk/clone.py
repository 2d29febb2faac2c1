"""What the swap files held at one moment, without copying it: clones that share blocks until either is overwritten.

Owns: the clones' files and descriptors, reading them, what is written next to them, and the room that all of it takes.
Does not: know what lies in them (saving/snapshot.py), or wait for writes: whoever takes clones has waited for all.
Threads: taken by one thread, then read and closed by another. A forked child closes its copies of the descriptors.

Note [Reflinks]: `FICLONERANGE` makes a stretch of one file share the blocks of another: XFS, btrfs and a few more can,
in milliseconds whatever the length. From then on a write to the swap file goes to new blocks, so that a clone comes to
take as much as it is long, at worst: that much must be free when it is taken, else training would meet a full disk.
A hard link, which costs nothing at all, would not do: it is the same file, and swap files are overwritten in place.

Note [Clones on btrfs]: a block of its preallocated extents is free only once nothing of the extent is used, so for up
to one step after a clone is gone the files may go on taking twice their length. The free space that the next save finds
is what there is then.
"""

import contextlib
import errno
import fcntl
import logging
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import torch

from offload.concurrency.fork import abandon_in_children
from offload.concurrency.futures import Future
from offload.disk.checksums import Checksums
from offload.disk.io_queue import REQUEST_BYTES
from offload.disk.layout import Extent
from offload.disk.probe import free_bytes
from offload.disk.swap_file import SwapFile, SwapFiles
from offload.disk.transfer import Direction, Transfer

log = logging.getLogger(__name__)

FICLONERANGE: Final = 0x4020940D
"""Of linux/fs.h: _IOW(0x94, 13, struct file_clone_range)."""

_REFUSED: Final = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS)
"""This file system cannot, or not here: nothing is wrong."""

FREE_SHARE: Final = 0.9
"""Of the free space that clones and a checkpoint may come to take: new blocks need entries in trees, too."""

CloneRange = Callable[[int, int, int, int], None]
"""(source descriptor, target descriptor, offset, num_bytes): the target's range shares the source's blocks."""


def clone_range(source: int, target: int, offset: int, num_bytes: int) -> None:
    """Share a range of blocks, at the same offset. Raises OSError where the file system cannot."""
    fcntl.ioctl(target, FICLONERANGE, struct.pack("qQQQ", source, offset, num_bytes, offset))


class Clones:
    """Some extents of the swap files as they were, and room for more. Make them with `take`."""

    def __init__(self, files: Mapping[int, SwapFile], checksums: Checksums | None) -> None:
        self._files = dict(files)
        self._checksums = checksums
        abandon_in_children(self)

    @classmethod
    def take(
        cls,
        files: SwapFiles,
        extents: Iterable[Extent],
        *,
        extra_bytes: int = 0,
        checksums: Checksums | None = None,
        clone: CloneRange | None = None,
    ) -> "Clones | None":
        """Clones of these extents, in the folders of the swap files; None where the file system cannot make them.

        No write to the extents may be in flight. Reads can be verified by what `checksums` knows now.
        `extra_bytes`: room for what is to be written in file number `extra_index(files)`.
        """
        made: dict[int, SwapFile] = {}
        kept = list(extents)
        try:
            for index, ranges in joined(kept).items():
                made[index] = files.files[index].sibling("clone of the swap file", files.files[index].num_bytes)
                for start, stop in ranges:
                    (clone or clone_range)(files.files[index].descriptor, made[index].descriptor, start, stop - start)
            if extra_bytes:
                roomiest = max(files.files, key=lambda file: free_bytes(file.folder))
                made[extra_index(files)] = roomiest.sibling("copy next to the swap file", extra_bytes)
                os.posix_fallocate(made[extra_index(files)].descriptor, 0, extra_bytes)
        except OSError as error:
            _remove(made.values())
            if error.errno in _REFUSED:
                log.debug("%s: no clones: %s", files.files[0].folder, error)
            else:
                log.warning("%s: no clones: %s; saving without them", files.files[0].folder, error)
            return None
        except BaseException:
            _remove(made.values())
            raise
        names = {index: str(file) for index, file in made.items()}
        return cls(made, checksums.taken(kept, names) if checksums is not None else None)

    def read(self, extent: Extent, destination: torch.Tensor, name: str, *, verify: bool = False) -> None:
        """Fill `destination` (torch.uint8, page-aligned, as long as the extent), in the calling thread.

        `verify`: the extent is one of those that were taken, and must hold what was written there.
        """
        self._move("read", extent, destination, name)
        if verify and self._checksums is not None:
            self._checksums.verify(extent, destination)

    def write(self, extent: Extent, source: torch.Tensor, name: str) -> None:
        """Write next to the clones: as `read`, the other way."""
        self._move("write", extent, source, name)

    def close(self) -> None:
        """Close and remove the files. Idempotent."""
        _remove(self._files.values())
        self._files.clear()

    def abandon(self) -> None:
        """In a forked child: close its copies of the descriptors; the files stay."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                os.close(file.descriptor)
        self._files.clear()

    def _move(self, direction: Direction, extent: Extent, tensor: torch.Tensor, name: str) -> None:
        file = self._files[extent.file_index]
        call = os.preadv if direction == "read" else os.pwritev
        transfer = Transfer(direction, file, extent, tensor, Future(name))
        try:
            for request in transfer.split(REQUEST_BYTES):
                while not request.finished:
                    view, offset = request.next_call()
                    with view:  # released at once: an error must not keep the memory alive through its frames
                        try:
                            num_moved = call(file.descriptor, [view], offset)
                        except OSError as error:
                            raise request.failed(error) from error
                    request.advance(num_moved)
        finally:
            transfer.abandon()
        if file.mode == "buffered":
            os.posix_fadvise(file.descriptor, extent.offset, extent.num_bytes, os.POSIX_FADV_DONTNEED)


def extra_index(files: SwapFiles) -> int:
    """Number of the file for what is written next to the clones."""
    return len(files.files)


def joined(extents: Iterable[Extent]) -> dict[int, list[tuple[int, int]]]:
    """By file the ranges [start, stop) that the extents cover."""
    ranges: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for extent in sorted(extents, key=lambda e: (e.file_index, e.offset)):
        row = ranges[extent.file_index]
        stop = extent.offset + extent.num_bytes
        if row and row[-1][1] >= extent.offset:
            row[-1] = (row[-1][0], max(stop, row[-1][1]))
        elif extent.num_bytes:
            row.append((extent.offset, stop))
    return {index: row for index, row in ranges.items() if row}


def has_room(
    files: SwapFiles,
    extents: Iterable[Extent],
    *,
    extra_bytes: int,
    checkpoint: Path,
    checkpoint_bytes: int,
    num_sharing: int = 1,
) -> bool:
    """Whether all that is cloned can be overwritten while a checkpoint is written, and space is left.

    `num_sharing`: so many ranks of this node do the same on these disks.
    """
    if not all(file.folder.is_dir() for file in files.files):
        return False  # somebody has removed one: the swap file lives on while it is open, clones cannot be made
    needed: dict[Path, int] = defaultdict(int)  # by folder, then by file system
    for index, ranges in joined(extents).items():
        needed[files.files[index].folder] += sum(stop - start for start, stop in ranges)
    if extra_bytes:
        needed[max((file.folder for file in files.files), key=free_bytes)] += extra_bytes
    target = next(path for path in (checkpoint.absolute(), *checkpoint.absolute().parents) if path.is_dir())
    needed[target] += checkpoint_bytes
    by_space: dict[tuple[int, int], int] = defaultdict(int)
    free: dict[tuple[int, int], int] = {}
    for folder, num_bytes in needed.items():
        space = os.statvfs(folder)
        # Not by device: subvolumes of btrfs have one each, and share their space. Then they show the same counts.
        key = (space.f_blocks, space.f_bfree)
        by_space[key] += num_bytes
        free[key] = space.f_bavail * space.f_frsize
    return all(num_bytes * num_sharing <= FREE_SHARE * free[key] for key, num_bytes in by_space.items())


def _remove(files: Iterable[SwapFile]) -> None:
    for file in files:
        file.remove()
