"""The hardware record: what a folder's disk was measured to do, so that sessions use its best setting.

Owns: the file of each record under the user's cache folder, and which host and mount it belongs to.
Does not: measure (`offload bench disk` does), or decide what a session does without one.
Threads: any; of two that save at once the last one stays, whole.
"""

import dataclasses
import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from offload.errors import InternalError
from offload.units import DISK_ALIGN_BYTES

FORMAT: Final = 1
"""Of the file; another one is no record."""

MOUNTS: Final = Path("/proc/self/mountinfo")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRecord:
    """The best setting of one disk and what it gave, in bytes a second."""

    read_request_bytes: int
    write_request_bytes: int
    depth: int
    """Requests in flight at once."""
    read_rate: float
    write_rate: float
    mixed_rate: float
    """Reads and writes 1:1, their sum."""
    measured_at: float
    """Seconds since 1970."""

    def __post_init__(self) -> None:
        sizes = (self.read_request_bytes, self.write_request_bytes)
        rates = (self.read_rate, self.write_rate, self.mixed_rate)
        whole = all(isinstance(value, int) and value > 0 for value in (*sizes, self.depth))
        if not whole or any(size % DISK_ALIGN_BYTES for size in sizes) or not all(0 < rate < 1e15 for rate in rates):
            raise InternalError(f"{self} is no record: sizes, depth and rates must be above 0, sizes whole pages.")

    def describe(self) -> str:
        """For people, in one line."""
        rates = f"read {self.read_rate / 1e9:.2f}, write {self.write_rate / 1e9:.2f}, mixed {self.mixed_rate / 1e9:.2f}"
        return f"{rates} GB/s, measured {time.strftime('%Y-%m-%d %H:%M', time.localtime(self.measured_at))}"


def load_record(folder: Path) -> DiskRecord | None:
    """The record of the disk that `folder` lies on; None where there is none, or none that can be read (logged)."""
    path = record_path(folder)
    try:
        fields: dict[str, Any] = json.loads(path.read_bytes())
        return _record_of(fields, folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError, InternalError) as error:
        _logger.warning(
            "%s cannot be used (%s: %s); going on without it. `offload bench disk --disk %s` makes it anew",
            path, type(error).__name__, error, folder,
        )  # fmt: skip
        return None


def save_record(folder: Path, record: DiskRecord) -> Path:
    """Keep `record` for the disk that `folder` lies on, in place of any before; returns the file. Raises OSError."""
    path = record_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {"format": FORMAT, "belongs_to": _belongs_to(folder), "record": dataclasses.asdict(record)}
    # Written under another name and renamed: a reader, or a crash, never sees half of it.
    descriptor, name = tempfile.mkstemp(prefix=".record-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(fields, file, indent=2)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def record_path(folder: Path) -> Path:
    """Where the record of `folder`'s disk lies, whether there is one or not."""
    digest = hashlib.sha256(json.dumps(_belongs_to(folder)).encode()).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # As the XDG specification has it, a relative path there is ignored.
    base = Path(cache) if cache.startswith("/") else Path.home() / ".cache"
    return base / "offload" / f"disk-{digest[:16]}.json"


def mount_of(folder: Path, mounts: Path = MOUNTS) -> tuple[str, str]:
    """(mount point, what is mounted there) of the file system that `folder` lies on."""
    resolved = folder.resolve()
    found = ("/", "unknown")
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # no /proc
        return found
    for line in lines:
        before, _, after = line.partition(" - ")
        words, kind = before.split(), after.split()
        if len(words) < 5 or len(kind) < 2:
            continue
        point = words[4].encode("utf-8", "surrogateescape").decode("unicode_escape")  # a space is \040
        # Of two mounts on one point the later one hides the other; of nested ones the innermost counts.
        if resolved.is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, f"{kind[0]} {kind[1]}")
    return found


def _record_of(fields: dict[str, Any], folder: Path) -> DiskRecord:
    if fields["format"] != FORMAT or fields["belongs_to"] != _belongs_to(folder):
        raise ValueError("it is of another version, host or mount")
    return DiskRecord(**fields["record"])


def _belongs_to(folder: Path) -> list[str]:
    return [platform.node(), *mount_of(folder)]
