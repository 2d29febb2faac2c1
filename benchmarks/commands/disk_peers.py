"""DeepSpeed's asynchronous I/O as a contender of `offload bench disk`.

Owns: its process, and the settings that it is tried with.
Does not: order the runs or compare (disk.py); the process itself is deepspeed_aio_worker.py.
Threads: the main thread.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.commands.fio import HUGE_PAGES_FOR_MALLOC
from benchmarks.commands.peers import (
    PREPARE_TIMEOUT_S,
    STEP_TIMEOUT_S,
    DeepSpeedWorker,
    Unavailable,
    WorkerFailed,
)
from offload.disk.swap_file import SwapFile
from offload.units import MIB, format_bytes

AIO_WORKER: Final = Path(__file__).with_name("deepspeed_aio_worker.py")
AIO_DIRECTIONS: Final = ("read", "write")
"""It has no call that mixes them."""


@dataclass(frozen=True, slots=True)
class AioSetting:
    """DeepSpeed's own: bytes of a block, blocks in flight for each thread, threads."""

    block_bytes: int
    depth: int
    threads: int

    @property
    def words(self) -> str:
        """For people."""
        return f"{format_bytes(self.block_bytes)} x {self.depth} x {self.threads} threads"


AIO_SETTINGS: Final = (
    AioSetting(MIB, 32, 1), AioSetting(MIB, 32, 4), AioSetting(8 * MIB, 16, 1), AioSetting(8 * MIB, 8, 4),
)  # fmt: skip
"""From its documentation's own tuning range, upwards to blocks of our size."""


def start_aio(python: Path, file: SwapFile) -> "AioWorker | Unavailable":
    """A process that moves `file`, or why there is none. The caller closes it."""
    if file.mode != "direct":
        return Unavailable("it takes direct I/O alone, which this folder does not")
    worker = AioWorker(python)
    try:
        worker.open(file.path)
    except WorkerFailed as error:
        worker.close()
        return Unavailable(f"installed, but it does not work (it needs libaio-dev and a compiler): {error}")
    except BaseException:
        worker.close()
        raise
    return worker


class AioWorker(DeepSpeedWorker):
    """The process; a context manager."""

    def __init__(self, python: Path) -> None:
        super().__init__(python, threads=1, script=AIO_WORKER, environment=HUGE_PAGES_FOR_MALLOC)

    def open(self, path: Path) -> None:
        """Use this file; compiles DeepSpeed's engine where that was not done before."""
        answer = self._ask(f"prepare {path}", PREPARE_TIMEOUT_S)
        self.versions = dict(answer["versions"])

    def run(self, direction: str, setting: AioSetting, num_bytes: int) -> float:
        """Move `num_bytes`; the seconds that the process measured."""
        words = f"{direction} {setting.block_bytes} {setting.depth} {setting.threads} {num_bytes}"
        return float(self._ask(words, STEP_TIMEOUT_S)["seconds"])
