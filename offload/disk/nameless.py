"""Files without a name: their bytes are gone with their last descriptor, however the process ends.

Owns: opening one, the mark by which it is known for ours, and the list of processes that have marked files open.
Does not: preallocate or fill them (disk/swap_file.py, disk/clone.py).
Threads: any.

Note [Mark]: /proc shows that a process has a deleted file open, not whose it is. So each of ours carries a lock of its
open file description on bytes far behind any end: it takes no room, excludes nobody, goes with the descriptor, and
/proc/<pid>/fdinfo shows it. Where it begins says that the file is ours and of what kind; how long it is says the rank.
"""

import contextlib
import errno
import fcntl
import os
import re
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

MARK: Final = int.from_bytes(b"\x01offload", "big")
"""Where the lock of a marked file of the first kind begins."""
_LOCK_LINE: Final = re.compile(r"lock:\s.*\sOFDLCK\s.*\s([0-9]+)\s([0-9]+)\s*$", re.MULTILINE)

Kind = Literal["swap file", "clone of the swap file", "copy next to the swap file"]
KINDS: Final[tuple[Kind, ...]] = ("swap file", "clone of the swap file", "copy next to the swap file")

_REFUSED: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOSYS, errno.EINVAL)
"""This file system, or this kernel, has no files without a name."""

UNLINKED_PREFIX: Final = ".offload-unlinked-"
"""Of the name that a file has for an instant, where it cannot be opened without one."""

_GET_FLAGS: Final = 0x80086601
_SET_FLAGS: Final = 0x40086602
_NO_COPY_ON_WRITE: Final = 0x00800000
"""FS_IOC_GETFLAGS, FS_IOC_SETFLAGS and FS_NOCOW_FL of linux/fs.h."""

DELETED: Final = " (deleted)"
"""What /proc writes behind the name of a file that has none any more."""


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A marked file that a process has open."""

    pid: int
    descriptor: int
    command: str
    kind: Kind
    rank: int
    folder: str
    num_bytes: int
    """That it takes on the disk."""


def can_be_had(folder: Path) -> bool:
    """Whether the file system of `folder` has files without a name. Raises OSError where nothing can be made there."""
    descriptor = _opened(folder)
    if descriptor is None:
        return False
    os.close(descriptor)
    return True


def open_nameless(folder: Path) -> int:
    """A descriptor of a new empty file in `folder` that has no name. Raises OSError where it cannot be had."""
    descriptor = _opened(folder)
    if descriptor is None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), str(folder))
    overwrite_in_place(descriptor)
    return descriptor


def _opened(folder: Path) -> int | None:
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(folder, flags | os.O_TMPFILE | os.O_EXCL, 0o600)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
    return _unlinked(folder, flags)


def _unlinked(folder: Path, flags: int) -> int | None:
    """Opened and its name removed at once; None where the file system keeps a name for it, as NFS does."""
    path = folder / f"{UNLINKED_PREFIX}{uuid.uuid4().hex}"
    descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with contextlib.suppress(OSError):  # it does not remove an open file, or write to one that was removed
        path.unlink()
        os.pwrite(descriptor, b"\0", 0)
        os.ftruncate(descriptor, 0)
        if os.fstat(descriptor).st_nlink == 0:
            return descriptor
    os.close(descriptor)
    path.unlink(missing_ok=True)
    return None


def overwrite_in_place(descriptor: int) -> None:
    """On btrfs: without checksums and copies of its own at each write, which also end direct I/O (since Linux 6.15).

    Files made in a folder inherit it. Other file systems overwrite in place anyway and refuse the question.
    """
    with contextlib.suppress(OSError):
        flags = struct.unpack("i", fcntl.ioctl(descriptor, _GET_FLAGS, bytes(4)))[0]
        fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("i", flags | _NO_COPY_ON_WRITE))


def mark(descriptor: int, rank: int, kind: Kind) -> None:
    """Make the file known for one of ours. See Note [Mark]."""
    lock = struct.pack(
        "hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, MARK + KINDS.index(kind), rank + 1, 0
    )  # struct flock of 64-bit Linux
    with contextlib.suppress(OSError):  # a file system without locks: it is not listed, and goes all the same
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)


# ------------------------------------------------------------------------------------------------ who has them open


def open_files(processes: Path = Path("/proc")) -> list[OpenFile]:
    """The marked files that processes have open now, of those processes that this user may look at."""
    found = []
    for process in processes.iterdir():
        if process.name.isdecimal():
            with contextlib.suppress(OSError):  # it has just ended, or is another user's
                found += list(_of_process(process))
    return sorted(found, key=lambda file: (file.pid, file.descriptor))


def _of_process(process: Path) -> Iterator[OpenFile]:
    for link in (process / "fd").iterdir():
        try:
            target = str(link.readlink())
            if not target.endswith(DELETED):
                continue
            for start, stop in _LOCK_LINE.findall((process / "fdinfo" / link.name).read_text()):
                if 0 <= (number := int(start) - MARK) < len(KINDS):
                    yield OpenFile(
                        pid=int(process.name), descriptor=int(link.name), command=_command(process),
                        kind=KINDS[number], rank=int(stop) - int(start),
                        folder=str(Path(target.removesuffix(DELETED)).parent), num_bytes=link.stat().st_blocks * 512,
                    )  # fmt: skip
        except OSError:  # closed meanwhile
            continue


def _command(process: Path) -> str:
    words = (process / "cmdline").read_bytes().split(b"\0")
    return " ".join(word.decode(errors="replace") for word in words if word)
