"""Forks processes that save one checkpoint after the other until they are killed: imports are paid once.

Run as `python save_forever.py FOLDER`: after "go" it says "saved" for each checkpoint, on "kill" it sends SIGKILL and
answers "killed".
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from offload.checkpoint.format.reader import Checkpoint
from tests.checkpoint.memory import frozen, random_state, save, trainable


def save_forever(root: Path) -> None:
    number = 0
    if (root / "latest").exists():
        with Checkpoint(root) as checkpoint:
            number = checkpoint.extra()["number"] + 1
    items = [trainable("w", (40,), split=True), frozen("f", (9,))]
    while True:
        state = random_state(items, np.random.default_rng(number))
        save(root, state, step=number, file_bytes=200, extra={"number": number}, keep=2)
        os.write(1, b"saved\n")
        number += 1


def main() -> None:
    root = Path(sys.argv[1])
    random_state([trainable("w", (40,), split=True)], np.random.default_rng(0))  # kernels are compiled before the fork
    while sys.stdin.readline() == "go\n":
        child = os.fork()
        if child == 0:
            save_forever(root)
        sys.stdin.readline()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.write(1, b"killed\n")


if __name__ == "__main__":
    main()
