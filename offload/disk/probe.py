"""What a folder can do: free space, direct I/O.

Owns: questions to the file system that change nothing.
Does not: make swap files (disk/swap_file.py).
Threads: any.
"""

import errno
import fcntl
import mmap
import os
import tempfile
from pathlib import Path
from typing import Final

from offload.disk import nameless
from offload.units import DISK_ALIGN_BYTES

PROBE_PREFIX: Final = ".offload-probe-"
"""Of the small file that is tried and removed; a process killed meanwhile leaves it."""


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write to the file system of `folder`."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def takes_direct_io(folder: Path) -> bool:
    """Whether a file in `folder` can be written and read past the page cache.

    Tried, not asked: some file systems accept the flag when opening and refuse the first transfer.
    """
    if nameless.can_be_had(folder):
        descriptor = nameless.open_nameless(folder)
        try:
            return _writes_and_reads_directly(descriptor)
        finally:
            os.close(descriptor)
    descriptor, name = tempfile.mkstemp(prefix=PROBE_PREFIX, dir=folder)
    try:
        return _writes_and_reads_directly(descriptor)
    finally:
        os.close(descriptor)
        Path(name).unlink()


def _writes_and_reads_directly(descriptor: int) -> bool:
    pattern = bytes(range(256)) * (DISK_ALIGN_BYTES // 256)
    with mmap.mmap(-1, DISK_ALIGN_BYTES) as page:  # page-aligned, as direct I/O wants it
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)
            page[:] = pattern
            if os.pwritev(descriptor, [page], 0) != DISK_ALIGN_BYTES:
                return False
            page[:] = bytes(DISK_ALIGN_BYTES)
            return os.preadv(descriptor, [page], 0) == DISK_ALIGN_BYTES and page[:] == pattern
        except OSError as error:
            return _unless_refused(error)


def _unless_refused(error: OSError) -> bool:
    """False where the file system does not know direct I/O; a full or broken disk is another matter."""
    if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise error
