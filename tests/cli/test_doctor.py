"""`offload doctor`: it tells what there is, removes what dead runs have left, and nothing that anybody still uses."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from offload.checkpoint.format import folder
from offload.cli.doctor import describe
from offload.cli.exit_codes import FAILED, UNUSABLE
from offload.cli.main import main
from offload.disk.probe import takes_direct_io
from offload.disk.swap_file import SwapFiles
from offload.planning.record import DiskRecord, save_record
from offload.units import MIB
from tests.checkpoint.memory import random_state, save, small_model
from tests.disk.children import WITH_NAMES, start_python

RUN = """
import sys
from pathlib import Path
from offload.disk.swap_file import SwapFiles
files = SwapFiles.create([Path(sys.argv[1])], run_id=sys.argv[2], rank=0, bytes_by_file=[2 << 20])
print("made", flush=True)
sys.stdin.read()
"""

Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a run in another process; returns when its files are made."""
    started = []

    def start(run_id: str) -> "subprocess.Popen[str]":
        child = start_python(WITH_NAMES + RUN, str(tmp_path), run_id)
        started.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "made\n"
        return child

    yield start
    for child in started:
        child.communicate(timeout=60)


def kill(child: "subprocess.Popen[str]") -> None:
    child.send_signal(signal.SIGKILL)
    child.wait(60)


def test_it_tells_what_the_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for label in ("processor", "kernel threads", "memory", "huge pages"):
        assert f"\n{label}  " in f"\n{output}"
    assert "leftovers" not in output


def test_it_lists_swap_files_without_a_name_and_who_has_them_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with SwapFiles.create([tmp_path], run_id="own", rank=7, bytes_by_file=[2 * MIB]):
        assert main(["doctor"]) == 0
        output = capsys.readouterr().out
        assert f"    swap file in {tmp_path}, 2.00 MiB: rank 7, pid {os.getpid()}: " in output
        assert main(["doctor", "--json", "--disk", str(tmp_path)]) == 0
        told = json.loads(capsys.readouterr().out)
        [found] = [file for file in told["open_swap_files"] if file["pid"] == os.getpid()]
        assert (found["folder"], found["num_bytes"], found["rank"]) == (str(tmp_path), 2 * MIB, 7)
        assert [folder["folder"] for folder in told["folders"]] == [str(tmp_path)]
        assert told["machine"]["cores"] >= 1
    assert main(["doctor", "--json", str(tmp_path / "told.json")]) == 0
    told = json.loads((tmp_path / "told.json").read_text())
    assert [file for file in told["open_swap_files"] if file["pid"] == os.getpid()] == []


def test_it_tells_what_a_folder_can_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--disk", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    answer = "yes" if takes_direct_io(tmp_path) else "no: "
    assert f"direct I/O      {answer}" in output
    assert f"offload bench disk --disk {tmp_path}" in output
    assert "leftovers       none" in output
    assert list(tmp_path.iterdir()) == []
    record = DiskRecord(
        read_request_bytes=MIB, write_request_bytes=MIB, depth=8, read_rate=2e9, write_rate=1e9, mixed_rate=1.5e9,
        measured_at=1.7e9,
    )  # fmt: skip
    save_record(tmp_path, record)
    assert main(["doctor", "--disk", str(tmp_path)]) == 0
    assert "record          read 2.00, write 1.00, mixed 1.50 GB/s" in capsys.readouterr().out


def test_looking_lists_the_killed_run_alone_and_changes_nothing(
    tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    dead, _alive = start("dead"), start("alive")
    kill(dead)
    before = sorted(tmp_path.rglob("*"))
    assert main(["doctor", "--disk", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "leftovers       1 of dead runs" in output
    assert "offload-dead-rank0  2.0" in output
    assert f"MiB  (pid {dead.pid} started" in output
    assert f"offload doctor --clean {tmp_path}" in output
    assert "offload-alive" not in output
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["doctor", "--clean", str(tmp_path)]) == 0


def test_cleaning_removes_the_killed_run_alone(
    tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    dead, _alive = start("dead"), start("alive")
    (tmp_path / "offload-notes-rank").mkdir()
    (tmp_path / "precious").write_text("mine")
    kill(dead)
    with SwapFiles.create([tmp_path], run_id="own", rank=0, bytes_by_file=[MIB]) as own:
        assert main(["doctor", "--clean", str(tmp_path)]) == 0
        output = capsys.readouterr().out
        assert f"{tmp_path}: removed 1 leftovers of dead runs\n    offload-dead-rank0" in output
        left = {"offload-alive-rank0", "offload-notes-rank", "precious"}
        assert {path.name for path in tmp_path.iterdir()} == left
        assert own.files[0].path.stat().st_size == MIB
        assert (tmp_path / "offload-alive-rank0" / "swap.bin").stat().st_size == 2 * MIB
        assert main(["doctor", "--clean", str(tmp_path), "--disk", str(tmp_path)]) == 0
        assert "removed 0 leftovers" in capsys.readouterr().out
    (tmp_path / "offload-notes-rank").rmdir()


def test_what_cannot_be_removed_is_told_and_an_error(
    tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(start("dead"))

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert main(["doctor", "--clean", str(tmp_path)]) == FAILED
    assert "offload-dead-rank0 could not be removed" in capsys.readouterr().out
    assert main(["doctor", "--clean", str(tmp_path)]) == 0


def test_what_killed_saves_left_beside_checkpoints_goes_too_but_not_while_one_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = save(tmp_path, random_state(small_model(), np.random.default_rng(0)))
    (half := tmp_path / ".saving-step-00000004-00").mkdir()
    (half / "rank-00000-00001.safetensors").write_bytes(bytes(MIB))
    (tmp_path / ".removing-step-00000001-00").mkdir()
    (tmp_path / ".latest-00").write_text("step-00000004")
    with folder.locked(tmp_path):
        assert main(["doctor", "--clean", str(tmp_path)]) == 0
        assert half.exists()
    assert main(["doctor", "--disk", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "leftovers       3 of dead runs" in output
    assert f"{half.name}  1.00 MiB  (unfinished)" in output
    assert main(["doctor", "--clean", str(tmp_path)]) == 0
    assert "removed 3 leftovers of dead runs" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "latest", saved.folder.name}


def test_a_leftover_that_another_doctor_removes_meanwhile_is_told_as_gone(tmp_path: Path) -> None:
    assert describe(tmp_path / "offload-dead-rank0") == "offload-dead-rank0  gone  (unfinished)"


@pytest.mark.parametrize("option", ["--disk", "--clean"])
def test_a_folder_that_is_none_is_one_line(tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", option, str(tmp_path / "missing")]) == UNUSABLE
    assert capsys.readouterr().err == f"offload: error: {tmp_path / 'missing'} is not a folder; name one that exists.\n"
