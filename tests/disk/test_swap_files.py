"""Swap files are private, locked, as large as asked, and gone when their run is gone."""

import errno
import fcntl
import logging
import os
import signal
from pathlib import Path

import pytest

from offload.disk import swap_file as swap_file_module
from offload.disk.probe import free_bytes, takes_direct_io
from offload.disk.swap_file import SwapFiles, leftovers
from offload.errors import ConfigError, DiskError, DiskFullError, InternalError
from offload.units import MIB
from tests.disk.children import start_python


def create(*folders: Path, run_id: str = "run", rank: int = 0, num_bytes: int = MIB) -> SwapFiles:
    return SwapFiles.create(folders, run_id=run_id, rank=rank, bytes_by_file=[num_bytes] * len(folders))


CREATE_IN_CHILD = """
import sys
from pathlib import Path
from offload.disk.swap_file import SwapFiles
files = SwapFiles.create([Path(sys.argv[1])], run_id="child", rank=3, bytes_by_file=[1 << 20])
print("made", flush=True)
"""


# ------------------------------------------------------------------------------------------------------ life


def test_the_files_are_private_preallocated_and_removed(folder: Path) -> None:
    with create(folder, run_id="a1", rank=5, num_bytes=3 * MIB) as files:
        own = folder / "offload-a1-rank5"
        assert [path.name for path in folder.iterdir()] == [own.name]
        assert {path.name for path in own.iterdir()} == {"owner.lock", "swap.bin"}
        assert own.stat().st_mode & 0o777 == 0o700
        assert (own / "owner.lock").stat().st_mode & 0o777 == 0o600
        swap = (own / "swap.bin").stat()
        assert (swap.st_mode & 0o777, swap.st_size) == (0o600, 3 * MIB)
        assert swap.st_blocks * 512 >= 3 * MIB  # really allocated, so that no later write meets a full disk
        assert files.files[0].path == own / "swap.bin"
        assert not os.get_inheritable(files.files[0].descriptor)
        assert not files.closed
    assert files.closed
    assert list(folder.iterdir()) == []
    files.close()


def test_the_lock_names_its_process(tmp_path: Path) -> None:
    with create(tmp_path):
        text = (tmp_path / "offload-run-rank0" / "owner.lock").read_text()
    assert text.startswith(f"pid {os.getpid()} started 20")


def test_an_empty_swap_file_is_allowed(tmp_path: Path) -> None:
    with create(tmp_path, num_bytes=0) as files:
        assert files.files[0].num_bytes == 0


def test_the_mode_says_what_the_file_system_takes(folder: Path) -> None:
    with create(folder) as files:
        flags = fcntl.fcntl(files.files[0].descriptor, fcntl.F_GETFL)
        assert (files.mode == "direct") == takes_direct_io(folder) == bool(flags & os.O_DIRECT)


def test_buffered_mode_is_taken_where_direct_io_is_refused_and_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(swap_file_module, "takes_direct_io", lambda path: False)
    with caplog.at_level(logging.WARNING), create(tmp_path) as files:
        assert files.mode == "buffered"
        assert not fcntl.fcntl(files.files[0].descriptor, fcntl.F_GETFL) & os.O_DIRECT
    assert [r.message.split(" does")[0] for r in caplog.records] == [str(tmp_path)]


def test_dropping_the_files_removes_them(tmp_path: Path) -> None:
    files = create(tmp_path)
    del files
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- refusing


def test_a_missing_folder_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a folder.*mkdir -p"):
        create(tmp_path, tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_named_twice_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="twice"):
        create(tmp_path, tmp_path / ".." / tmp_path.name)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    # The tests may run as root, whom no mode bits stop: the refusal of the system call is injected.
    def refuse(path: Path, mode: int) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match=r"cannot be written.*right to write"):
        create(tmp_path)


@pytest.mark.parametrize("wrong", [{"run_id": "../evil"}, {"run_id": ""}, {"rank": -1}, {"num_bytes": -1}])
def test_names_and_sizes_that_make_no_folder_raise(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(InternalError):
        create(tmp_path, **wrong)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_raises_before_anything_is_made(tmp_path: Path) -> None:
    wanted = free_bytes(tmp_path) + 10**12
    with pytest.raises(DiskFullError, match=rf"{tmp_path}.*need {wanted} bytes") as caught:
        create(tmp_path, num_bytes=wanted)
    assert "Free some space" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_folders_of_one_file_system_must_hold_the_sum(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for path in folders:
        path.mkdir()
    with pytest.raises(DiskFullError, match=rf"{folders[0]}, {folders[1]}"):
        create(*folders, num_bytes=free_bytes(tmp_path) // 2 + MIB * 512)
    assert [list(path.iterdir()) for path in folders] == [[], []]


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, DiskFullError), (errno.EIO, DiskError)])
def test_a_failure_half_way_removes_what_was_made_in_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for path in folders:
        path.mkdir()
    calls = []
    original = os.posix_fallocate

    def half_done(descriptor: int, offset: int, num_bytes: int) -> None:
        calls.append(num_bytes)
        if len(calls) == 2:
            original(descriptor, offset, num_bytes // 2)
            raise OSError(number, os.strerror(number))
        original(descriptor, offset, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", half_done)
    with pytest.raises(error, match=str(folders[1])):
        create(*folders)
    assert calls == [MIB, MIB]
    assert [list(path.iterdir()) for path in folders] == [[], []]


def test_a_real_limit_on_file_size_is_a_disk_error_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n" + CREATE_IN_CHILD
    )
    _, errors = start_python(code, str(tmp_path)).communicate(timeout=60)
    assert "DiskError" in errors
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ owners


def test_two_runs_of_one_name_exclude_each_other_even_in_one_process(tmp_path: Path) -> None:
    with create(tmp_path) as files:
        for _ in range(2):  # the failed attempt must not have freed the lock
            with pytest.raises(ConfigError, match=rf"in use by another run \(pid {os.getpid()} started"):
                create(tmp_path)
        assert files.files[0].path.exists()
        with create(tmp_path, rank=1), create(tmp_path, run_id="other"):
            pass
    create(tmp_path).close()


def test_the_lock_excludes_plain_lockf_of_other_programs(tmp_path: Path) -> None:
    code = """
import fcntl, sys
with open(sys.argv[1], "r+") as lock:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print("held")
"""
    with create(tmp_path):
        output, _ = start_python(code, str(tmp_path / "offload-run-rank0" / "owner.lock")).communicate(timeout=60)
    assert output == "held\n"


def test_what_a_killed_run_leaves_is_found_and_can_be_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    child = start_python(CREATE_IN_CHILD + "sys.stdin.read()", str(tmp_path))
    assert child.stdout is not None
    assert child.stdout.readline() == "made\n"
    with create(tmp_path):
        assert leftovers(tmp_path) == []  # both runs are alive
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
        own = tmp_path / "offload-child-rank3"
        assert leftovers(tmp_path) == [own]
        assert leftovers(tmp_path) == [own]  # looking changes nothing
        with caplog.at_level(logging.WARNING), create(tmp_path, run_id="child", rank=3):
            assert (own / "swap.bin").stat().st_size == MIB
            assert leftovers(tmp_path) == []
    assert "taking over" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [(), ("-O",)])
def test_an_exception_that_nobody_catches_leaves_no_files(tmp_path: Path, options: tuple[str, ...]) -> None:
    child = start_python(CREATE_IN_CHILD + "raise ValueError('of the user')", str(tmp_path), options=options)
    output, errors = child.communicate(timeout=60)
    assert output == "made\n"
    assert "of the user" in errors
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_that_ends_takes_nothing_away(tmp_path: Path) -> None:
    code = """
import os
child = os.fork()
if child == 0:
    sys.exit()  # runs the finalizers of the child
os.waitpid(child, 0)
print(files.files[0].path.exists(), flush=True)
"""
    output, _ = start_python(CREATE_IN_CHILD + code, str(tmp_path)).communicate(timeout=60)
    assert output == "made\nTrue\n"
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_changes_its_folder_removes_its_files_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "swap").mkdir()
    monkeypatch.chdir(tmp_path)
    files = create(Path("swap"))
    monkeypatch.chdir("/")
    files.close()
    assert list((tmp_path / "swap").iterdir()) == []


def test_files_that_are_not_ours_stay(tmp_path: Path) -> None:
    files = create(tmp_path)
    foreign = tmp_path / "offload-run-rank0" / "notes.txt"
    foreign.write_text("mine")
    files.close()
    assert foreign.read_text() == "mine"
    assert [path.name for path in foreign.parent.iterdir()] == ["notes.txt"]
    foreign.unlink()
    foreign.parent.rmdir()


def test_a_link_in_place_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "offload-run-rank0").symlink_to(target)
    with pytest.raises(ConfigError, match="not a swap folder of this user"):
        create(tmp_path)
    assert list(target.iterdir()) == []
    (tmp_path / "offload-run-rank0").unlink()
