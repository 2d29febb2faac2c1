"""What the machine has free: memory, disk, cores.

Owns: reading /proc, cgroups and file systems.
Does not: decide (placement/plan.py).
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import psutil

from offload.units import GIB

HOST_MARGIN_SHARE: Final = 0.1
HOST_MARGIN_BYTES: Final = 2 * GIB
"""Left to the model's own activations on the host, the page cache and other programs: the larger of the two."""

DISK_SHARE: Final = 0.95
"""A file system filled to the brim slows down and breaks others."""

CGROUP_ROOT: Final = Path("/sys/fs/cgroup")


def free_host_bytes(cgroup_root: Path = CGROUP_ROOT, own_cgroup: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of host memory available to this process: the machine's, or what its cgroups still allow."""
    return min([int(psutil.virtual_memory().available), *_cgroup_free_bytes(cgroup_root, own_cgroup)])


def default_host_budget() -> int:
    """What is free, less a margin."""
    free_bytes = free_host_bytes()
    return max(free_bytes - max(int(free_bytes * HOST_MARGIN_SHARE), HOST_MARGIN_BYTES), free_bytes // 2)


def default_disk_budget(folders: Sequence[Path]) -> int:
    """A share of what is free on the folders' file systems, each counted once."""
    free_by_device = {}
    for folder in folders:
        if folder.is_dir():
            free_by_device[folder.stat().st_dev] = shutil.disk_usage(folder).free
    return int(sum(free_by_device.values()) * DISK_SHARE)


def training_threads() -> int:
    """Kernel threads while training: the cores this process may use, less one for the thread that launches."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def _cgroup_free_bytes(root: Path, own: Path) -> list[int]:
    """Limit less usage of this process's cgroup and all above it; version 2 and version 1."""
    free = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        base, names = (
            (root, ("memory.max", "memory.current"))
            if controllers == ""
            else (root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"))
        )
        folder = base / path.strip("/")
        for level in (folder, *folder.parents):
            limit, used = _number(level / names[0]), _number(level / names[1])
            if limit is not None and used is not None:
                free.append(max(limit - used, 0))
            if level == base:
                break
    return free


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None
