"""Exports become visible whole: written into a hidden folder next to where they go, then renamed, the index last.

Owns: the hidden folder and its lock, the refusal to mix two models, the order of the renames, removal of what killed
exports left.
Does not: write files (export_hf.py, export_dcp.py).
Threads: any.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from offload.checkpoint.format.errors import CheckpointError
from offload.checkpoint.format.folder import HeldLock, make_folder, sync_folder
from offload.checkpoint.format.tensor_file import failing

STAGING: Final = ".exporting-"


@contextlib.contextmanager
def staged(out: Path, *, taken: Sequence[str], last: str) -> Iterator[Path]:
    """A folder to write into, whose files move to `out` at the end, the one called `last` after all others.

    `taken`: patterns of names that must not be in `out`. After an error nothing is left of what was written.
    """
    existed = out.exists()
    make_folder(out)
    for pattern in taken:
        found = next(iter(sorted(out.glob(pattern))), None)
        if found is not None:
            raise CheckpointError(f"{found} is there already: remove it, or export to another folder.")
    for folder in out.glob(f"{STAGING}*"):
        _remove_where_dead(folder)
    folder = out / f"{STAGING}{secrets.token_hex(4)}"
    with failing(folder, "make it"):
        folder.mkdir()
        lock = HeldLock(_locked(folder))
    try:
        yield folder
        names = sorted((path.name for path in folder.iterdir()), key=lambda name: (name == last, name))
        with contextlib.ExitStack() as undo:
            for name in names:
                with failing(out / name, "rename the finished file to it"):
                    if name == last:
                        sync_folder(out)
                    undo.callback((out / name).unlink, missing_ok=True)
                    (folder / name).replace(out / name)
            sync_folder(out)
            undo.pop_all()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.give_back()
        if not existed:
            with contextlib.suppress(OSError):
                os.rmdir(out)  # noqa: PTH106 - only where it is empty: nothing was exported


def _locked(folder: Path) -> int:
    """A descriptor that holds its lock; BlockingIOError where an export holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove_where_dead(folder: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = _locked(folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)
