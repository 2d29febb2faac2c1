"""A run that is killed at any instant goes on from its newest checkpoint, and ends with the bits of one that was not.

The short form runs always. The full form (100 kills, at least 30 inside a save and 30 while state is written behind)
has the marker `stress` and runs when OFFLOAD_STRESS is set.
"""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

STRESS = bool(os.environ.get("OFFLOAD_STRESS"))
SCRIPT = Path(__file__).with_name("train_until_killed.py")
SHARES = {"begun": 0.15, "stepped": 0.5, "saving": 0.35}
"""Of the kills that aim at each phase; those aimed at write-behind often come too late for it."""

STEPS_A_KILL = 3
"""No life is longer than this, so all kills come before the end."""

LONGEST_S = 0.01
"""About what a phase takes."""


class Trainer:
    """The program that forks runs."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def tell(self, word: str) -> None:
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def line(self) -> str:
        line = self._process.stdout.readline().strip()
        assert line, "the trainer died"
        return line

    def lines_until_killed(self) -> Iterator[str]:
        self.tell("kill")
        while (line := self.line()) != "killed":
            yield line


@contextmanager
def trainer(num_steps: int) -> Iterator[Trainer]:
    command = [sys.executable, str(SCRIPT), str(num_steps)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Trainer(process)
        process.stdin.close()


def run_to_its_end(one: Trainer, folder: Path) -> str:
    """SHA-256 of the final weights."""
    one.tell(f"go {folder}")
    while not (line := one.line()).startswith("done"):
        assert line != "killed"
    assert list(one.lines_until_killed()) == []
    return line.split()[1]


def kill_once(one: Trainer, folder: Path, rng: np.random.Generator, resumed_at_least: int) -> tuple[str, int]:
    """One life, ended at a random instant of a random phase; the phase it ended in, and the last step saved."""
    one.tell(f"go {folder}")
    word, step = one.line().split()
    assert word == "resumed"
    saved = int(step)
    assert saved >= resumed_at_least, "a checkpoint that was complete is not found"
    target, occurrence = str(rng.choice(list(SHARES), p=list(SHARES.values()))), int(rng.integers(1, STEPS_A_KILL))
    seen: list[str] = []
    while seen.count(target) < occurrence:
        seen.append(one.line())
    time.sleep(float(rng.uniform(0, LONGEST_S)))  # no condition is waited for: every instant must do
    seen += one.lines_until_killed()
    saved = max([saved, *(int(line.split()[1]) for line in seen if line.startswith("saved"))])
    return seen[-1].split()[0], saved


def survive(folder: Path, rng: np.random.Generator, num_kills: int) -> Counter[str]:
    """How many kills hit each phase."""
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    swap, run = killed / "swap", killed / "run"
    swap.mkdir(parents=True)
    (undisturbed / "swap").mkdir(parents=True)
    phases: Counter[str] = Counter()
    with trainer(num_kills * STEPS_A_KILL) as one:
        expected = run_to_its_end(one, undisturbed)
        saved = 0
        for _ in range(num_kills):
            phase, saved = kill_once(one, killed, rng, saved)
            phases[phase] += 1
        assert run_to_its_end(one, killed) == expected
    print(f"killed in {dict(phases)}")  # noqa: T201 - pytest shows it on failure
    assert list(swap.iterdir()) == []
    assert len([path for path in run.iterdir() if path.name.startswith("step-")]) <= 2, "keep=2"
    return phases


def test_ten_kills_at_random_instants_change_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    phases = survive(tmp_path, rng, 10)
    assert phases["done"] == 0
    assert len(phases) >= 2


if STRESS:  # not a skip: those fail on CI, which runs the short form

    @pytest.mark.stress
    @pytest.mark.timeout(1800)
    def test_a_hundred_kills_at_random_instants_change_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
        phases = survive(tmp_path, rng, 100)
        assert phases["saving"] >= 30
        assert phases["stepped"] >= 30
