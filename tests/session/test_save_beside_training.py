"""`save(wait=False)`: what is saved is the state of that moment, whatever training does meanwhile, however it ends."""

import contextlib
import errno
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.checkpoint.format.folder import MANIFEST
from offload.checkpoint.format.manifest import read_manifest
from offload.checkpoint.format.reader import Checkpoint
from offload.disk import clone
from offload.disk.nameless import open_files
from offload.errors import DiskCorruptionError, DiskFullError
from offload.units import Tier
from tests.disk.children import ROOT
from tests.doubles.cloning_disks import KINDS, cloning_disk, gate
from tests.session.runs import OPTIMIZERS, Case, outcome, train, wide
from tests.training.models import gpt
from tests.training.oracle import PLENTY, assert_same_bits, smallest

SCRIPT = Path(__file__).with_name("save_until_killed.py")

CLONE, COPY = "clone of the swap file", "copy next to the swap file"


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with cloning_disk(request.param, tmp_path / "disk") as folder:
        yield folder


@pytest.fixture
def any_disk(tmp_path: Path) -> Iterator[Path]:
    """A real one where there is one."""
    with cloning_disk(KINDS[-1], tmp_path / "disk") as folder:
        yield folder


@pytest.fixture(autouse=True)
def syncs_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)


def on_disk(
    case: Case, folder: Path, *, spare_host_bytes: int = 0, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, offload.Session]:
    """A session that keeps on disk all that the smallest host budget, and this much more, does not hold."""
    model = case.model()
    optimizer = OPTIMIZERS[case.optimizer](model)
    settings = {
        "precision": case.precision, "state_dtype": case.state_dtype, "max_grad_norm": 1.0, "device": "cpu",
        "disk": folder,
    } | {name: value for name, value in options.items() if name != "disk_space"}  # fmt: skip
    device_memory = smallest("device_memory", model, optimizer, host_memory=PLENTY, **settings)
    host_memory = smallest("host_memory", model, optimizer, device_memory=device_memory, **settings)
    session = offload.enable(
        model, optimizer, device_memory=device_memory, host_memory=host_memory + spare_host_bytes, **settings | options
    )
    return model, optimizer, session


def beside_swap(process: int | None = None) -> set[str]:
    """The kinds of files that a save has open beside the swap file of a process; default: of this one."""
    return {file.kind for file in open_files() if file.pid == (process or os.getpid())} - {"swap file"}


def content(path: Path) -> dict[str, Any]:
    """Every stored run with its checksum, after all bytes were compared with them, and what else a checkpoint has."""
    with Checkpoint(path) as checkpoint:
        checkpoint.verify()
        manifest = read_manifest(checkpoint.folder / MANIFEST)
    chunks = {str(stored.run): (stored.dtype, stored.checksum) for stored in manifest.ranges}
    return {"items": manifest.items, "step": manifest.step, **chunks}


def with_buffers() -> nn.Module:
    """A frozen block, and buffers of other dtypes and strides."""
    model = gpt()
    model.blocks[0].requires_grad_(False)
    model.register_buffer("seen", torch.arange(7))
    model.register_buffer("turned", torch.arange(12.0).view(3, 4).t())
    return model


CASES: dict[str, tuple[Case, int, dict[str, Any], set[str]]] = {
    "fp32": (Case(), 0, {}, {CLONE}),
    "split, checksums": (Case(precision="bf16"), 0, {"checksum": True}, {CLONE}),
    "partly on the host": (Case(precision="bf16"), 60_000, {}, {CLONE, COPY}),
    "8 bits": (Case(state_dtype="8bit", precision="bf16", model=wide), 0, {}, {CLONE}),
    "8 bits, partly on the host": (
        Case(state_dtype="8bit", precision="bf16", model=wide), 2_000_000, {"checksum": True},
        {CLONE, COPY},
    ),
    "copies in memory, buffers": (Case(model=with_buffers), 60_000, {}, {CLONE}),
}  # fmt: skip
"""What is trained, with how much host memory to spare and what options, and the files of a save beside the swap."""


@pytest.mark.parametrize(
    ("disk", "name"), [(KINDS[at % len(KINDS)], name) for at, name in enumerate(CASES)], indirect=["disk"]
)
def test_twenty_steps_while_it_is_written_do_not_reach_the_checkpoint(name: str, disk: Path, tmp_path: Path) -> None:
    case, spare_host_bytes, options, files = CASES[name]
    model, optimizer, session = on_disk(case, disk, spare_host_bytes=spare_host_bytes, **options)
    with session, gate() as writes:
        train(model, optimizer, session, range(2))
        at_once = session.save(tmp_path / "at once")
        assert at_once.durable
        result = session.save(tmp_path / "beside", wait=False)
        for number in range(2, 22):
            train(model, optimizer, session, range(number, number + 1))
            if number < 7:
                writes.let()
        assert not result.durable, "training did not wait for it"
        assert beside_swap() >= files
        writes.open()
        assert content(result.folder) == content(at_once.folder)
        assert beside_swap() == set()
        trained = outcome(model, session)
    model, optimizer, session = on_disk(case, disk, spare_host_bytes=spare_host_bytes, **options)
    with session:
        session.load(tmp_path / "beside")
        train(model, optimizer, session, range(2, 22))
        assert_same_bits(outcome(model, session), trained)


def test_zeros_that_were_never_written_are_those_of_the_moment_of_the_save(any_disk: Path, tmp_path: Path) -> None:
    """Scenario: moments before the first step are known zeros; the first step writes them, then the save reads."""
    model, optimizer, session = on_disk(Case(precision="bf16"), any_disk)
    with session, gate() as writes:
        at_once = session.save(tmp_path / "at once")
        result = session.save(tmp_path / "beside", wait=False)
        train(model, optimizer, session, range(1))
        writes.open()
        assert content(result.folder) == content(at_once.folder)


def test_a_save_asked_for_while_one_runs_waits_for_it_and_both_are_whole(any_disk: Path, tmp_path: Path) -> None:
    model, optimizer, session = on_disk(Case(), any_disk)
    with session, gate() as writes:
        train(model, optimizer, session, range(1))
        first = session.save(tmp_path / "run", wait=False)
        train(model, optimizer, session, range(1, 2))
        assert not first.durable
        writes.open()
        second = session.save(tmp_path / "run", wait=False)
        assert first.durable
        assert (first.folder.name, second.folder.name) == ("step-00000001", "step-00000002")
        content(first.folder)
        content(second.folder)


# --------------------------------------------------------------------------------------------------------- room


def test_what_a_save_takes_is_accounted_for_and_given_back(any_disk: Path, tmp_path: Path) -> None:
    model, optimizer, session = on_disk(Case(), any_disk, spare_host_bytes=100_000)
    with session, gate() as writes:
        train(model, optimizer, session, range(1))
        before = session.metrics()["peak_bytes"]
        session.save(tmp_path / "run", wait=False)
        during = session.metrics()["peak_bytes"]
        state_bytes = sum(p.numel() * 12 for p in model.parameters())
        assert during[Tier.DISK] >= before[Tier.DISK] + state_bytes, "the worst case: all of it overwritten"
        assert during[Tier.HOST] == before[Tier.HOST]
        writes.open()
        session.save(tmp_path / "run", wait=False).wait()
        assert session.metrics()["peak_bytes"] == during, "the first has given back what it took"


def test_without_room_in_disk_space_it_is_saved_before_training_goes_on(any_disk: Path, tmp_path: Path) -> None:
    model, optimizer, session = on_disk(Case(), any_disk)
    with session:
        needed_bytes = session.plan.disk_bytes
    model, optimizer, session = on_disk(Case(), any_disk, disk_space=needed_bytes)
    with session:
        train(model, optimizer, session, range(1))
        assert session.save(tmp_path / "run", wait=False).durable
        assert beside_swap() == set()


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSPC])
def test_where_files_cannot_be_cloned_it_is_saved_before_training_goes_on(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(clone, "clone_range", refuse)
    model, optimizer, session = on_disk(Case(), tmp_path)
    with session:
        train(model, optimizer, session, range(1))
        assert session.save(tmp_path / "run", wait=False).durable
        assert beside_swap() == set()
        content(tmp_path / "run")
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert bool(warned) == (number == errno.ENOSPC), "a file system that cannot is no reason to worry"


# --------------------------------------------------------------------------------------------- changes of the world


def test_a_relative_folder_is_the_one_of_the_call_wherever_the_process_goes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    _, _, session = Case().session("host", tmp_path)
    with session:
        with gate() as writes:
            result = session.save("run", wait=False)
            writes.wait_for_write()
            monkeypatch.chdir(tmp_path / "elsewhere")
        assert result.folder == tmp_path / "run" / "step-00000000"
        content(tmp_path / "run")


def test_a_swap_folder_that_somebody_has_removed_is_no_reason_not_to_save(any_disk: Path, tmp_path: Path) -> None:
    model, optimizer, session = on_disk(Case(), any_disk)
    with session:
        train(model, optimizer, session, range(1))
        assert list(any_disk.iterdir()) == []
        with contextlib.suppress(OSError):  # where it is a mount of its own it stays
            any_disk.rmdir()
        train(model, optimizer, session, range(1, 2))
        assert session.save(tmp_path / "run", wait=False).folder.name == "step-00000002"
        assert session.load(tmp_path / "run").exact


# ------------------------------------------------------------------------------------------------------- failing


def test_an_error_while_it_is_written_is_raised_by_the_next_save_and_training_is_unharmed(
    any_disk: Path, tmp_path: Path
) -> None:
    model, optimizer, session = on_disk(Case(), any_disk)
    with session:
        train(model, optimizer, session, range(4))
        expected = outcome(model, session)
    model, optimizer, session = on_disk(Case(), any_disk)
    with session:
        train(model, optimizer, session, range(2))
        session.save(tmp_path / "run")
        with gate() as writes:
            result = session.save(tmp_path / "run", wait=False)
            train(model, optimizer, session, range(2, 3))
            writes.open(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            train(model, optimizer, session, range(3, 4))
            with pytest.raises(DiskFullError, match="no room"):
                session.save(tmp_path / "run")
        with pytest.raises(DiskFullError, match="no room"):
            result.durable  # noqa: B018 - a loop that asks until it is there must not go on for ever
        assert beside_swap() == set()
        assert_same_bits(outcome(model, session), expected)
        assert [path.name for path in sorted((tmp_path / "run").glob("*step*"))] == ["step-00000002"]
        assert session.save(tmp_path / "run").folder.name == "step-00000004", "told once"


def test_an_error_that_nobody_has_read_is_raised_by_close_unless_another_one_ended_the_run(
    any_disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")

    def run() -> offload.Session:
        return on_disk(Case(), any_disk)[2]

    with pytest.raises(OSError, match="file"), run() as session:
        session.save(tmp_path / "file", wait=False)
    assert session._is_closed
    with run() as session, pytest.raises(OSError, match="file"):
        session.save(tmp_path / "file", wait=False).wait()
    with pytest.raises(KeyError, match="of the loop"), run() as session:  # noqa: PT012 - the loop is what is tested
        session.save(tmp_path / "file", wait=False)
        raise KeyError("of the loop")
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 3
    assert list(any_disk.iterdir()) == []


def test_a_bit_that_flips_in_a_clone_is_found_and_the_older_checkpoint_stays(any_disk: Path, tmp_path: Path) -> None:
    model, optimizer, session = on_disk(Case(), any_disk, checksum=True)
    with session:
        train(model, optimizer, session, range(1))
        older = session.save(tmp_path / "run")
        train(model, optimizer, session, range(1, 2))
        with gate() as writes:
            result = session.save(tmp_path / "run", wait=False)
            writes.wait_for_write()
            [cloned] = [file for file in open_files() if file.pid == os.getpid() and file.kind == CLONE]
            path = Path(f"/proc/self/fd/{cloned.descriptor}")
            for at in range(0, path.stat().st_size, 4096):  # the first record was read already
                with path.open("r+b") as file:
                    file.seek(at)
                    byte = file.read(1)
                    file.seek(at)
                    file.write(bytes([byte[0] ^ 1]))
            writes.open()
            with pytest.raises(DiskCorruptionError, match=f"{CLONE} of rank 0"):
                result.wait()
        content(older.folder)
        assert session.load(tmp_path / "run").step == 1
        train(model, optimizer, session, range(2, 3))


def test_a_save_whose_thread_cannot_be_started_is_an_error_and_gives_its_copy_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    _, _, session = Case().session("host", tmp_path)
    with session:
        before = session._runtime.ledger.held(Tier.HOST)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            with pytest.raises(RuntimeError, match="new thread"):
                session.save(tmp_path / "run", wait=False)
        assert session._runtime.ledger.held(Tier.HOST) == before
        assert session.save(tmp_path / "run").folder.name == "step-00000000"


def test_a_program_that_ends_without_closing_its_session_finishes_its_save(tmp_path: Path) -> None:
    program = """
import sys, threading
from pathlib import Path
from offload.checkpoint.format.writer import PartWriter
from tests.session.runs import Case

_, _, session = Case().session("host", Path(sys.argv[1]))
write = PartWriter.write
ending = threading.Event()
threading._register_atexit(ending.set)  # before the session ends with the program, which waits for its save

def write_at_the_end(writer):
    ending.wait()
    return write(writer)

PartWriter.write = write_at_the_end
session.save(Path(sys.argv[1]) / "run", wait=False)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=environment)
    content(tmp_path / "run")


def test_a_process_killed_while_it_is_written_leaves_the_older_checkpoint_and_no_other_bytes(
    any_disk: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), str(any_disk), str(run), KINDS[-1]], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "writing\n"
        assert beside_swap(process.pid) == {CLONE}
        process.send_signal(signal.SIGKILL)
    assert list(any_disk.iterdir()) == []
    content(run)
    model, optimizer, session = on_disk(Case(), any_disk)
    with session:
        assert session.load(run).step == 1
        train(model, optimizer, session, range(1, 2))
        assert session.save(run, keep=1).folder.name == "step-00000002"
    assert sorted(path.name for path in run.iterdir()) == [".lock", "latest", "step-00000002"]
