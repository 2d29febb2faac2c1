"""`offload train` under torchrun: a rank that is killed costs the steps since the newest checkpoint, and nothing else.

The short form keeps to the environment that torchrun makes, with its store, which outlives the ranks. The long form
(marker `stress`, OFFLOAD_STRESS=1) runs torchrun itself.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from offload.checkpoint.format import folder as folders
from offload.cli.main import main
from offload.cli.rank import Rank
from tests.ranks.world import Outcome, Place, World

STRESS = bool(os.environ.get("OFFLOAD_STRESS"))
ROOT = Path(__file__).parents[2]
STEPS = 5
KILL_AFTER = 2
"""The checkpoint after which a rank is killed."""
# fmt: off
TRAIN = (
    "train", "--params", "150k", "--text", str(ROOT / "LICENSE"), "--batch", "12", "--seq", "16", "--precision", "fp32",
    "--device-memory", "640KiB", "--host-memory", "1842KiB", "--checkpoint-every", "1", "--resume",
)
# fmt: on
TOLERANCE = 1e-5
"""Of losses, relative, over a few steps with another number of ranks."""


def arguments(folder: Path, steps: int = STEPS) -> list[str]:
    """Of one run; checkpoints and swap are in `folder`."""
    (folder / "swap").mkdir(parents=True, exist_ok=True)
    return [*TRAIN, "--steps", str(steps), "--disk", f"{folder / 'swap'}", "--checkpoint", f"{folder / 'run'}"]


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def state_at_end(folder: Path) -> dict[str, bytes]:
    """The files of the last checkpoint: weights, moments, random states."""
    files = {path.name: path.read_bytes() for path in (folder / "run" / f"step-{STEPS:08d}").glob("*.safetensors")}
    assert len(files) == 3, "one of each rank"
    return files


def last_step(folder: Path) -> int:
    found = folders.complete(folder / "run")
    return int(found[-1].name.removeprefix("step-")) if found else 0


# -------------------------------------------------------------------------------------- as torchrun would start them


@pytest.fixture(scope="module")  # not of the test: torch leaves a pipe open where the store was
def store() -> dist.TCPStore:
    """The store that torchrun holds for its ranks."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def command(place: Place, given: list[str], folder: Path, victim: int) -> int:
    """`offload train`; `victim` is killed once the checkpoint is there."""

    def kill_at_checkpoint() -> None:
        never = threading.Event()
        while last_step(folder) < KILL_AFTER:
            never.wait(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    os.environ |= {"RANK": str(place.rank), "LOCAL_RANK": str(place.rank), "WORLD_SIZE": str(place.world_size)}
    if place.rank == victim:
        threading.Thread(target=kill_at_checkpoint, daemon=True).start()
    return main(given)


def outcomes(world: World, store: dist.TCPStore, attempt: int, num: int, folder: Path, **more: int) -> list[Outcome]:
    given, victim = arguments(folder, more.get("steps", STEPS)), more.get("victim", -1)
    return world.outcomes(command, num, given, folder, victim, store="none", **environment_of(store, attempt))


def environment_of(store: dist.TCPStore, attempt: int) -> dict[str, str]:
    """What torchrun sets, beside ranks."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
    }


def test_ranks_that_are_started_again_go_on_where_they_were_and_find_no_traces_of_the_killed(
    world: World, store: dist.TCPStore, tmp_path: Path
) -> None:
    undisturbed = outcomes(world, store, 0, 3, tmp_path / "undisturbed")
    assert [outcome.value for outcome in undisturbed] == [0, 0, 0], undisturbed[0].output
    first, dead, third = outcomes(world, store, 1, 3, tmp_path / "killed", victim=1)
    assert dead.status == -signal.SIGKILL
    for outcome in (first, third):
        assert outcome.value == 1, outcome.output
        assert "RankFailedError: rank 1 failed" in outcome.output
        assert "c10d" not in outcome.output, "what torch prints buries the error"
    assert KILL_AFTER <= last_step(tmp_path / "killed") < STEPS
    assert list((tmp_path / "killed" / "swap").iterdir()) == []
    again = outcomes(world, store, 2, 3, tmp_path / "killed")
    assert [outcome.value for outcome in again] == [0, 0, 0], again[0].output
    assert "going on after step" in again[0].output
    assert list((tmp_path / "killed" / "swap").iterdir()) == []
    assert state_at_end(tmp_path / "killed") == state_at_end(tmp_path / "undisturbed")


def leave_in_the_middle(place: Place, given: list[str], how: str) -> int:
    """`offload train`; rank 1 ends where the others wait for its loss."""

    def agree(rank: Rank, loss: float, *, is_ending: bool) -> tuple[float, bool]:
        if how == "killed":
            signal.raise_signal(signal.SIGKILL)
        raise ZeroDivisionError("of rank 1")

    os.environ |= {"RANK": str(place.rank), "LOCAL_RANK": str(place.rank), "WORLD_SIZE": str(place.world_size)}
    if place.rank == 1:
        Rank.agree = agree  # type: ignore[method-assign]
    return main(given)


@pytest.mark.parametrize("how", ["killed", "raised"])
def test_a_rank_that_ends_between_steps_is_named_by_the_others(
    world: World, store: dist.TCPStore, tmp_path: Path, how: str
) -> None:
    environment = environment_of(store, attempt=3 + ["killed", "raised"].index(how))
    given = [argument for argument in arguments(tmp_path) if argument != "--resume"]
    first, _, third = world.outcomes(leave_in_the_middle, 3, given, how, store="none", **environment)
    for outcome in (first, third):
        assert outcome.value == 1, outcome.output
        assert "offload: failed: RankFailedError: rank 1 failed" in outcome.output
        assert "Traceback" not in outcome.output
        assert how == "killed" or "ZeroDivisionError: of rank 1" in outcome.output
    assert list((tmp_path / "swap").iterdir()) == []


# -------------------------------------------------------------------------------------------------- torchrun itself


@contextmanager
def torchrun(num_ranks: int, folder: Path, *, steps: int = STEPS) -> Iterator["subprocess.Popen[str]"]:
    """Started; killed at the end where it still runs. What it prints is in `folder`."""
    given = [*arguments(folder, steps), "--json", f"{folder / 'result.json'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--max-restarts", "2", "-m", "offload"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *launch, *given], cwd=ROOT, env=environment, stdout=log, stderr=log, text=True
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def end_of(process: "subprocess.Popen[str]", folder: Path) -> None:
    assert process.wait(timeout=120) == 0, (folder / "log").read_text()


def kill_rank(process: "subprocess.Popen[str]", rank: int) -> None:
    ranks = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == str(rank)]
    assert len(ranks) == 1
    ranks[0].kill()


if STRESS:  # not a skip: those fail on CI, which runs the short form

    @pytest.mark.stress
    @pytest.mark.timeout(600)
    def test_torchrun_restarts_a_killed_rank_and_the_run_ends_with_the_same_bits(tmp_path: Path) -> None:
        undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
        with torchrun(3, undisturbed, steps=12) as process:
            end_of(process, undisturbed)
        with torchrun(3, killed, steps=12) as process:
            for rank, after in ((1, 2), (0, 6)):  # the first rank, too: the store is torchrun's
                deadline = time.monotonic() + 120
                while last_step(killed) < after and time.monotonic() < deadline:
                    time.sleep(0.005)
                kill_rank(process, rank)
            end_of(process, killed)
        log = (killed / "log").read_text()
        assert log.count("going on after step") == 2, log
        assert "Exception ignored" not in log, log
        assert "waitForInput" not in log, "lines that torch prints while a rank waits for another one"
        assert list((killed / "swap").iterdir()) == []
        expected, found = result_of(undisturbed), result_of(killed)
        assert found["weights_sha256"] == expected["weights_sha256"]
        assert found["losses"] == expected["losses"][-len(found["losses"]) :]

    @pytest.mark.stress
    @pytest.mark.timeout(600)
    def test_a_run_of_three_ranks_goes_on_with_two(tmp_path: Path) -> None:
        with torchrun(3, tmp_path, steps=4) as process:
            end_of(process, tmp_path)
        with torchrun(2, tmp_path, steps=8) as process:
            end_of(process, tmp_path)
        whole = tmp_path / "whole"
        with torchrun(3, whole, steps=8) as process:
            end_of(process, whole)
        found = result_of(tmp_path)
        assert found["world_size"] == 2
        assert found["losses"] == pytest.approx(result_of(whole)["losses"][4:], rel=TOLERANCE)
