"""The swap files of one run: made, locked, preallocated, removed.

Owns: the folders `offload-<run id>-rank<r>`, their owner locks and the open descriptors.
Does not: say where records lie (disk/layout.py) or move bytes (disk/io_queue.py, which must be closed first).
Threads: made and closed by one thread; descriptors may be used by any. Descriptors do not survive exec; a forked child
closes its copies at once and never removes the files. See Note [Fork].

Note [Owner lock]: the lock belongs to the open file description (F_OFD_SETLK), which excludes fcntl.lockf of any other
program. Plain lockf would belong to the process: two runs in one process would not exclude each other, and closing any
other descriptor of the lock file, as `leftovers` does, would silently drop it. The kernel drops it when the last copy
of the descriptor is gone, however the run ends.

Note [Fork]: a forked child (a data loader's worker) shares the open file descriptions. If it outlived the run it would
hold the lock of a dead run, and the space of removed files would not come back. Python's fork calls us in the child,
for good: a hook cannot be taken back, so it is set once and asks for the files that are open then.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
import struct
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from offload.concurrency.fork import abandon_in_children
from offload.disk.probe import PROBE_PREFIX, free_bytes, takes_direct_io
from offload.errors import ConfigError, DiskError, DiskFullError, InternalError
from offload.units import format_bytes

LOCK_NAME: Final = "owner.lock"
SWAP_NAME: Final = "swap.bin"
CLONE_NAME, COPY_NAME = "clone.bin", "copy.bin"
"""Of what a checkpoint is being written from (disk/clone.py)."""

_FOLDER_NAME: Final = re.compile(r"offload-[A-Za-z0-9._-]{1,100}-rank[0-9]+")
OWNER_BEGINS: Final = "pid "
_OWNER: Final = re.compile(OWNER_BEGINS + r"[0-9]+ started \S+\n")
_OWNER_BYTES: Final = 200
STARTING_S: Final = 60.0
"""Longer than a run takes to start or to end: for milliseconds there is no lock, or none that names its owner."""

_GET_FLAGS: Final = 0x80086601
_SET_FLAGS: Final = 0x40086602
_NO_COPY_ON_WRITE: Final = 0x00800000
"""FS_IOC_GETFLAGS, FS_IOC_SETFLAGS and FS_NOCOW_FL of linux/fs.h."""

_FULL_ERRNOS: Final = (errno.ENOSPC, errno.EDQUOT)
_logger = logging.getLogger(__name__)

Mode = Literal["direct", "buffered"]


@dataclass(frozen=True, slots=True)
class SwapFile:
    """One open swap file."""

    path: Path
    descriptor: int
    num_bytes: int
    mode: Mode


class SwapFiles:
    """The swap files of one rank, one in each folder. Make them with `create`."""

    def __init__(
        self, files: Sequence[SwapFile], remove: contextlib.ExitStack, lock_descriptors: Sequence[int] = ()
    ) -> None:
        self.files = tuple(files)
        self._lock_descriptors = tuple(lock_descriptors)
        # Also at interpreter exit, so that an exception nobody caught leaves no swap files behind.
        self._remove = weakref.finalize(self, _remove_in_process, remove, os.getpid())
        abandon_in_children(self)

    @classmethod
    def create(cls, folders: Sequence[Path], *, run_id: str, rank: int, bytes_by_file: Sequence[int]) -> Self:
        """Make, lock and preallocate one swap file in each folder; on any failure everything made is removed.

        Raises ConfigError for a folder that cannot be used and DiskFullError for too little space.
        """
        _check_arguments(folders, run_id, rank, bytes_by_file)
        folders = [folder.absolute() for folder in folders]  # they are to be removed, wherever the process is by then
        _check_free_space(folders, bytes_by_file)
        with contextlib.ExitStack() as made:
            files, locks = [], []
            for folder, num_bytes in zip(folders, bytes_by_file, strict=True):
                file, lock = _make_file(folder, f"offload-{run_id}-rank{rank}", num_bytes, made)
                files.append(file)
                locks.append(lock)
            return cls(files, made.pop_all(), locks)

    @property
    def mode(self) -> Mode:
        """`direct` where every file is written and read past the page cache."""
        return "direct" if all(file.mode == "direct" for file in self.files) else "buffered"

    def close(self) -> None:
        """Close and remove the files and folders; a second call does nothing. No transfer may be in flight."""
        self._remove()

    def abandon(self) -> None:
        """In a forked child: close its copies of the descriptors; the files stay. See Note [Fork]."""
        if self._remove.detach() is None:
            return
        for descriptor in (*self._lock_descriptors, *(file.descriptor for file in self.files)):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    @property
    def closed(self) -> bool:
        """Whether the files are gone."""
        return not self._remove.alive

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# --------------------------------------------------------------------------------------------------- dead runs


def leftovers(folder: Path) -> list[Path]:
    """Swap folders in `folder` whose run is dead: its owner lock is not held."""
    return [path for path in sorted(folder.glob("offload-*-rank*")) if _with_dead(path, lambda: True)]


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the swap folders in `folder` whose run is dead, and only these; returns the ones that are gone."""
    removed = []
    for path in leftovers(folder):
        # The lock is held meanwhile, so that no run of that name can take the folder over and lose its files.
        _with_dead(path, partial(_remove_folder, path))
        if not path.exists():
            removed.append(path)
    return removed


def owner_of(path: Path) -> str:
    """What the lock of a swap folder says of the run that made it: "pid 17 started 2025-01-31T12:00:00+0100"."""
    try:
        return (path / LOCK_NAME).read_text(encoding="utf-8", errors="replace")[:_OWNER_BYTES].strip()
    except OSError:
        return ""


def _with_dead(path: Path, work: Callable[[], object]) -> bool:
    """Do `work` under the lock where `path` is a swap folder of a dead run of this user; whether it was."""
    if not _is_swap_folder(path):
        return False
    try:
        descriptor = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # the lock is the first file that is made, and the last one that is removed
        with contextlib.suppress(OSError):  # just being removed
            if not any(path.iterdir()) and _is_old(path.lstat()):
                work()
                return True
        return False
    try:
        # A run that is just starting has made the file and not yet locked it; then nothing is written there.
        owner = os.pread(descriptor, _OWNER_BYTES, 0).decode(errors="replace")
        is_begun = OWNER_BEGINS.startswith(owner[: len(OWNER_BEGINS)]) and _is_old(os.fstat(descriptor))
        is_lock = is_begun or _OWNER.fullmatch(owner) is not None
        if is_dead := is_lock and _take_lock(descriptor) and os.fstat(descriptor).st_nlink > 0:
            work()
        return is_dead
    finally:
        os.close(descriptor)


def _is_old(status: os.stat_result) -> bool:
    """Whether what is half made or half removed has been so for too long: its run was killed."""
    return time.time() - status.st_mtime > STARTING_S


def _is_swap_folder(path: Path) -> bool:
    """Whether it can only be one that a run of this user has made: its name, its owner, and nothing else inside."""
    try:
        found = path.lstat()
        if not (_FOLDER_NAME.fullmatch(path.name) and stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()):
            return False
        return all(_is_ours(entry.name) and not entry.is_dir() for entry in path.iterdir())
    except OSError:
        return False  # just being removed


def _is_ours(name: str) -> bool:
    return name in (SWAP_NAME, CLONE_NAME, COPY_NAME, LOCK_NAME) or name.startswith(PROBE_PREFIX)


def _remove_in_process(remove: contextlib.ExitStack, owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a forked child that ends must not take the files away from its parent
        remove.close()


# ---------------------------------------------------------------------------------------------------- checking


def _check_arguments(folders: Sequence[Path], run_id: str, rank: int, bytes_by_file: Sequence[int]) -> None:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", run_id) or rank < 0:
        raise InternalError(f"run id {run_id!r} and rank {rank} do not make a folder name.")
    if not folders or len(folders) != len(bytes_by_file) or min(bytes_by_file) < 0:
        raise InternalError(f"{len(folders)} swap folders, but sizes {list(bytes_by_file)}.")
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(
                f"disk={str(folder)!r} is not a folder. Make it (mkdir -p {folder}) or name an existing one on a local "
                "disk."
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise _not_writable(folder, "no permission")
    if len({folder.resolve() for folder in folders}) != len(folders):
        raise ConfigError(f"disk={[str(folder) for folder in folders]} names a folder twice; name each once.")


def _not_writable(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"disk={str(folder)!r} cannot be written ({reason}). Give this user the right to write, or name another folder."
    )


def _check_free_space(folders: Sequence[Path], bytes_by_file: Sequence[int]) -> None:
    """Before anything is made: folders of one file system share its space, so their needs are added."""
    by_file_system: dict[int, list[tuple[Path, int]]] = {}
    for folder, num_bytes in zip(folders, bytes_by_file, strict=True):
        by_file_system.setdefault(folder.stat().st_dev, []).append((folder, num_bytes))
    for entries in by_file_system.values():
        needed_bytes = sum(num_bytes for _, num_bytes in entries)
        available_bytes = free_bytes(entries[0][0])
        if needed_bytes > available_bytes:
            names = ", ".join(str(folder) for folder, _ in entries)
            raise _disk_full(names, needed_bytes, available_bytes)


def _disk_full(names: str, needed_bytes: int, available_bytes: int) -> DiskFullError:
    return DiskFullError(
        f"{names}: the swap files need {needed_bytes} bytes ({format_bytes(needed_bytes)}), free are {available_bytes} "
        f"({format_bytes(available_bytes)}). Free some space, lower disk_space, raise host_memory, or name another "
        "folder with disk=; `offload doctor` lists what dead runs have left."
    )


# ------------------------------------------------------------------------------------------------------ making


def _make_file(folder: Path, name: str, num_bytes: int, made: contextlib.ExitStack) -> tuple[SwapFile, int]:
    """Make one folder with its lock and its file, and the lock's descriptor; `made` learns how to undo each step."""
    own = folder / name
    try:
        is_new = _make_folder(own, made)
        lock = _lock(own, made)
        if not is_new:
            _logger.warning("%s: taking over what a dead run of the same name has left", own)
            for left in (SWAP_NAME, CLONE_NAME, COPY_NAME):
                (own / left).unlink(missing_ok=True)
        _overwrite_in_place(own)
        mode: Mode = "direct" if takes_direct_io(own) else "buffered"
        if mode == "buffered":
            _logger.warning("%s does not take direct I/O; swap goes through the page cache", folder)
        return _preallocated(own / SWAP_NAME, num_bytes, mode, made), lock
    except OSError as error:
        if isinstance(error, DiskError):
            raise
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise _not_writable(folder, os.strerror(error.errno)) from error
        if error.errno in _FULL_ERRNOS:
            raise _disk_full(str(folder), num_bytes, free_bytes(folder)) from error
        raise DiskError(
            f"{own}: the swap file of {num_bytes} bytes could not be made: {error}. Look at the disk (dmesg), or name "
            "another folder with disk=."
        ) from error


def _make_folder(own: Path, made: contextlib.ExitStack) -> bool:
    """Whether the folder was made just now; else it must be ours, and its lock decides."""
    try:
        own.mkdir(mode=0o700)
    except FileExistsError:
        found = own.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise ConfigError(f"{own} exists and is not a swap folder of this user; remove it.") from None
        return False
    made.callback(_remove_if_empty, own)
    return True


def _overwrite_in_place(own: Path) -> None:
    """On btrfs: without checksums and copies of its own at each write, which also end direct I/O (since Linux 6.15).

    Files made in the folder inherit it. Other file systems overwrite in place anyway and refuse the question.
    """
    descriptor = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            flags = struct.unpack("i", fcntl.ioctl(descriptor, _GET_FLAGS, bytes(4)))[0]
            fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("i", flags | _NO_COPY_ON_WRITE))
    finally:
        os.close(descriptor)


def _lock(own: Path, made: contextlib.ExitStack) -> int:
    path = own / LOCK_NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if not _take_lock(descriptor) or os.fstat(descriptor).st_nlink == 0:  # held, or removed by its owner meanwhile
        owner = os.pread(descriptor, _OWNER_BYTES, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise ConfigError(
            f"{own} is in use by another run ({owner or 'just starting'}). Give each run a run id or a disk= folder of "
            "its own, or wait for that one to end."
        )
    # In this order when undone: contents, lock file, folder, and only then the lock itself.
    made.callback(os.close, descriptor)
    made.callback(_remove_folder, own)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{OWNER_BEGINS}{os.getpid()} started {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n".encode(), 0)
    return descriptor


def _take_lock(descriptor: int) -> bool:
    """Lock the whole file for this open file description; False where another holds it. See Note [Owner lock]."""
    whole_file = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of 64-bit Linux
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, whole_file)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _preallocated(path: Path, num_bytes: int, mode: Mode, made: contextlib.ExitStack) -> SwapFile:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags | (os.O_DIRECT if mode == "direct" else 0), 0o600)
    made.callback(os.close, descriptor)
    if num_bytes:
        _allocate(path, num_bytes)
    return SwapFile(path, descriptor, num_bytes, mode)


def _allocate(path: Path, num_bytes: int) -> None:
    # Not through a descriptor of direct I/O: where the file system cannot preallocate, libc writes single bytes
    # instead, which such a descriptor refuses.
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)  # a half-done one is undone with the file
    finally:
        os.close(descriptor)


def _remove_if_empty(own: Path) -> None:
    with contextlib.suppress(OSError):  # gone already, or another run has taken it over meanwhile
        own.rmdir()


def _remove_folder(own: Path) -> None:
    """Remove what a run makes in its folder; never anything else that somebody has put there."""
    try:
        # The lock last: a folder without one would never be known for a leftover.
        ours = sorted((path for path in own.iterdir() if _is_ours(path.name)), key=lambda path: path.name == LOCK_NAME)
        for path in ours:
            path.unlink(missing_ok=True)
        own.rmdir()
    except OSError as error:
        _logger.warning("%s could not be removed: %s", own, error)
