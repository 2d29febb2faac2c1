"""A real file system of a given size, where this user may mount one.

Owns: the mount, in a namespace of its own, reached through /proc, so that nothing is left behind.
Does not: decide what is tested on it.
"""

import contextlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from offload.units import MIB

SMALLEST_BYTES = {"tmpfs": MIB, "btrfs": 128 * MIB, "xfs": 320 * MIB}
"""That mkfs of each kind makes, with some room."""


@contextlib.contextmanager
def file_system_of(num_bytes: int, at: Path, kind: str = "tmpfs") -> Iterator[Path]:
    """A file system of this size, mounted over the folder `at` in a namespace of its own. Raises PermissionError.

    Kinds other than tmpfs lie in a sparse file behind a loop device.
    """
    with tempfile.TemporaryDirectory(prefix="offload-tests-image-") as folder:
        image = shlex.quote(f"{folder}/image")
        target = shlex.quote(str(at))
        if kind == "tmpfs":
            mount = f"mount -t tmpfs -o size={num_bytes} none {target}"
        else:
            # mkfs stands in /sbin, which is not on every user's path
            mount = (
                f'PATH="$PATH:/sbin:/usr/sbin" && truncate -s {num_bytes} {image} && mkfs.{kind} -q {image} >&2 && '
                f"mount -o loop {image} {target}"
            )
        as_user = ["--user", "--map-root-user"] if os.geteuid() else []
        command = ["unshare", *as_user, "--mount", "sh", "-c", f"{mount} && echo mounted && exec cat"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as holder:
            assert holder.stdout is not None
            if holder.stdout.readline() != b"mounted\n":
                raise PermissionError(f"this user may not mount {kind}, or has no program that makes it")
            try:
                yield Path("/proc", str(holder.pid), f"root{at}")
            finally:
                holder.communicate()


@cache
def may_mount(kind: str = "tmpfs") -> bool:
    """Whether `file_system_of` works here. Where it does not, tests that need it are not collected: not a skip."""
    try:
        with (
            tempfile.TemporaryDirectory(prefix="offload-tests-mount-") as at,
            file_system_of(SMALLEST_BYTES[kind], Path(at), kind) as folder,
        ):
            return folder.is_dir()
    except OSError:
        return False
