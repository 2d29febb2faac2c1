"""A signal between two steps costs nothing: it is answered by a checkpoint, and then does what it does without us."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from offload.checkpoint.format.folder import complete
from offload.checkpoint.signals import SignalRequest
from offload.cli.main import main
from offload.errors import ConfigError
from offload.open_sessions import collect_dropped
from tests.training.models import mlp
from tests.training.oracle import adamw, assert_same_bits, enable, weights_of

ROOT: Final = Path(__file__).parents[2]
INPUTS: Final = torch.ones(2, 64)


@pytest.fixture(autouse=True)
def handlers_stay() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


def step(model: Any, optimizer: torch.optim.Optimizer, number: int | None = None) -> None:
    """A step, with a signal in the middle of it."""
    model(INPUTS).square().mean().backward()
    if number is not None:
        signal.raise_signal(number)
    optimizer.step()
    optimizer.zero_grad()


def test_the_users_handler_is_called_after_the_save_and_training_goes_on(tmp_path: Path) -> None:
    calls: list[tuple[int, list[str]]] = []
    before = signal.signal(
        signal.SIGUSR1, lambda number, frame: calls.append((number, [p.name for p in complete(tmp_path / "run")]))
    )
    try:
        model = mlp()
        optimizer = adamw(model)
        with enable(model, optimizer, "host", tmp_path) as session:
            session.save_on_signal(signal.SIGUSR1, tmp_path / "run", extra=lambda: {"epoch": 3}, keep=2)
            step(model, optimizer)
            assert complete(tmp_path / "run") == []
            step(model, optimizer, signal.SIGUSR1)
            assert calls == [(signal.SIGUSR1, ["step-00000002"])]
            expected = session.state_dict()["model"]
            step(model, optimizer)
            loaded = session.load(tmp_path / "run")
            assert (loaded.step, loaded.extra, loaded.exact) == (2, {"epoch": 3}, True)
            assert_same_bits(session.state_dict()["model"], expected)
            signal.raise_signal(signal.SIGUSR1)  # it is the user's again
            assert len(calls) == 2
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_handler_that_raises_ends_the_loop_after_the_save(tmp_path: Path) -> None:
    model = mlp()
    optimizer = adamw(model)
    with enable(model, optimizer, "host", tmp_path) as session:
        session.save_on_signal(signal.SIGINT, tmp_path / "run")
        with pytest.raises(KeyboardInterrupt):
            step(model, optimizer, signal.SIGINT)
    assert [path.name for path in complete(tmp_path / "run")] == ["step-00000001"]
    assert all(parameter.isfinite().all() for parameter in weights_of(model).values())


def test_a_signal_that_is_ignored_saves_and_is_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        model = mlp()
        optimizer = adamw(model)
        with enable(model, optimizer, "host", tmp_path) as session:
            session.save_on_signal(signal.SIGUSR1, tmp_path / "run")
            step(model, optimizer, signal.SIGUSR1)
            step(model, optimizer)
        assert [path.name for path in complete(tmp_path / "run")] == ["step-00000001"]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_sessions_that_end_anyhow_leave_no_handler(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    model = mlp()
    optimizer = adamw(model)
    with enable(model, optimizer, "host", tmp_path) as session:
        session.save_on_signal(signal.SIGTERM, tmp_path / "run")
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_session_that_was_dropped_answers_no_signal(tmp_path: Path) -> None:
    """Its handler cannot be taken back by the thread that closes it: it gives way when the signal comes."""
    calls: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: calls.append(number))
    try:
        model = mlp()
        session = enable(model, adamw(model), "host", tmp_path)
        session.save_on_signal(signal.SIGUSR1, tmp_path / "run")
        del model, session
        collect_dropped()
        signal.raise_signal(signal.SIGUSR1)
        assert calls == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    ("number", "path", "names"),
    [
        (signal.SIGKILL, "run", "signal <Signals.SIGKILL: 9> cannot be caught"),
        (0, "run", "signal 0 cannot be caught"),
        ("TERM", "run", "signal 'TERM' cannot be caught"),
        (signal.SIGTERM, "file/run", "cannot be a folder"),
    ],
)
def test_what_cannot_be_answered_is_refused(number: Any, path: str, names: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    model = mlp()
    with enable(model, adamw(model), "host", tmp_path) as session, pytest.raises(ConfigError, match=names):
        session.save_on_signal(number, tmp_path / path)


def test_without_an_optimizer_or_outside_the_main_thread_it_is_refused(tmp_path: Path) -> None:
    with enable(mlp(), None, "host", tmp_path) as session, pytest.raises(ConfigError, match="no optimizer"):
        session.save_on_signal(signal.SIGTERM, tmp_path / "run")
    errors: list[BaseException] = []

    def catch() -> None:
        try:
            SignalRequest.catch(signal.SIGUSR1)
        except ConfigError as error:
            errors.append(error)

    thread = threading.Thread(target=catch)
    thread.start()
    thread.join()
    assert "in the main thread" in str(errors[0])


# ---------------------------------------------------------------------------------------------- whole processes

PROGRAM: Final = """
import os, signal, sys, time
from pathlib import Path
import torch, offload
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(32)))
optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
folder, stop, way = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if way == "handler":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
budgets = {"device_memory": "128KiB", "host_memory": "1MiB", "disk": folder / "swap", "device": "cpu"}
if way == "twice":  # it ends at once, perhaps with named files: not what is tested here
    budgets = {"device_memory": "64MiB", "host_memory": "64MiB", "device": "cpu"}
with offload.enable(model, optimizer, **budgets) as session:
    session.save_on_signal(signal.SIGTERM, folder / "run")
    done = session.load(folder / "run").step if (folder / "run").exists() else 0
    for number in range(done, 6):
        loss = model(torch.full((2, 64), 1 + number / 8)).square().mean()
        if number == stop:
            os.kill(os.getpid(), signal.SIGTERM)
            if way == "twice":
                os.kill(os.getpid(), signal.SIGTERM)
        if way == "child" and os.fork() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if stop == 6:
        os.kill(os.getpid(), signal.SIGTERM)
    if way == "child":
        assert [os.wait()[1] for _ in range(6)] == [signal.SIGTERM] * 6
    print(session.weights_sha256())
"""


def program(folder: Path, stop: int = -1, way: str = "") -> subprocess.CompletedProcess[str]:
    (folder / "swap").mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM, str(folder), str(stop), way],
        capture_output=True, text=True, check=False, timeout=200, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_sigterm_ends_by_itself_after_a_save_and_the_next_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = program(tmp_path / "whole")
    ended = program(tmp_path / "parted", stop=2)
    assert (whole.returncode, ended.returncode) == (0, -signal.SIGTERM)
    assert [path.name for path in complete(tmp_path / "parted" / "run")] == ["step-00000003"]
    assert list((tmp_path / "parted" / "swap").iterdir()) == []
    assert program(tmp_path / "parted").stdout == whole.stdout != ""


@pytest.mark.parametrize(
    ("stop", "way", "status", "saved"),
    [
        (1, "handler", 7, ["step-00000002"]),
        (1, "twice", -signal.SIGTERM, []),
        (6, "", -signal.SIGTERM, []),  # after the last step: nothing is lost that the program does not save itself
        (-1, "child", 0, []),
    ],
)
def test_the_exit_status_is_that_of_the_users_own_action(
    stop: int, way: str, status: int, saved: list[str], tmp_path: Path
) -> None:
    done = program(tmp_path, stop, way)
    assert done.returncode == status, done.stderr
    assert [path.name for path in complete(tmp_path / "run")] == saved


def test_offload_train_saves_on_sigterm_and_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    common = ["--params", "150k", "--batch", "2", "--seq", "16", "--device-memory", "64MiB", "--host-memory", "64MiB"]
    run = [*common, "--checkpoint", str(tmp_path / "run"), "--log-every", "1", "--json", str(tmp_path / "out.json")]
    command = [sys.executable, "-m", "offload", "train", "--resume", *run, "--steps"]
    with subprocess.Popen([*command, "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step"):
                process.send_signal(signal.SIGTERM)
                break
        rest, errors = process.communicate(timeout=100)
    assert process.returncode == -signal.SIGTERM, errors
    assert "ending after this step" in rest
    assert errors == ""
    (saved,) = complete(tmp_path / "run")
    num_done = int(saved.name.removeprefix("step-"))
    assert len(json.loads((tmp_path / "out.json").read_text())["losses"]) == num_done
    steps = ["--steps", str(num_done + 2)]
    assert main(["train", "--resume", *run, *steps]) == 0
    parted = json.loads((tmp_path / "out.json").read_text())
    assert main(["train", *common, "--json", str(tmp_path / "out.json"), *steps]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["weights_sha256"] == parted["weights_sha256"]
