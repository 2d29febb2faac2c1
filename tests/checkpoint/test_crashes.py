"""Killed or out of room at any call to the system: the last complete checkpoint is found, and is whole."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from offload.checkpoint.format import folder as folders
from offload.checkpoint.format.errors import CheckpointError
from offload.checkpoint.format.reader import Checkpoint
from offload.errors import ConfigError, DiskFullError
from tests.checkpoint.memory import State, frozen, load_into, random_state, save, trainable
from tests.checkpoint.syscalls import Killed, Syscalls
from tests.disk.children import start_python


@pytest.fixture
def states() -> list[State]:
    items = [trainable("w", (40,), split=True), frozen("f", (9,))]
    return [random_state(items, np.random.default_rng(number)) for number in range(4)]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def save_numbered(root: Path, states: list[State], number: int, **options: object) -> None:
    save(root, states[number], step=number, file_bytes=200, extra={"number": number}, **options)


def number_found(root: Path, states: list[State]) -> int:
    """Which of the states a folder loads, after every byte of it was compared."""
    with Checkpoint(root) as checkpoint:
        checkpoint.verify()
        number = checkpoint.extra()["number"]
        assert checkpoint.step == number
    assert load_into(root, states[0].items)[0].same_bits(states[number])
    return number


def attempts(tmp_path: Path, states: list[State], *options: str) -> Iterator[tuple[Path, Syscalls]]:
    """A folder with checkpoints 0 and 1, and its like for as long as saving 2 reaches one more call."""
    first = tmp_path / "first"
    for number in (0, 1):
        save_numbered(first, states, number)
    at = 0
    while True:
        root = tmp_path / f"at-{at}"
        shutil.copytree(first, root)
        calls = Syscalls(root, **dict.fromkeys(options, at))
        yield root, calls
        if at >= len(calls.calls):
            return
        at += 1
        shutil.rmtree(root)


def test_killed_before_any_call_or_in_the_middle_of_a_write_leaves_the_last_complete_checkpoint(
    tmp_path: Path, states: list[State]
) -> None:
    """`keep=1`, so that the old checkpoints are being removed at some of the calls."""
    found, hit = [], set()
    for root, calls in attempts(tmp_path, states, "kill_at"):
        try:
            with calls.watched():
                save_numbered(root, states, 2, keep=1)
        except Killed:
            hit.add(calls.hit)
        found.append(number_found(root, states))
        save_numbered(root, states, 3, keep=1)  # the next save works, and tidies
        assert number_found(root, states) == 3
        assert names(root) == [".lock", "latest", "step-00000003"]
    assert found == sorted(found), "once the new checkpoint is found, it is found for good"
    assert set(found) == {1, 2}
    assert hit >= {"open", "pwrite", "posix_fallocate", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir"}


def test_killed_while_the_first_checkpoint_is_saved_leaves_none_or_that_one(
    tmp_path: Path, states: list[State]
) -> None:
    at, step_history = 0, set()
    while True:
        root = tmp_path / f"at-{at}"
        calls = Syscalls(root, kill_at=at)
        try:
            with calls.watched():
                save_numbered(root, states, 0)
        except Killed:
            at += 1
            try:
                step_history.add(number_found(root, states))
            except CheckpointError as error:
                assert "holds no checkpoint" in str(error)  # noqa: PT017 - either is right
                step_history.add(None)
        else:
            break
    assert step_history == {0, None}


def test_a_disk_that_is_full_at_any_call_keeps_the_old_checkpoint_and_leaves_no_rest(
    tmp_path: Path, states: list[State]
) -> None:
    hit = set()
    for root, calls in attempts(tmp_path, states, "full_at"):
        before = names(root)
        try:
            with calls.watched():
                save_numbered(root, states, 2)
        except DiskFullError as error:
            assert str(root) in str(error)  # noqa: PT017 - some calls may fail without harm
            hit.add(calls.hit)
            if number_found(root, states) == 1:
                assert names(root) == before
            else:  # it is complete, but perhaps it would not survive a power cut: the caller must know
                assert calls.calls[calls.full_at].paths == (str(root),), "the very last sync"
        else:  # nothing needed room, as where a folder was there already
            assert number_found(root, states) == 2
        save_numbered(root, states, 3)
        assert number_found(root, states) == 3
    assert hit >= {"open", "pwrite", "write", "posix_fallocate", "fsync", "mkdir", "rename"}


def test_a_file_system_that_really_has_no_room_is_a_full_disk(tmp_path: Path, states: list[State]) -> None:
    save_numbered(tmp_path, states, 1)
    before = names(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(DiskFullError, match=r"\.safetensors: no room to allocate .* What was saved before is unt"):
            save(tmp_path, random_state([trainable("w", (400,))], np.random.default_rng(0)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert names(tmp_path) == before
    assert number_found(tmp_path, states) == 1


def test_everything_is_on_the_disk_before_it_gets_the_name_under_which_it_is_found(
    tmp_path: Path, states: list[State]
) -> None:
    """A power cut keeps what was synced: files, then their folder, then its name, then `latest`."""
    save_numbered(tmp_path, states, 0)
    calls = Syscalls(tmp_path)
    with calls.watched():
        save_numbered(tmp_path, states, 1)
    last = {}  # the last write to a path, and the last sync of it
    renames = []
    for index, call in enumerate(calls.calls):
        if call.name in ("write", "pwrite", "posix_fallocate"):
            last[call.paths[0], "write"] = index
        elif call.name == "fsync":
            last.setdefault((call.paths[0], "fsync"), []).append(index)
        elif call.name in ("rename", "replace"):
            renames.append((index, *call.paths))
    (published, saving, final), (named, following, latest) = renames
    assert (final, latest) == (str(tmp_path / "step-00000001"), str(tmp_path / "latest"))
    written = {path for path, what in last if what == "write" and path.startswith(saving)}
    assert len(written) > 2, "several files and the manifest"
    for path in written:
        assert last[path, "write"] < max(last[path, "fsync"]) < min(last[saving, "fsync"]) < published
    assert last[following, "write"] < max(last[following, "fsync"]) < named
    root_syncs = last[str(tmp_path), "fsync"]
    assert any(published < index < named for index in root_syncs)
    assert max(root_syncs) > named


# --------------------------------------------------------------------------------------------------- retention


def test_keep_leaves_that_many_and_always_the_latest(tmp_path: Path, states: list[State]) -> None:
    for number in range(4):
        save_numbered(tmp_path, states, number, keep=2)
    assert names(tmp_path) == [".lock", "latest", "step-00000002", "step-00000003"]
    save_numbered(tmp_path, states, 1, keep=1)  # went back: the newest is that of the lower step
    assert names(tmp_path) == [".lock", "latest", "step-00000001"]
    assert number_found(tmp_path, states) == 1


def test_keep_says_what_it_removed_and_leaves_what_is_not_a_checkpoint(tmp_path: Path, states: list[State]) -> None:
    save_numbered(tmp_path, states, 0)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-00000009").mkdir()  # no manifest: not ours to remove
    (tmp_path / "step-00000008").symlink_to(tmp_path / "step-00000000")
    saved = save(tmp_path, states[1], step=1, keep=1)
    assert saved.removed == ("step-00000000",)
    assert names(tmp_path) == [".lock", "latest", "notes.txt", "step-00000001", "step-00000008", "step-00000009"]


def test_the_same_step_saved_twice_is_two_checkpoints_and_the_second_is_the_latest(
    tmp_path: Path, states: list[State]
) -> None:
    save(tmp_path, states[0], step=5, extra={"number": 0})
    saved = save(tmp_path, states[1], step=5, extra={"number": 1})
    assert saved.folder.name == "step-00000005-2"
    assert load_into(tmp_path, states[0].items)[0].same_bits(states[1])


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_a_keep_that_is_no_count_is_refused_before_anything_is_written(
    tmp_path: Path, states: list[State], keep: object
) -> None:
    with pytest.raises(ConfigError, match="keep="):
        save(tmp_path / "root", states[0], keep=keep)
    assert not (tmp_path / "root").exists()


def test_two_saves_to_one_folder_at_once_are_refused(tmp_path: Path, states: list[State]) -> None:
    with folders.locked(tmp_path), pytest.raises(CheckpointError, match=r"another save to .* is running"):
        save(tmp_path, states[0])


def test_ctrl_c_during_the_last_rename_keeps_what_latest_names(
    tmp_path: Path, states: list[State], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python hears the signal when the call to the system has ended."""
    save_numbered(tmp_path, states, 1)
    real = os.replace

    def replace(source: str, target: str) -> None:
        real(source, target)
        if Path(target).name == "latest":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            save_numbered(tmp_path, states, 2)
    assert number_found(tmp_path, states) == 2
    assert names(tmp_path) == [".lock", "latest", "step-00000001", "step-00000002"]


def test_a_child_forked_during_a_save_does_not_keep_its_lock(tmp_path: Path, states: list[State]) -> None:
    """As a worker of a data loader does, which lives as long as the training or, where that is killed, longer."""
    script = """
import os, sys
from pathlib import Path
from offload.checkpoint.format import folder

begun, tell = os.pipe()
with folder.locked(Path(sys.argv[1])):
    if os.fork() == 0:
        os.write(tell, b"x")
        sys.stdin.read()
        os._exit(0)
    os.read(begun, 1)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
os.write(1, b"saved\\n")
os.wait()
"""
    for ending in ("killed", "saved"):
        parent = start_python(script, str(tmp_path), ending)
        if ending == "killed":
            parent.wait(60)
        else:
            assert parent.stdout.readline() == "saved\n"
        save_numbered(tmp_path, states, 0)
        parent.communicate(timeout=60)  # the end of its input ends the child


def test_a_save_waits_for_a_doctor_that_looks(
    tmp_path: Path, states: list[State], monkeypatch: pytest.MonkeyPatch
) -> None:
    looking = folders.locked(tmp_path)
    looking.__enter__()
    with monkeypatch.context() as patch:
        patch.setattr(folders.time, "sleep", lambda _: looking.__exit__(None, None, None))
        save_numbered(tmp_path, states, 1)
    assert number_found(tmp_path, states) == 1


# ----------------------------------------------------------------------------------------------------- SIGKILL


def kill_savers(tmp_path: Path, states: list[State], rng: np.random.Generator, num_kills: int) -> None:
    script = Path(__file__).with_name("save_forever.py")
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        in_a_save, newest = 0, -1
        for _ in range(num_kills):
            process.stdin.write("go\n")
            process.stdin.flush()
            for _ in range(int(rng.integers(3))):
                assert process.stdout.readline() == "saved\n"
            time.sleep(float(rng.uniform(0, 0.01)))  # no condition is waited for: every instant must do
            process.stdin.write("kill\n")
            process.stdin.flush()
            while (line := process.stdout.readline()) != "killed\n":
                assert line == "saved\n"
            in_a_save += any(path.name.startswith(folders.SAVING) for path in tmp_path.iterdir())
            if folders.complete(tmp_path):
                with Checkpoint(tmp_path) as checkpoint:
                    checkpoint.verify()
                    number = checkpoint.extra()["number"]
                assert number >= newest
                newest = number
                loaded = load_into(tmp_path, states[0].items)[0]
                assert loaded.same_bits(random_state(states[0].items, np.random.default_rng(number)))
        process.stdin.close()
    assert in_a_save > 0
    assert newest > 0


def test_sigkill_at_random_instants_leaves_a_checkpoint_that_loads(
    tmp_path: Path, states: list[State], rng: np.random.Generator
) -> None:
    kill_savers(tmp_path, states, rng, num_kills=10)


@pytest.mark.stress
def test_sigkill_at_a_hundred_random_instants_leaves_a_checkpoint_that_loads(
    tmp_path: Path, states: list[State], rng: np.random.Generator
) -> None:
    kill_savers(tmp_path, states, rng, num_kills=100)
