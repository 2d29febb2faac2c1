"""Damaged checkpoints: what to do is said once and alike, and an older whole one is taken where that is asked for."""

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
import torch
from torch import nn

import offload
from offload.checkpoint.format.errors import CheckpointError, CorruptCheckpointError
from offload.checkpoint.format.folder import complete
from offload.cli.main import main
from tests.training.models import mlp
from tests.training.oracle import adamw, assert_same_bits, enable
from tests.trust.test_signals import step

STEPS: Final = 3


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x81
    path.write_bytes(bytes(content))


def tensor_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


DAMAGE: Final[dict[str, Callable[[Path], None]]] = {
    "a byte of a value": lambda folder: flip(tensor_file(folder), -5),
    "a byte of a header": lambda folder: flip(tensor_file(folder), 20),
    "a short file": lambda folder: tensor_file(folder).write_bytes(tensor_file(folder).read_bytes()[:-1]),
    "a missing file": lambda folder: tensor_file(folder).unlink(),
    "a byte of the manifest": lambda folder: flip(folder / "manifest.json", 300),
    "a manifest that is cut": lambda folder: (folder / "manifest.json").write_bytes(b'{"checksum": 1, "manifest'),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "no folder": shutil.rmtree,
    "a latest that names nothing": lambda folder: (folder.parent / "latest").write_text("step-x\n"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict[str, torch.Tensor]]]]:
    """A run of three checkpoints, and the weights of each."""
    root = tmp_path_factory.mktemp("good") / "run"
    model = mlp()
    optimizer = adamw(model)
    weights = []
    with enable(model, optimizer, "host", root) as session:
        for _ in range(STEPS):
            step(model, optimizer)
            session.save(root)
            weights.append(session.state_dict(optimizer=False)["model"])
    yield root, weights


@pytest.fixture
def session() -> Iterator[offload.Session]:
    model = mlp()
    optimizer = adamw(model)
    with offload.enable(model, optimizer, device="cpu", precision="fp32", device_memory="64MiB") as made:
        yield made


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_error_is_short_and_says_what_to_do_and_the_previous_one_is_taken_on_request(
    damage: str, good: tuple[Path, list[dict[str, torch.Tensor]]], session: offload.Session, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    root = tmp_path / "run"
    shutil.copytree(good[0], root)
    newest = root / f"step-{STEPS:08d}"
    DAMAGE[damage](newest)
    with pytest.raises(CorruptCheckpointError) as raised:
        session.load(root)
    message = str(raised.value)
    assert len(message) < 800, message
    assert "\n" not in message
    assert message.count("; give one of these instead: ") == 1, message
    assert 'or on_corrupt="previous"' in message
    assert "step-00000001, step-00000002" in message
    with caplog.at_level(logging.WARNING, "offload"):
        loaded = session.load(root, on_corrupt="previous")
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(message)
    taken = STEPS if "latest" in damage else STEPS - 1  # that one is whole
    assert warning.endswith(f"The one of step {taken}, step-{taken:08d}, is loaded instead.")
    assert loaded.step == taken
    assert loaded.exact
    assert_same_bits(session.state_dict(optimizer=False)["model"], good[1][taken - 1])


def test_all_that_are_damaged_are_passed_over_and_the_last_error_is_that_of_the_first(
    good: tuple[Path, list[dict[str, torch.Tensor]]], session: offload.Session, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    root = tmp_path / "run"
    shutil.copytree(good[0], root)
    for number in (3, 2):
        flip(tensor_file(root / f"step-{number:08d}"), -5)
    assert session.load(root, on_corrupt="previous").step == 1
    assert len(caplog.records) == 1
    flip(tensor_file(root / "step-00000001"), -5)
    with pytest.raises(CorruptCheckpointError, match="step-00000003"):
        session.load(root, on_corrupt="previous")
    step(session.model, session.optimizer)  # the session goes on


def test_only_older_ones_stand_in_for_a_checkpoint_that_is_named(
    good: tuple[Path, list[dict[str, torch.Tensor]]], session: offload.Session, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(good[0], root)
    flip(tensor_file(root / "step-00000002"), -5)
    assert session.load(root / "step-00000002", on_corrupt="previous").step == 1


def test_what_is_not_damage_is_raised_all_the_same(
    good: tuple[Path, list[dict[str, torch.Tensor]]], session: offload.Session, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        session.load(tmp_path, on_corrupt="previous")
    with pytest.raises(
        offload.errors.ConfigError, match="on_corrupt='older' is unknown; use one of 'raise', 'previous'"
    ):
        session.load(good[0], on_corrupt="older")
    other = nn.Linear(4, 4)
    with (
        offload.enable(other, adamw(other), device="cpu", device_memory="64MiB") as another,
        pytest.raises(CheckpointError) as raised,
    ):
        another.load(good[0], on_corrupt="previous")
    assert not isinstance(raised.value, CorruptCheckpointError)


def test_resume_goes_on_from_the_newest_whole_checkpoint_and_never_begins_anew_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    command = ["train", "--params", "150k", "--batch", "1", "--seq", "16", "--device-memory", "64MiB", "--host-memory",
               "64MiB", "--checkpoint", str(run), "--checkpoint-every", "1", "--resume", "--steps"]  # fmt: skip
    assert main([*command, "2"]) == 0
    flip(tensor_file(run / "step-00000002"), -5)
    capsys.readouterr()
    assert main([*command, "3"]) == 0
    assert "going on after step 1 of 3" in capsys.readouterr().out
    assert len([record for record in caplog.records if "step-00000002" in record.getMessage()]) == 1
    for folder in complete(run):
        (folder / "manifest.json").unlink()
    assert main([*command, "4"]) != 0
    assert "step-00000003" in capsys.readouterr().err
