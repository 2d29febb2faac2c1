"""A forked child (a data loader's worker) takes nothing over: no lock, no file, no space, no thread."""

import os
from pathlib import Path

import pytest

from offload.disk.named_folder import leftovers, remove_leftovers
from offload.disk.nameless import open_files
from tests.disk.children import WITH_NAMES, start_python

OPTIONS = ("-W", "ignore::DeprecationWarning")
"""Of newer Pythons, about forks of programs with threads: that is what is tested."""

SESSION = """
import fcntl, multiprocessing, os, sys, threading, time
from pathlib import Path
from offload.disk.io_queue import IoQueue
from offload.disk.layout import Extent
from offload.disk.swap_file import SwapFiles
from offload.errors import SessionClosedError
from offload.concurrency.lanes import Lanes, Reason
from offload.memory.ledger import Ledger
from offload.memory.region import Region
from offload.concurrency.timeline import Timeline

lanes = Lanes(Timeline(), wait_timeout_s=30)
region, extent = Region(1 << 20, owner="x", ledger=Ledger({})), Extent(0, 0, 1 << 20)
files = SwapFiles.create([Path(sys.argv[1])], run_id="run", rank=0, bytes_by_file=[1 << 20])
queue = IoQueue(files, lanes=lanes)
lanes.wait(queue.write(extent, region.tensor.fill_(5), "w"), Reason.EXTENT_WRITTEN)

def ours():
    paths = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    names = [os.readlink(path) for path in paths if path.is_symlink()]
    return [name for name in names if name.startswith(sys.argv[1]) and name.endswith((" (deleted)", ".bin", ".lock"))]
"""


@pytest.mark.parametrize("program", [SESSION, WITH_NAMES + SESSION], ids=["nameless", "named"])
def test_a_child_that_outlives_a_killed_run_holds_neither_lock_nor_space(tmp_path: Path, program: str) -> None:
    code = """
child = os.fork()
if child == 0:
    os.write(1, f"{ours()} {files.closed}\\n".encode())  # one call: the parent writes to the same pipe
    sys.stdin.read()  # lives on
    os._exit(0)
os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG)
os.write(1, f"forked {child} {len(ours())}\\n".encode())
os.kill(os.getpid(), 9)
"""
    is_named = program != SESSION
    parent = start_python(program + code, str(tmp_path), options=OPTIONS)
    assert parent.stdout is not None
    assert parent.stdin is not None
    lines = sorted([parent.stdout.readline(), parent.stdout.readline()])
    assert lines[0] == "[] True\n"
    assert lines[1].startswith("forked ")
    assert lines[1].endswith(f" {1 + is_named}\n")  # the swap file, and the lock, stay open in the parent
    parent.wait(60)
    child = int(lines[1].split()[1])
    os.kill(child, 0)  # it lives
    assert [file for file in open_files() if file.folder == str(tmp_path)] == []
    assert leftovers(tmp_path) == [tmp_path / "offload-run-rank0"] * is_named
    assert remove_leftovers(tmp_path) == [tmp_path / "offload-run-rank0"] * is_named
    parent.communicate(timeout=60)  # the end of its input ends the child
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("held", [False, True])
def test_in_a_child_every_call_is_refused_at_once_and_the_parent_goes_on(tmp_path: Path, held: bool) -> None:
    """Scenario: also where another thread of the parent held the queue's lock when it forked: nobody frees it."""
    code = f"""
def in_child(answers):
    try:
        queue.read(extent, region.tensor, "r")
    except SessionClosedError as error:
        answers.send("forked process" in str(error))
    queue.close()
    files.close()
    answers.send([thread.name for thread in threading.enumerate() if thread.name.startswith("offload")])

mine, theirs = multiprocessing.Pipe()
if {held}:
    queue._lock.acquire()
worker = multiprocessing.get_context("fork").Process(target=in_child, args=(theirs,))
worker.start()
if {held}:
    queue._lock.release()
if not mine.poll(20):
    print("hangs", flush=True)
    worker.kill()
print(mine.recv(), mine.recv(), flush=True)
worker.join()
region.tensor.fill_(0)
lanes.wait(queue.read(extent, region.tensor, "r"), Reason.READ)
print(worker.exitcode, int(region.tensor.min()), len(ours()), flush=True)
queue.close()
files.close()
"""
    done, errors = start_python(SESSION + code, str(tmp_path), options=OPTIONS).communicate(timeout=100)
    assert done == "True []\n0 5 1\n", errors
    assert list(tmp_path.iterdir()) == []


def test_a_childs_own_files_are_its_own(tmp_path: Path) -> None:
    """Scenario: the worker's descriptors were closed, their numbers come again, and it ends as any program does."""
    code = """
child = os.fork()
if child == 0:
    with open(sys.argv[1] + "/own", "w") as own:
        own.write("kept")
        with SwapFiles.create([Path(sys.argv[1])], run_id="child", rank=0, bytes_by_file=[1 << 20]) as other:
            files.abandon()  # once more: these numbers now belong to the files just made
            files.close()
            os.fstat(own.fileno()), [os.fstat(file.descriptor) for file in other.files]
            print(len(ours()), flush=True)  # its own alone
        own.flush()
    os._exit(0)
_, status = os.waitpid(child, 0)
print(status, len(ours()), flush=True)
queue.close()
files.close()
"""
    done, errors = start_python(SESSION + code, str(tmp_path), options=OPTIONS).communicate(timeout=100)
    assert done == "1\n0 1\n", errors
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


def test_a_started_program_inherits_no_descriptor(tmp_path: Path) -> None:
    code = """
import subprocess
listing = subprocess.run(["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True).stdout
print(sys.argv[1] in listing, flush=True)
queue.close()
files.close()
"""
    done, errors = start_python(SESSION + code, str(tmp_path), options=OPTIONS).communicate(timeout=100)
    assert done == "False\n", errors
