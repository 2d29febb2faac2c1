"""Folders with a lock in which swap files have names: where a file system does not have files without one.

Owns: the folders `offload-<run id>-rank<r>` and their owner locks; those of dead runs, and their removal.
Does not: make the files in them (disk/swap_file.py).
Threads: a folder is made and removed by one thread; looking for dead runs may be done by any.

Note [Owner lock]: the lock belongs to the open file description (F_OFD_SETLK), which excludes fcntl.lockf of any other
program. Plain lockf would belong to the process: two runs in one process would not exclude each other, and closing any
other descriptor of the lock file, as `leftovers` does, would silently drop it. The kernel drops it when the last copy
of the descriptor is gone, however the run ends.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from offload.disk import nameless
from offload.disk.probe import PROBE_PREFIX
from offload.errors import ConfigError

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

_logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------ making


def make_folder(own: Path, made: contextlib.ExitStack) -> int:
    """Make and lock a folder, or take over that of a dead run; returns the lock's descriptor.

    `made` learns how to undo each step. Raises ConfigError where the folder is another run's.
    """
    is_new = _make_folder(own, made)
    lock = _lock(own, made)
    if not is_new:
        _logger.warning("%s: taking over what a dead run of the same name has left", own)
        for left in (SWAP_NAME, CLONE_NAME, COPY_NAME):
            (own / left).unlink(missing_ok=True)
    descriptor = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        nameless.overwrite_in_place(descriptor)
    finally:
        os.close(descriptor)
    return lock


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
    made.callback(remove_folder, own)
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


def _remove_if_empty(own: Path) -> None:
    with contextlib.suppress(OSError):  # gone already, or another run has taken it over meanwhile
        own.rmdir()


def remove_folder(own: Path) -> None:
    """Remove what a run makes in its folder; never anything else that somebody has put there."""
    try:
        # The lock last: a folder without one would never be known for a leftover.
        ours = sorted((path for path in own.iterdir() if _is_ours(path.name)), key=lambda path: path.name == LOCK_NAME)
        for path in ours:
            path.unlink(missing_ok=True)
        own.rmdir()
    except OSError as error:
        _logger.warning("%s could not be removed: %s", own, error)


# --------------------------------------------------------------------------------------------------- dead runs


def leftovers(folder: Path) -> list[Path]:
    """Swap folders in `folder` whose run is dead: its owner lock is not held."""
    return [path for path in sorted(folder.glob("offload-*-rank*")) if _with_dead(path, lambda: True)]


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the swap folders in `folder` whose run is dead, and only these; returns the ones that are gone."""
    removed = []
    for path in leftovers(folder):
        # The lock is held meanwhile, so that no run of that name can take the folder over and lose its files.
        _with_dead(path, partial(remove_folder, path))
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
