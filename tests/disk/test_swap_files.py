"""Swap files are private, locked, as large as asked, and gone when their run is gone."""

import errno
import fcntl
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload.disk import nameless
from offload.disk import swap_file as swap_file_module
from offload.disk.named_folder import leftovers
from offload.disk.probe import free_bytes, takes_direct_io
from offload.disk.swap_file import SwapFiles
from offload.errors import ConfigError, DiskError, DiskFullError, InternalError
from offload.units import MIB
from tests.disk.children import WITH_NAMES, start_python


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


def test_a_file_without_a_name_is_private_preallocated_and_known_by_its_mark(folder: Path) -> None:
    with create(folder, run_id="a1", rank=5, num_bytes=3 * MIB) as files:
        assert list(folder.iterdir()) == []
        [file] = files.files
        swap = os.fstat(file.descriptor)
        assert (swap.st_mode & 0o777, swap.st_size, swap.st_nlink) == (0o600, 3 * MIB, 0)
        assert swap.st_blocks * 512 >= 3 * MIB  # really allocated, so that no later write meets a full disk
        assert str(file) == f"swap file of rank 5 in {folder}"
        assert file.path.stat().st_ino == swap.st_ino
        assert not os.get_inheritable(file.descriptor)
        [found] = [found for found in nameless.open_files() if found.pid == os.getpid()]
        assert (found.descriptor, found.kind, found.rank) == (file.descriptor, "swap file", 5)
        assert (found.folder, found.num_bytes) == (str(folder), swap.st_blocks * 512)
        assert "python" in found.command
    assert files.closed
    files.close()
    assert [found for found in nameless.open_files() if found.pid == os.getpid()] == []


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL])
def test_where_no_file_can_be_opened_without_a_name_the_name_is_removed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "open", without_tmpfile(os.open, number))
    with create(tmp_path) as files:
        assert not files.files[0].is_named
        assert list(tmp_path.iterdir()) == []
        [found] = [found for found in nameless.open_files() if found.pid == os.getpid()]
        assert found.folder == str(tmp_path)


@pytest.mark.parametrize("how", ["keeps another name", "refuses", "loses what is written then"])
def test_a_file_system_that_keeps_a_name_gets_a_folder_with_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Scenario: NFS renames an open file that is removed; others refuse, or fail what comes after."""
    unlink, pwrite = Path.unlink, os.pwrite

    def remove(path: Path, missing_ok: bool = False) -> None:
        if how == "keeps another name" and path.name.startswith(nameless.UNLINKED_PREFIX) and not missing_ok:
            os.link(path, tmp_path / ".nfs0001")
        if how == "refuses" and path.name.startswith(nameless.UNLINKED_PREFIX) and not missing_ok:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        unlink(path, missing_ok=missing_ok)

    def write(descriptor: int, data: bytes, offset: int) -> int:
        if how == "loses what is written then" and not os.fstat(descriptor).st_nlink:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return pwrite(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", without_tmpfile(os.open, errno.EOPNOTSUPP))
        patch.setattr(Path, "unlink", remove)
        patch.setattr(os, "pwrite", write)
        assert not nameless.can_be_had(tmp_path)
        for path in tmp_path.iterdir():
            path.unlink()
        monkeypatch.setattr(nameless, "can_be_had", lambda folder: False)
        with create(tmp_path) as files:
            assert files.files[0].path == tmp_path / "offload-run-rank0" / "swap.bin"
    assert list(tmp_path.iterdir()) == []


def without_tmpfile(real: Callable[..., int], number: int) -> Callable[..., int]:
    def open_named(path: object, flags: int, mode: int = 0o777, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number))
        return real(path, flags, mode, **options)

    return open_named


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGABRT])
def test_no_signal_leaves_bytes(tmp_path: Path, number: int) -> None:
    child = start_python(CREATE_IN_CHILD + "sys.stdin.read()", str(tmp_path))
    assert child.stdout is not None
    assert child.stdout.readline() == "made\n"
    assert [found.rank for found in nameless.open_files() if found.pid == child.pid] == [3]
    child.send_signal(number)
    child.communicate(timeout=60)
    assert child.returncode == -number
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("handler", ["default", "of the user", "of the user, later", "ignored", "in a child"])
def test_a_folder_with_a_lock_goes_with_the_signal_and_no_handler_of_the_users_is_touched(
    tmp_path: Path, number: int, handler: str
) -> None:
    users = f"signal.signal({int(number)}, lambda number, frame: print('mine', flush=True))"
    before = {"of the user": users, "ignored": f"signal.signal({int(number)}, signal.SIG_IGN)"}.get(handler, "")
    after = {"of the user, later": users}.get(handler, "")
    made = CREATE_IN_CHILD.replace('print("made"', f'{after}\nprint("made"')
    code = WITH_NAMES + f"import os, signal, time\n{before}\n" + made
    if handler == "in a child":
        code += f"""
mine, theirs = os.pipe()
if (child := os.fork()) == 0:
    os.write(theirs, b"x")
    while True:
        time.sleep(0.01)
os.read(mine, 1)
os.kill(child, {int(number)})
print(os.waitpid(child, 0)[1] == {int(number)}, flush=True)
"""
    process = start_python(code + "sys.stdin.read(1)", str(tmp_path), options=("-W", "ignore::DeprecationWarning"))
    assert process.stdout is not None
    assert process.stdout.readline() == "made\n"
    own = tmp_path / "offload-child-rank3"
    if handler == "in a child":
        assert process.stdout.readline() == "True\n"
    else:
        process.send_signal(number)
    if handler == "default":
        process.communicate(timeout=60)
        assert process.returncode == -number
    else:
        if handler.startswith("of the user"):
            assert process.stdout.readline() == "mine\n"
        assert (own / "swap.bin").stat().st_size == MIB
        process.communicate("x", timeout=60)
        assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_handlers_are_as_they_were_after_two_folders_with_locks(tmp_path: Path, named: None) -> None:
    with create(tmp_path, run_id="a"):
        with create(tmp_path, run_id="b"):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


@pytest.mark.usefixtures("named")
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


@pytest.mark.usefixtures("named")
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
    def refuse(path: Path, flags: int, mode: int) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refuse)
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


@pytest.mark.usefixtures("named")
def test_two_runs_of_one_name_exclude_each_other_even_in_one_process(tmp_path: Path) -> None:
    with create(tmp_path) as files:
        for _ in range(2):  # the failed attempt must not have freed the lock
            with pytest.raises(ConfigError, match=rf"in use by another run \(pid {os.getpid()} started"):
                create(tmp_path)
        assert files.files[0].path.exists()
        with create(tmp_path, rank=1), create(tmp_path, run_id="other"):
            pass
    create(tmp_path).close()


@pytest.mark.usefixtures("named")
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


@pytest.mark.usefixtures("named")
def test_what_a_killed_run_leaves_is_found_and_can_be_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    child = start_python(WITH_NAMES + CREATE_IN_CHILD + "sys.stdin.read()", str(tmp_path))
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
    output, _ = start_python(WITH_NAMES + CREATE_IN_CHILD + code, str(tmp_path)).communicate(timeout=60)
    assert output == "made\nTrue\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("named")
def test_a_run_that_changes_its_folder_removes_its_files_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "swap").mkdir()
    monkeypatch.chdir(tmp_path)
    files = create(Path("swap"))
    monkeypatch.chdir("/")
    files.close()
    assert list((tmp_path / "swap").iterdir()) == []


@pytest.mark.usefixtures("named")
def test_files_that_are_not_ours_stay(tmp_path: Path) -> None:
    files = create(tmp_path)
    foreign = tmp_path / "offload-run-rank0" / "notes.txt"
    foreign.write_text("mine")
    files.close()
    assert foreign.read_text() == "mine"
    assert [path.name for path in foreign.parent.iterdir()] == ["notes.txt"]
    foreign.unlink()
    foreign.parent.rmdir()


@pytest.mark.usefixtures("named")
def test_a_link_in_place_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "offload-run-rank0").symlink_to(target)
    with pytest.raises(ConfigError, match="not a swap folder of this user"):
        create(tmp_path)
    assert list(target.iterdir()) == []
    (tmp_path / "offload-run-rank0").unlink()
