"""A rank that is killed at any instant: the others name it, and all ranks go on from the newest checkpoint.

The short forms run always. Under OFFLOAD_STRESS=1, with the marker `stress`: 30 kills, 10 of them inside a save.
"""

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offload.checkpoint.format import folder as folders
from offload.checkpoint.format import open_files
from offload.checkpoint.format.reader import Checkpoint
from offload.errors import OffloadError
from tests.ranks.training import batches, build, loss_of, own_part, session_of
from tests.ranks.world import Place, World

STRESS = bool(os.environ.get("OFFLOAD_STRESS"))
SHARES = {"begun": 0.25, "stepped": 0.25, "saving": 0.5}
"""Of the kills that aim at each phase."""

STEPS_A_KILL = 3
"""No life is longer than this, so all kills come before the end."""

LONGEST_S = 0.02
"""About what a phase takes."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------------------------------------- kills at any instant


def train(place: Place, root: Path, num_steps: int, victim: int, target: str, occurrence: int, delay_s: float) -> str:
    """A run, or the rest of one; `victim` is killed so long after it has said `target` for that many times."""
    seen: Counter[str] = Counter()

    def say(line: str) -> None:
        os.write(1, f"{line}\n".encode())
        seen[line.split()[0]] += 1
        if place.rank == victim and line.startswith(target) and seen[target] == occurrence:
            threading.Timer(delay_s, die).start()

    model, optimizer = build()
    every = list(batches(num_steps))
    with session_of(place, model, optimizer, home="disk") as session:
        first = session.load(root).step if folders.complete(root) else 0
        say(f"resumed {first}")
        for step in range(first, num_steps):
            say("begun")
            loss_of(model, own_part(every[step], place.rank, place.world_size)).backward()
            session.step()
            say("stepped")
            session.weights_sha256()  # waits for the step
            optimizer.zero_grad()
            say("saving")
            session.save(root, step=step + 1, keep=2)
            say(f"saved {step + 1}")
        return session.weights_sha256()


def kill_once(world: World, root: Path, num_steps: int, rng: np.random.Generator, saved: int) -> tuple[str, int]:
    """One life of two ranks, of which one is killed; the phase in which it was, and the last step saved."""
    victim, target = int(rng.integers(2)), str(rng.choice(list(SHARES), p=list(SHARES.values())))
    occurrence, delay_s = int(rng.integers(1, STEPS_A_KILL)), float(rng.uniform(0, LONGEST_S))
    outcomes = world.outcomes(train, 2, root, num_steps, victim, target, occurrence, delay_s)
    dead, other = outcomes[victim], outcomes[1 - victim]
    assert dead.status == -signal.SIGKILL, dead.output
    assert isinstance(other.error, OffloadError), other.output
    assert f"rank {victim}" in str(other.error)
    lines = [line for line in dead.output.splitlines() if line.split()[:1] != []]
    assert int(lines[0].removeprefix("resumed ")) >= saved, "a checkpoint that was complete is not found"
    told = [line for outcome in outcomes for line in outcome.output.splitlines() if line.startswith("saved")]
    assert list((world.folder_of_last_run / "swap").iterdir()) == []
    return lines[-1].split()[0], max([saved, *(int(line.split()[1]) for line in told)])


def survive(world: World, folder: Path, rng: np.random.Generator, num_kills: int) -> Counter[str]:
    """How many kills hit each phase."""
    num_steps = num_kills * STEPS_A_KILL
    expected = world.run(train, 2, folder / "undisturbed", num_steps, -1, "", 0, 0.0)
    phases: Counter[str] = Counter()
    saved = 0
    for _ in range(num_kills):
        phase, saved = kill_once(world, folder / "killed", num_steps, rng, saved)
        phases[phase] += 1
    assert world.run(train, 2, folder / "killed", num_steps, -1, "", 0, 0.0) == expected
    print(f"killed in {dict(phases)}")  # noqa: T201 - pytest shows it on failure
    assert len(folders.complete(folder / "killed")) == 2, "keep=2"
    return phases


def test_kills_of_a_rank_at_random_instants_change_nothing(
    world: World, tmp_path: Path, rng: np.random.Generator
) -> None:
    survive(world, tmp_path, rng, 2)


if STRESS:  # not a skip: those fail on CI, which runs the short form

    @pytest.mark.stress
    @pytest.mark.timeout(900)
    def test_thirty_kills_of_a_rank_at_random_instants_change_nothing(
        world: World, tmp_path: Path, rng: np.random.Generator
    ) -> None:
        phases = survive(world, tmp_path, rng, 30)
        assert phases["saving"] >= 10


# --------------------------------------------------------------------------------- kills in the middle of one call


def die_at_sync(number: int) -> None:
    """At this one of all fsyncs from now on: each ends a file, or makes a name last."""
    real: Callable[[int], None] = os.fsync
    calls: Iterator[int] = iter(range(1, 10_000))

    def fsync(descriptor: int) -> None:
        if next(calls) == number:
            die()
        real(descriptor)

    os.fsync = fsync


def die_instead(*_: Any) -> Any:
    die()


def die_within(place: Place, root: Path, call: str, victim: int, number: int) -> None:
    model, optimizer = build()
    with session_of(place, model, optimizer, home="disk") as session:
        for step, batch in enumerate(batches(2)):
            loss_of(model, own_part(batch, place.rank, 2)).backward()
            session.step()
            optimizer.zero_grad()
            if step == 0:
                session.save(root / "run")
        if place.rank == victim:
            if call == "load":
                open_files.OpenFiles.get = die_instead
            die_at_sync(number)
        if call == "load":
            session.load(root / "run")
        elif call == "export":
            session.export(root / "export")
        else:
            session.save(root / "run", wait=call == "save").durable.result()


@pytest.mark.parametrize(
    ("call", "victim", "number"),
    [
        ("save", 1, 1),  # its own part is written and not synced
        ("save", 0, 3),  # the manifest or the names of the files are synced
        ("save beside", 1, 1),
        ("load", 1, 0),
        ("export", 1, 1),
        ("export", 0, 9),  # the shards are there, and the first rank alone writes
    ],
)
def test_a_rank_that_dies_within_a_call_is_named_and_leaves_nothing_half_done(
    world: World, call: str, victim: int, number: int, tmp_path: Path
) -> None:
    outcomes = world.outcomes(die_within, 2, tmp_path, call, victim, number)
    dead, other = outcomes[victim], outcomes[1 - victim]
    assert dead.status == -signal.SIGKILL, dead.output
    assert isinstance(other.error, OffloadError), other.output
    assert f"rank {victim}" in str(other.error)
    with Checkpoint(tmp_path / "run") as latest:
        latest.verify()
        assert latest.step == 1
    assert [path for path in tmp_path.glob("export/*") if not path.name.startswith(".")] == []
    assert list((world.folder_of_last_run / "swap").iterdir()) == []
    # A new session of other ranks saves and exports beside what is left.
    assert world.run(go_on, 1, tmp_path) == [2]
    assert [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".saving")] == []


def go_on(place: Place, root: Path) -> int:
    model, optimizer = build()
    with session_of(place, model, optimizer) as session:
        session.load(root / "run")
        loss_of(model, next(batches(1))).backward()
        session.step()
        optimizer.zero_grad()
        session.save(root / "run")
        session.export(root / "export")
    with Checkpoint(root / "run") as latest:
        return latest.step
