"""The swap files of one run: made, preallocated, closed.

Owns: the open descriptors, and what errors call the files.
Does not: know how a file without a name is opened (disk/nameless.py) or what folders with names need
(disk/named_folder.py), say where records lie (disk/layout.py) or move bytes (disk/io_queue.py, which must be closed
first).
Threads: made and closed by one thread; descriptors may be used by any. Descriptors do not survive exec; a forked child
closes its copies at once. See Note [Fork].

Note [Nameless]: swap files have no name where the file system can do that, so that no end of the run, be it a signal, a
crash or a power cut, leaves their bytes. Elsewhere each lies in a folder with a lock, which a clean end removes.

Note [Fork]: a forked child (a data loader's worker) shares the open file descriptions. If it outlived the run, the
space of the files would not come back, and it would hold the lock of a dead run. Python's fork calls us in the child,
for good: a hook cannot be taken back, so it is set once and asks for the files that are open then.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from offload.concurrency.fork import abandon_in_children
from offload.disk import nameless
from offload.disk.end_signals import removed_on_signals
from offload.disk.named_folder import CLONE_NAME, COPY_NAME, SWAP_NAME, make_folder
from offload.disk.nameless import KINDS, Kind
from offload.disk.probe import free_bytes, takes_direct_io
from offload.errors import ConfigError, DiskError, DiskFullError, InternalError
from offload.units import format_bytes

_FULL_ERRNOS: Final = (errno.ENOSPC, errno.EDQUOT)
_logger = logging.getLogger(__name__)

Mode = Literal["direct", "buffered"]

_NAMES: Final = dict(zip(KINDS, (SWAP_NAME, CLONE_NAME, COPY_NAME), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapFile:
    """One open file. Its text says what it is and where, for messages."""

    folder: Path
    """In which it takes room."""
    rank: int
    kind: Kind = "swap file"
    descriptor: int
    num_bytes: int
    mode: Mode
    path: Path
    """Its name; of a nameless file where /proc shows it, as long as it is open."""
    is_named: bool

    def __str__(self) -> str:
        return f"{self.kind} of rank {self.rank} in {self.folder}"

    def sibling(self, kind: Kind, num_bytes: int) -> "SwapFile":
        """A new empty file of the same kind of name and mode in the same folder. Raises OSError."""
        return _open_file(self.folder, self.rank, kind, num_bytes, self.mode, is_named=self.is_named)

    def remove(self) -> None:
        """Close it, and remove its name where it has one."""
        os.close(self.descriptor)
        if self.is_named:
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:  # it goes with the folder
                _logger.warning("%s could not be removed: %s", self.path, error)


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
        """Make and preallocate one swap file in each folder; on any failure everything made is removed.

        Raises ConfigError for a folder that cannot be used and DiskFullError for too little space.
        """
        _check_arguments(folders, run_id, rank, bytes_by_file)
        folders = [folder.absolute() for folder in folders]  # they are to be removed, wherever the process is by then
        _check_free_space(folders, bytes_by_file)
        with contextlib.ExitStack() as made:
            files, locks = [], []
            for folder, num_bytes in zip(folders, bytes_by_file, strict=True):
                with _told_by_folder(folder, num_bytes):
                    file = _make_nameless(folder, rank, num_bytes, made)
                    if file is None:
                        file, lock = _make_named(folder, f"offload-{run_id}-rank{rank}", rank, num_bytes, made)
                        locks.append(lock)
                files.append(file)
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


def _remove_in_process(remove: contextlib.ExitStack, owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a forked child that ends must not take the files away from its parent
        remove.close()


# ---------------------------------------------------------------------------------------------------- checking


def _check_arguments(folders: Sequence[Path], run_id: str, rank: int, bytes_by_file: Sequence[int]) -> None:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", run_id) or rank < 0:
        raise InternalError(f"run id {run_id!r} and rank {rank} do not make a folder name.")
    if not folders or len(folders) != len(bytes_by_file) or min(bytes_by_file) < 0:
        raise InternalError(f"{len(folders)} folders for swap files, but sizes {list(bytes_by_file)}.")
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


@contextlib.contextmanager
def _told_by_folder(folder: Path, num_bytes: int) -> Iterator[None]:
    """An error of the system becomes one that says what to do about the folder."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DiskError):
            raise
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise _not_writable(folder, os.strerror(error.errno)) from error
        if error.errno in _FULL_ERRNOS:
            raise _disk_full(str(folder), num_bytes, free_bytes(folder)) from error
        raise DiskError(
            f"{folder}: the swap file of {num_bytes} bytes could not be made: {error}. Look at the disk (dmesg), or "
            "name another folder with disk=."
        ) from error


def _mode_of(folder: Path) -> Mode:
    if takes_direct_io(folder):
        return "direct"
    _logger.warning("%s does not take direct I/O; swap goes through the page cache", folder)
    return "buffered"


def _make_nameless(folder: Path, rank: int, num_bytes: int, made: contextlib.ExitStack) -> SwapFile | None:
    """A preallocated file without a name; None where the file system does not have it."""
    if not nameless.can_be_had(folder):
        return None
    file = _open_file(folder, rank, "swap file", num_bytes, _mode_of(folder), is_named=False)
    made.callback(os.close, file.descriptor)
    _allocate(file)
    return file


def _make_named(folder: Path, name: str, rank: int, num_bytes: int, made: contextlib.ExitStack) -> tuple[SwapFile, int]:
    """A folder with a lock and a preallocated file in it; also returns the lock's descriptor."""
    own = folder / name
    lock = make_folder(own, made)
    made.enter_context(removed_on_signals(own))
    file = _open_file(own, rank, "swap file", num_bytes, _mode_of(own), is_named=True)
    made.callback(os.close, file.descriptor)
    _allocate(file)
    return file, lock


def _open_file(folder: Path, rank: int, kind: Kind, num_bytes: int, mode: Mode, *, is_named: bool) -> SwapFile:
    if is_named:
        path = folder / _NAMES[kind]
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
    else:
        descriptor = nameless.open_nameless(folder)
        path = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    try:
        if not is_named:
            nameless.mark(descriptor, rank, kind)
        if mode == "direct":
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)
    except BaseException:
        os.close(descriptor)
        raise
    return SwapFile(
        folder=folder, rank=rank, kind=kind, descriptor=descriptor, num_bytes=num_bytes, mode=mode, path=path,
        is_named=is_named,
    )  # fmt: skip


def _allocate(file: SwapFile) -> None:
    if not file.num_bytes:
        return
    # Not with direct I/O: where the file system cannot preallocate, libc writes single bytes instead, which that
    # refuses.
    flags = fcntl.fcntl(file.descriptor, fcntl.F_GETFL)
    fcntl.fcntl(file.descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    os.posix_fallocate(file.descriptor, 0, file.num_bytes)  # a half-done one is undone with the file
    fcntl.fcntl(file.descriptor, fcntl.F_SETFL, flags)
