"""Exports become visible whole: written into a hidden folder next to where they go, then renamed, the index last.

Owns: the hidden folder, the refusal to mix two models, the order of the renames.
Does not: write files (export_hf.py, export_dcp.py).
Threads: any.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from offload.checkpoint.errors import CheckpointError
from offload.checkpoint.folder import make_folder, sync_folder
from offload.checkpoint.tensor_file import failing

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
    folder = out / f"{STAGING}{secrets.token_hex(4)}"
    with failing(folder, "make it"):
        folder.mkdir()
    try:
        yield folder
        names = sorted((path.name for path in folder.iterdir()), key=lambda name: (name == last, name))
        for name in names:
            with failing(out / name, "rename the finished file to it"):
                if name == last:
                    sync_folder(out)
                (folder / name).replace(out / name)
        sync_folder(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not existed:
            with contextlib.suppress(OSError):
                os.rmdir(out)  # noqa: PTH106 - only where it is empty: nothing was exported
