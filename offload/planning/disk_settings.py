"""How a session uses its disks: sizes and number of requests, and each disk's share of the chunks.

Owns: what follows from the hardware records of the folders, and the safe defaults where there are none.
Does not: measure (`offload bench disk`) or move bytes (disk/io_queue.py).
Threads: the training thread.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from offload.disk.io_queue import DEFAULTS, QueueOptions
from offload.planning.record import DiskRecord, load_record

log = logging.getLogger("offload")

MAX_DEPTH: Final = 32
"""Requests in flight over all disks: each takes a thread."""


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """Of one session."""

    shares: tuple[float, ...] = ()
    """By folder; empty: equal ones."""
    queue: QueueOptions = DEFAULTS
    checksum: bool = False
    in_flight_bytes: int = 0
    """What must be under way for the measured rates; 0 where nobody measured."""


def settings_for(folders: Sequence[Path], *, checksum: bool) -> DiskSettings:
    """From the hardware records of these folders; says so where one has none."""
    records = [load_record(folder) for folder in folders]
    for folder, record in zip(folders, records, strict=True):
        if record is None:
            log.info(
                "%s: no hardware record, so reads and writes go with safe defaults; `offload bench disk --disk %s` "
                "measures the disk and keeps its best setting", folder, folder,
            )  # fmt: skip
    return from_records(records, checksum=checksum)


def from_records(records: Sequence[DiskRecord | None], *, checksum: bool) -> DiskSettings:
    """Shares by the rate of mixed traffic. One disk without a record leaves all at the defaults."""
    known = [record for record in records if record is not None]
    if not known or len(known) < len(records):
        return DiskSettings(checksum=checksum)
    queue = QueueOptions(
        depth=min(MAX_DEPTH, sum(record.depth for record in known)),
        request_bytes=max(record.read_request_bytes for record in known),
        write_request_bytes=max(record.write_request_bytes for record in known),
    )
    in_flight = sum(record.depth * max(record.read_request_bytes, record.write_request_bytes) for record in known)
    return DiskSettings(tuple(record.mixed_rate for record in known), queue, checksum, in_flight)
