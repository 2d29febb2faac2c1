"""A real file system of a given size, where this user may mount one.

Owns: the mount, in a namespace of its own, reached through /proc, so that nothing is left behind.
Does not: decide what is tested on it.
"""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from offload.units import MIB


@contextlib.contextmanager
def file_system_of(num_bytes: int, at: Path) -> Iterator[Path]:
    """A file system of this size, mounted over the folder `at` in a namespace of its own. Raises PermissionError."""
    as_user = ["--user", "--map-root-user"] if os.geteuid() else []
    mount = f"mount -t tmpfs -o size={num_bytes} none '{at}' && echo mounted && exec cat"
    command = ["unshare", *as_user, "--mount", "sh", "-c", mount]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as holder:
        assert holder.stdout is not None
        if holder.stdout.readline() != b"mounted\n":
            raise PermissionError("this user may not mount")
        try:
            yield Path(f"/proc/{holder.pid}/root{at}")
        finally:
            holder.communicate()


@cache
def may_mount() -> bool:
    """Whether `file_system_of` works here. Where it does not, tests that need it are not collected: not a skip."""
    try:
        with file_system_of(MIB, Path(tempfile.gettempdir())) as folder:
            return folder.is_dir()
    except OSError:
        return False
