"""DeepSpeed's asynchronous I/O as a contender, in a process and a Python environment of its own.

Owns: the other end of disk_peers.py's pipe. Run as a script, by the Python of `--deepspeed-python`: it needs torch and
deepspeed alone, nothing of this package.
Does not: decide when to move what; each line on standard input is one command, each answer one line of JSON on the
descriptor named as the only argument (standard output belongs to DeepSpeed's log).
Threads: the main thread, and those of DeepSpeed's handle.

Commands: `prepare PATH` compiles where that was not done before and answers {"versions": {...}}; `read` or `write`,
each followed by BLOCK_BYTES DEPTH THREADS NUM_BYTES, answer {"seconds": s}; anything that fails answers
{"error": words}. End of input ends it.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.aio import AsyncIOBuilder

OPERATION_BYTES = 64 * 2**20
NUM_BUFFERS = 4


class Mover:
    """One handle at a time over one file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file_bytes = Path(path).stat().st_size
        self.module = AsyncIOBuilder().load()
        self.setting: tuple[int, ...] = ()
        self.handle: Any = None
        self.buffers: list[torch.Tensor] = []

    def move(self, direction: str, setting: tuple[int, ...], num_bytes: int) -> float:
        """The seconds of all operations together: submitted at once, waited for once, as it does best."""
        self.use(setting)
        call = self.handle.pread if direction == "read" else self.handle.pwrite
        operation_bytes = min(OPERATION_BYTES, num_bytes)
        start_s = time.perf_counter()
        num_operations = num_bytes // operation_bytes
        for number in range(num_operations):
            buffer = self.buffers[number % NUM_BUFFERS][:operation_bytes]
            offset = number * operation_bytes % (self.file_bytes - self.file_bytes % operation_bytes)
            if call(buffer, self.path, False, True, offset) != 0:
                raise OSError(f"{direction} at {offset} was refused")
        if self.handle.wait() != num_operations:
            raise OSError(f"{direction} of {num_bytes} bytes ended early")
        return (time.perf_counter() - start_s) * num_bytes / (num_operations * operation_bytes)

    def use(self, setting: tuple[int, ...]) -> None:
        """A handle with that (block size, depth, threads), and memory that it needs not copy from or to."""
        if setting == self.setting:
            return
        for buffer in self.buffers:
            self.handle.free_cpu_locked_tensor(buffer)
        self.buffers.clear()
        block_bytes, depth, threads = setting
        self.handle = self.module.aio_handle(block_bytes, depth, False, True, threads)
        like = torch.empty(0, dtype=torch.uint8)
        for _ in range(NUM_BUFFERS):
            self.buffers.append(self.handle.new_cpu_locked_tensor(OPERATION_BYTES, like))
            self.buffers[-1].random_(0, 256)
        self.setting = setting


def main() -> None:
    """Answer commands until there are no more."""
    movers: list[Mover] = []
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8", buffering=1) as answers:
        for line in sys.stdin:
            command, _, rest = line.strip().partition(" ")
            answer: dict[str, Any]
            try:
                if command == "prepare":
                    movers.append(Mover(rest))
                    answer = {"versions": {"deepspeed": deepspeed.__version__, "torch": torch.__version__}}
                else:
                    *setting, num_bytes = map(int, rest.split())
                    answer = {"seconds": movers[0].move(command, tuple(setting), num_bytes)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
