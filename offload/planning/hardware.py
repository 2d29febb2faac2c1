"""What the machine has free: memory, disk, cores.

Owns: reading /proc, cgroups and file systems.
Does not: decide (planner.py).
Threads: may be called from any thread; keeps nothing.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import psutil

from offload.kernels.workers import cpus_near
from offload.units import GIB

HOST_MARGIN_SHARE: Final = 0.1
HOST_MARGIN_BYTES: Final = 2 * GIB
"""Left to the model's own activations on the host, the page cache and other programs: the larger of the two, but
never more than half of what is free."""

DISK_SHARE: Final = 0.95
"""A file system filled to the brim slows down and breaks others."""

CGROUP_ROOT: Final = Path("/sys/fs/cgroup")
OWN_CGROUP: Final = Path("/proc/self/cgroup")

_V2_MEMORY: Final = ("memory.max", "memory.current", "inactive_file")
_V1_MEMORY: Final = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_host_bytes(cgroup_root: Path = CGROUP_ROOT, own_cgroup: Path = OWN_CGROUP) -> int:
    """Bytes of host memory available to this process: the machine's, or what its cgroups still allow."""
    return min([int(psutil.virtual_memory().available), *_cgroup_free_bytes(cgroup_root, own_cgroup)])


def default_host_budget() -> int:
    """What is free, less a margin."""
    free_bytes = free_host_bytes()
    return max(free_bytes - max(int(free_bytes * HOST_MARGIN_SHARE), HOST_MARGIN_BYTES), free_bytes // 2)


def free_disk_bytes(folders: Sequence[Path]) -> int:
    """What is free on the folders' file systems, each counted once. A folder not yet made lies on its parent's."""
    free_by_device = {}
    for folder in folders:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        free_by_device[existing.stat().st_dev] = shutil.disk_usage(existing).free
    return sum(free_by_device.values())


def default_disk_budget(folders: Sequence[Path]) -> int:
    """A share of what is free on the folders' file systems, each counted once."""
    return int(free_disk_bytes(folders) * DISK_SHARE)


def cpus_of(numa_node: int) -> frozenset[int] | None:
    """The CPUs that kernels should run on for memory of this node; None leaves that to the system."""
    return cpus_near(numa_node, os.sched_getaffinity(0)) if numa_node >= 0 else None


def training_threads(cgroup_root: Path = CGROUP_ROOT, own_cgroup: Path = OWN_CGROUP) -> int:
    """Kernel threads while training: the cores this process may use, less one for the thread that launches.

    A quota counts as cores: more threads than that are stopped by the kernel for most of each period.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([float(cores), *_cgroup_cores(cgroup_root, own_cgroup)])) - 1)


def _cgroup_free_bytes(root: Path, own: Path) -> list[int]:
    """Limit less usage of this process's cgroup and all above it; version 2 and version 1.

    File pages not used lately count as usage but are reclaimed under pressure: without that correction a process
    that has just read its data set would seem to have no memory left.
    """
    free = []
    for version, level in _levels(root, own, "memory"):
        limit_name, used_name, reclaimable_name = _V2_MEMORY if version == 2 else _V1_MEMORY
        limit, used = _number(level / limit_name), _number(level / used_name)
        if limit is not None and used is not None:
            reclaimable = _field(level / "memory.stat", reclaimable_name)
            free.append(max(limit - max(used - reclaimable, 0), 0))
    return free


def _cgroup_cores(root: Path, own: Path) -> list[float]:
    """CPU quota over period of this process's cgroup and all above it."""
    cores = []
    for version, level in _levels(root, own, "cpu"):
        if version == 2:
            quota, period = (*_words(level / "cpu.max"), "", "")[:2]
        else:
            quota, period = ((_words(level / name) or [""])[0] for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        if quota.isdigit() and period.isdigit() and int(quota) and int(period):  # not "max", not -1
            cores.append(int(quota) / int(period))
    return cores


def _levels(root: Path, own: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """(version, folder) of this process's cgroup and all above it.

    In a container the path may be that of the host and not exist here; the root of what is mounted always counts.
    """
    for line in _lines(own):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, base = 2, root
        elif controller in controllers.split(","):
            version, base = 1, root / controller
        else:
            continue
        folder = base / path.strip("/")
        for level in (folder, *folder.parents):
            yield version, level
            if level == base:
                break


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # another system, or a controller that is not enabled here
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _number(path: Path) -> int | None:
    words = _words(path)
    return int(words[0]) if words and words[0].isdigit() else None


def _field(path: Path, name: str) -> int:
    """The number behind `name` in a file of "name number" lines, or 0."""
    for line in _lines(path):
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return 0
