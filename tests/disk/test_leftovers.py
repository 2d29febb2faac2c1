"""Cleaning removes what dead runs have left, and only that."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offload.disk.named_folder import leftovers, owner_of, remove_leftovers
from offload.disk.swap_file import SwapFiles
from offload.units import MIB
from tests.checkpoint.syscalls import Killed, Syscalls
from tests.disk.children import WITH_NAMES, start_python

RUN = """
import sys
from pathlib import Path
from offload.disk.swap_file import SwapFiles
files = SwapFiles.create([Path(sys.argv[1])], run_id=sys.argv[2], rank=3, bytes_by_file=[1 << 20])
print("made", flush=True)
sys.stdin.read()
"""

pytestmark = pytest.mark.usefixtures("named")

Start = Callable[[str], "subprocess.Popen[str]"]


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


def test_only_the_folder_of_the_killed_run_goes(tmp_path: Path, start: Start) -> None:
    dead, _alive = start("dead"), start("alive")
    with SwapFiles.create([tmp_path], run_id="own", rank=0, bytes_by_file=[MIB]):
        assert remove_leftovers(tmp_path) == []
        kill(dead)
        folder = tmp_path / "offload-dead-rank3"
        assert leftovers(tmp_path) == [folder]
        assert owner_of(folder).startswith(f"pid {dead.pid} started 20")
        assert remove_leftovers(tmp_path) == [folder]
        names = {"offload-alive-rank3", "offload-own-rank0"}
        assert {path.name for path in tmp_path.iterdir()} == names
        assert all((tmp_path / name / "swap.bin").stat().st_size == MIB for name in names)
        assert leftovers(tmp_path) == remove_leftovers(tmp_path) == []


def test_a_run_killed_while_it_tried_direct_io_is_cleaned_whole(tmp_path: Path, start: Start) -> None:
    kill(start("dead"))
    (tmp_path / "offload-dead-rank3" / ".offload-probe-x1").write_bytes(b"")
    assert remove_leftovers(tmp_path) == [tmp_path / "offload-dead-rank3"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("foreign", ["notes.txt", "folder"])
def test_a_leftover_in_which_somebody_keeps_something_stays(tmp_path: Path, start: Start, foreign: str) -> None:
    kill(start("dead"))
    folder = tmp_path / "offload-dead-rank3"
    (folder / foreign).mkdir() if foreign == "folder" else (folder / foreign).write_text("mine")
    assert remove_leftovers(tmp_path) == []
    assert {path.name for path in folder.iterdir()} == {foreign, "owner.lock", "swap.bin"}
    (folder / foreign).rmdir() if foreign == "folder" else (folder / foreign).unlink()
    assert remove_leftovers(tmp_path) == [folder]


def make_foreign(folder: Path, kind: str) -> Path:
    """Something that looks nearly like a leftover."""
    good = "pid 4 started 2025-01-01T00:00:00+0000\n"
    own = folder / ("offload-x-rankless" if kind == "name" else "offload-x-rank0")
    if kind == "file":
        own.write_text("a file")
        return own
    if kind == "link":
        (folder / "target").mkdir()
        (folder / "target" / "owner.lock").write_text(good)
        own.symlink_to(folder / "target")
        return own
    own.mkdir()
    if kind == "lock is a link":
        (folder / "precious").write_text(good)
        (own / "owner.lock").symlink_to(folder / "precious")
    elif kind != "no lock":
        (own / "owner.lock").write_text({"empty lock": "", "foreign lock": "locked by editor\n"}.get(kind, good))
    return own


@pytest.mark.parametrize("kind", ["name", "file", "link", "lock is a link", "no lock", "empty lock", "foreign lock"])
def test_what_no_run_has_made_is_never_touched(tmp_path: Path, kind: str) -> None:
    own = make_foreign(tmp_path, kind)
    before = sorted(tmp_path.rglob("*"))
    assert leftovers(tmp_path) == remove_leftovers(tmp_path) == []
    assert sorted(tmp_path.rglob("*")) == before
    if kind in ("link", "file"):
        own.unlink()  # the check for leaked swap folders goes by the name
    else:
        for path in own.iterdir():
            path.unlink()
        own.rmdir()


def test_whatever_call_a_run_was_killed_at_its_folder_can_be_removed_once_it_has_surely_ended(tmp_path: Path) -> None:
    """Also between two calls of its start or its end, where its folder has no lock, or one with half of a name."""
    at, left = 0, set()
    while True:
        calls = Syscalls(tmp_path, kill_at=at)
        try:
            with calls.watched():
                SwapFiles.create([tmp_path], run_id="dead", rank=0, bytes_by_file=[MIB]).close()
        except Killed:
            at += 1
        else:
            break
        for folder in tmp_path.iterdir():
            left.add(tuple(sorted(path.name for path in folder.iterdir())))
            remove_leftovers(tmp_path)  # where it may just be starting, it stays
            for path in (*folder.iterdir(), folder) if folder.exists() else ():
                os.utime(path, (0, 0))
        remove_leftovers(tmp_path)
        assert list(tmp_path.iterdir()) == []
    assert left >= {(), ("owner.lock",), ("owner.lock", "swap.bin")}


def test_a_lock_that_somebody_removed_does_not_make_a_living_run_a_dead_one(tmp_path: Path) -> None:
    with SwapFiles.create([tmp_path], run_id="own", rank=0, bytes_by_file=[MIB]) as files:
        (folder := files.files[0].path.parent).joinpath("owner.lock").unlink()
        os.utime(folder, (0, 0))
        assert remove_leftovers(tmp_path) == []
        assert files.files[0].path.exists()


def test_a_folder_of_another_user_is_never_touched(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(start("dead"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 12_345)
        assert leftovers(tmp_path) == remove_leftovers(tmp_path) == []
    assert remove_leftovers(tmp_path) == [tmp_path / "offload-dead-rank3"]


def test_a_lock_that_is_gone_says_nothing(tmp_path: Path) -> None:
    assert owner_of(tmp_path) == ""
