"""Random models, loops, budgets, rings, overlaps and orders of events: the bits of a serial run, always.

    OFFLOAD_STRESS=1 python -m pytest tests/stress                      500 seeds
    OFFLOAD_STRESS_SEEDS=417,430-440 python -m pytest tests/stress      these

A case that fails is made smaller until nothing can be left out of it, and printed with its seed.
"""

import os
import time
from pathlib import Path

import pytest

from tests.stress.cases import Case, draw, smaller
from tests.stress.program import run, serial

NUM_SEEDS = 10
NUM_SEEDS_UNDER_STRESS = 500
SHRINK_S = 60.0
"""Spent on making a failing case smaller, so that it is told of before the test's own time is up."""


def seeds() -> list[int]:
    named = os.environ.get("OFFLOAD_STRESS_SEEDS")
    if named is None:
        return list(range(NUM_SEEDS_UNDER_STRESS if os.environ.get("OFFLOAD_STRESS") else NUM_SEEDS))
    ends = [part.partition("-") for part in named.split(",")]
    return [seed for first, _, last in ends for seed in range(int(first), int(last or first) + 1)]


def complaint(case: Case, folder: Path) -> str:
    """What is wrong with a case; empty where nothing is."""
    try:
        expected = serial(case, folder)
    except Exception as error:
        return f"the serial run: {type(error).__name__}: {error}"
    try:
        found = run(case, folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    left = sorted(path.name for path in folder.iterdir())
    return found.difference(expected) or (f"left behind: {left}" if left else "")


def smallest_failing(case: Case, folder: Path) -> tuple[Case, str]:
    """A case of which nothing can be left out without another outcome, if there is time to find it."""
    end_s = time.monotonic() + SHRINK_S
    text = complaint(case, folder)
    found = True
    while found:
        found = False
        for candidate in smaller(case):
            if time.monotonic() > end_s:
                return case, text
            fault = complaint(candidate, folder)
            if fault.split(":")[0] == text.split(":")[0]:
                case, text, found = candidate, fault, True
                break
    return case, text


@pytest.mark.parametrize("seed", seeds())
def test_a_random_run_has_the_bits_of_the_serial_one(seed: int, tmp_path: Path) -> None:
    case = draw(seed)
    fault = complaint(case, tmp_path)
    if fault:
        least, its_fault = smallest_failing(case, tmp_path)
        pytest.fail(f"seed {seed}: {fault}\n{case}\nthe smallest that fails: {its_fault}\n{least}")


def test_the_same_seed_draws_the_same_case() -> None:
    assert draw(3) == draw(3)
    assert len({draw(seed) for seed in range(20)}) == 20
