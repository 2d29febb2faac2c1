"""fio as a contender of `offload bench disk`.

Owns: one timed run of fio over the file that all contenders move.
Does not: choose settings, order the runs or compare (disk.py); DeepSpeed is disk_peers.py.
Threads: the main thread.

Note [Same work]: all contenders move the same number of bytes of the same preallocated file, once written, in order,
with as many requests of the same size in flight; mixed runs read its first half and write its second, one to one. And
all have memory of huge pages, as the product has it: a disk that gets a request in chunks of 4 KiB can be several times
slower. fio does not scramble its buffers before each write, which would cost it time.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any, Final

from benchmarks.commands.peers import Unavailable
from offload.cli.disk_file import Kind, Setting
from offload.disk.swap_file import SwapFile
from offload.errors import OffloadError
from offload.units import MIB

FIO_ENGINES: Final = ("libaio", "io_uring")
FIO_TIMEOUT_S: Final = 120.0
FIO_PROBE_BYTES: Final = 4 * MIB

HUGE_PAGES_FOR_MALLOC: Final = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""In the environment of a program: its large allocations ask for huge pages."""


class FioFailed(OffloadError):
    """fio ended with an error, or its answer has no figures."""


def find_fio(engine: str, file: SwapFile) -> "Fio | Unavailable":
    """fio with that engine on `file`, tried once, or why there is none."""
    program = shutil.which("fio")
    if program is None:
        return Unavailable("not installed; apt-get install fio")
    fio = Fio(program, engine, file)
    try:
        fio.run("read", Setting(FIO_PROBE_BYTES, 1), FIO_PROBE_BYTES)
    except FioFailed as error:
        return Unavailable(f"installed, but it does not work here: {error}")
    return fio


class Fio:
    """fio over an existing file."""

    def __init__(self, program: str, engine: str, file: SwapFile) -> None:
        self._program = program
        self._engine = engine
        self._file = file

    def run(self, kind: Kind, setting: Setting, num_bytes: int) -> float:
        """Move `num_bytes`; the seconds that fio measured, without its start and end. Raises FioFailed."""
        try:
            done = subprocess.run(
                self._command(kind, setting, num_bytes),
                capture_output=True,
                text=True,
                timeout=FIO_TIMEOUT_S,
                check=False,
                env={**os.environ, **HUGE_PAGES_FOR_MALLOC},
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise FioFailed(f"{type(error).__name__}: {error}") from error
        return seconds_of(done.stdout, done.stderr, num_bytes)

    def _command(self, kind: Kind, setting: Setting, num_bytes: int) -> Sequence[str]:
        return [
            self._program, "--name=bench", "--output-format=json", "--thread", "--ioengine", self._engine,
            f"--filename={self._file.path}", f"--size={self._file.num_bytes}", f"--io_size={num_bytes}",
            f"--rw={'rw' if kind == 'mixed' else kind}", "--rwmixread=50", f"--bs={setting.request_bytes}",
            f"--iodepth={setting.depth}", f"--direct={int(self._file.mode == 'direct')}", "--fallocate=none",
            "--scramble_buffers=0", "--allow_file_create=0", "--iomem_align=2m",
        ]  # fmt: skip


def seconds_of(answer: str, complaints: str, num_bytes: int) -> float:
    """The seconds in fio's JSON for `num_bytes`, of which it may have moved some more or less. Raises FioFailed."""
    try:
        # Warnings may stand before the JSON.
        job: dict[str, Any] = json.loads(answer[answer.index("{") :])["jobs"][0]
        sides = [job[side] for side in ("read", "write") if job[side]["io_bytes"]]
        moved_bytes = sum(side["io_bytes"] for side in sides)
        seconds = max(side["runtime"] for side in sides) / 1000
    except (ValueError, LookupError, TypeError) as error:
        raise FioFailed(_last_line(complaints) or _last_line(answer) or "it ended without a word") from error
    if job.get("error") or not moved_bytes or not seconds:
        raise FioFailed(_last_line(complaints) or f"error {job.get('error')} after {moved_bytes} bytes")
    return float(seconds * num_bytes / moved_bytes)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
