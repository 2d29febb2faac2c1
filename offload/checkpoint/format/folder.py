"""The folder of a run's checkpoints: names, lock, what is complete, what is the latest, what may go.

    <root>/latest               the name of the newest complete checkpoint, as text
    <root>/step-00001200/       complete: manifest.json and the files it names
    <root>/.saving-…/           being written; or left by a killed process, removed by the next save
    <root>/.removing-…/         being removed
    <root>/.lock                held while one process saves here

Owns: these names, and the order of syncs and renames that makes `latest` always name something complete.
Does not: know what is in a checkpoint (writer.py, manifest.py).
Threads: one save at a time; the lock excludes other processes and other threads.

Note [Durable]: the files are synced, then the folder that lists them, then it is renamed and its parent is synced;
only then `latest` is replaced, by a rename too. So at every instant `latest` names a folder whose files are whole.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from offload.checkpoint.format.errors import CheckpointError, CorruptCheckpointError
from offload.checkpoint.format.tensor_file import FileIn, failing
from offload.concurrency.fork import abandon_in_children
from offload.errors import ConfigError, OffloadError, TransferError

MANIFEST: Final = "manifest.json"
LATEST: Final = "latest"
LOCK: Final = ".lock"
SAVING: Final = ".saving-"
REMOVING: Final = ".removing-"
LATEST_NEXT: Final = ".latest-"

NAME: Final = re.compile(r"step-(\d{8,})(?:-(\d+))?")
"""A complete checkpoint: the step, and a number where one of this step was there already."""

MOST_NAMED: Final = 5
"""Of other checkpoints in an error."""

TEXT_LIMIT_BYTES: Final = 256

LOCK_WAIT_S: Final = 0.5
"""`offload doctor` holds the lock for a moment, to see whether somebody saves; that must not fail a save."""


def find(path: Path) -> Path:
    """The folder of one checkpoint: `path` itself, or what `latest` in it names."""
    if os.path.lexists(path / MANIFEST):
        return path
    latest = path / LATEST
    if not os.path.lexists(latest):
        newest = complete(path)
        if not newest:
            raise CheckpointError(
                f"{path} holds no checkpoint: neither {MANIFEST} nor {LATEST} nor a complete folder step-… is there."
            )
        return newest[-1]  # killed between the first rename and the first `latest`
    with FileIn(latest) as file:
        name = file.content(TEXT_LIMIT_BYTES).decode("ascii", errors="replace").strip()
    if NAME.fullmatch(name) is None:
        raise CorruptCheckpointError(f"{latest} names {name[:80]!r}, which is no checkpoint.")
    if not _is_complete(path / name):
        raise CorruptCheckpointError(f"{latest} names {name}, which is not there or incomplete.")
    return path / name


def complete(root: Path) -> list[Path]:
    """Complete checkpoints, the oldest first."""
    if not root.is_dir():
        return []
    aged = [
        ((path / MANIFEST).stat().st_mtime_ns, int(name[1]), int(name[2] or 0), path)
        for path in root.iterdir()
        if (name := NAME.fullmatch(path.name)) is not None and _is_complete(path)
    ]
    return [path for *_, path in sorted(aged)]


def _is_complete(folder: Path) -> bool:
    """Whether it is a folder with a manifest, here and not elsewhere: links lead outside."""
    manifest = folder / MANIFEST
    return manifest.is_file() and not manifest.is_symlink() and not folder.is_symlink()


@contextlib.contextmanager
def with_remedy(path: Path) -> Iterator[None]:
    """What to do about it is added to the error of damage at `path`: a checkpoint, or the folder of a run."""
    try:
        yield
    except CorruptCheckpointError as error:
        error.args = (f"{str(error).rstrip('.')}; {_remedy(path)}.",)
        raise


def _remedy(path: Path) -> str:
    others = complete(path) or [other for other in complete(path.parent) if other.name != path.name]
    if not others:
        return "no other checkpoint is there: restore it from a copy, or begin anew"
    names = ", ".join(other.name for other in others[-MOST_NAMED:])
    return f'give one of these instead: {names}; or on_corrupt="previous", which takes the newest that is whole'


def before(path: Path) -> list[Path]:
    """Complete checkpoints older than the one at `path`, or than the latest of the run at `path`; the newest first."""
    try:
        found = find(path)
    except CheckpointError:  # `latest` names none
        return complete(path)[::-1]
    siblings = complete(found.parent)
    return siblings[: siblings.index(found)][::-1] if found in siblings else []


def holds_any(root: Path) -> bool:
    """Whether checkpoints have been saved there, whole or not."""
    return (root / LATEST).exists() or (root.is_dir() and any(NAME.fullmatch(path.name) for path in root.iterdir()))


def check_folder(root: Path, *, name: str) -> None:
    """Raise ConfigError where nothing could be saved at `root`, given as argument `name`: told before there is a need.

    Leaves nothing behind.
    """
    place = next(place for place in (root, *root.absolute().parents) if place.exists())
    if not place.is_dir():
        raise ConfigError(f"{name} {root} cannot be a folder: {place} is a file; name another folder.")
    try:
        Path(tempfile.mkdtemp(prefix=SAVING, dir=place)).rmdir()  # rights alone do not tell: /sys, for one
    except OSError as error:
        raise ConfigError(
            f"{name} {root} cannot be written ({error.strerror}); give this user the right to write to {place}, or "
            "name another folder."
        ) from error


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the lock of `root`, made where it is missing; CheckpointError where another save holds it."""
    make_folder(root)
    with failing(root / LOCK, "open it"):
        descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    lock = HeldLock(descriptor)
    try:
        try:
            _take(descriptor)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise TransferError(f"{root / LOCK} cannot be locked: {error.strerror}.") from error
            raise CheckpointError(f"another save to {root} is running; wait for it or save elsewhere.") from error
        yield
    finally:
        lock.give_back()


def _take(descriptor: int) -> None:
    until_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until_s:
                raise
        time.sleep(LOCK_WAIT_S / 100)


class HeldLock:
    """An open lock file. A child forked meanwhile (a data loader's worker) shares the lock, and must not keep it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        abandon_in_children(self)

    def give_back(self) -> None:
        """Unlock, also for whoever shares it: closing alone would not."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self.abandon()

    def abandon(self) -> None:
        """Close it: in a child, so that it holds no lock of a parent that is killed."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def begin(root: Path, step: int) -> Path:
    """An empty folder to write a checkpoint into; removes what killed saves left. Under the lock."""
    clean(root)
    folder = root / f"{SAVING}step-{step:08d}-{secrets.token_hex(4)}"
    with failing(folder, "make it"):
        folder.mkdir()
    return folder


def clean(root: Path) -> None:
    """Remove what killed saves and removals left. Under the lock: nobody is writing them."""
    _remove_all(_left(root))


def _remove_all(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def leftovers(root: Path, *, remove: bool = False) -> list[Path]:
    """What killed saves left in a folder of checkpoints and, with `remove`, what could not be removed; while a save
    runs there, nothing."""
    if not (root / LOCK).is_file():
        return []
    try:
        with locked(root):
            found = _left(root)
    except OffloadError:
        return []
    if remove:  # without the lock, for which a save that begins now waits but for a moment: their names come only once
        _remove_all(found)
    return [path for path in found if os.path.lexists(path)]


def _left(root: Path) -> list[Path]:
    def is_left(path: Path) -> bool:
        if path.name.startswith((SAVING, REMOVING)):
            return path.is_dir() and not path.is_symlink()
        return path.name.startswith(LATEST_NEXT)

    return sorted(filter(is_left, root.iterdir()))


def publish(root: Path, saving: Path, step: int) -> Path:
    """Make a written folder a complete checkpoint and the latest one. Under the lock."""
    sync_folder(saving)
    number, final = 1, root / f"step-{step:08d}"
    while os.path.lexists(final):
        number += 1
        final = root / f"step-{step:08d}-{number}"
    following = root / f"{LATEST_NEXT}{secrets.token_hex(4)}"  # there until `latest` is replaced by it
    try:
        write_synced(following, f"{final.name}\n".encode())  # before the rename: it may find the disk full
        with failing(final, "rename the finished checkpoint to it"):
            saving.rename(final)
        sync_folder(root)
        with failing(root / LATEST, "replace it"):
            following.replace(root / LATEST)
    except BaseException:
        # Ctrl-C is heard after a call to the system: what `latest` names by then must stay.
        if os.path.lexists(following):
            with contextlib.suppress(OSError):
                final.rename(saving)  # complete, but never the latest: it would only take room
            with contextlib.suppress(OSError):
                following.unlink()
        raise
    sync_folder(root)
    return final


def retain(root: Path, keep: int) -> list[str]:
    """Remove the oldest complete checkpoints but for `keep` of them and the latest; returns their names."""
    latest = find(root)
    going = [path for path in complete(root)[:-keep] if path != latest]
    for path in going:
        remove(path)
    return [path.name for path in going]


def remove(path: Path) -> None:
    """Remove a folder of the root. Renamed first: killed midway, nothing half is taken for complete."""
    condemned = path.with_name(f"{REMOVING}{path.name}-{secrets.token_hex(4)}")
    with failing(path, "remove it"):
        path.rename(condemned)
        shutil.rmtree(condemned)


def write_synced(path: Path, content: bytes) -> None:
    """A small file, on the disk."""
    with failing(path, "write it"):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            done = 0
            while done < len(content):
                done += os.write(descriptor, content[done:])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(path: Path) -> None:
    """A folder where there is none, with those above it, on the disk."""
    with failing(path, "make it"):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """The names in a folder, on the disk."""
    with failing(path, "sync it"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
