"""What `offload bench` calls: a file for each benchmark, and what it measures with and against."""

from typing import Final

from benchmarks.commands import adam, disk, overlap, step

COMMANDS: Final = (adam, disk, step, overlap)
"""In the order of `offload bench --help`."""
