"""Saved on one home and loaded on another, a run goes on with the same bits; what is refused changes nothing."""

import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import offload
from offload.checkpoint.format.errors import CheckpointError, CorruptCheckpointError
from offload.errors import ConfigError, DiskFullError, SessionFailedError, UnsupportedOptimizerError
from offload.units import MIB, Tier
from tests.checkpoint.syscalls import Syscalls
from tests.session.runs import SINGLE, Case, batch, mixed, outcome, train, wide
from tests.training.models import gpt, mlp
from tests.training.oracle import HOMES, assert_same_bits, enable


@pytest.fixture(autouse=True)
def syncs_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)


@pytest.mark.parametrize(
    ("case", "saved_at", "loaded_at"),
    [
        (Case(), "disk", "host"),
        (Case(), "host", "device"),
        (Case(), "device", "disk"),
        (Case(precision="bf16"), "disk", "disk"),
        (Case(precision="bf16"), "host", "device"),  # split masters there, plain ones here
        (Case(precision="bf16"), "device", "disk"),
        (Case(precision="fp16"), "disk", "device"),
        (Case(state_dtype="bf16"), "host", "disk"),
        (Case(state_dtype="8bit", precision="bf16"), "disk", "host"),
        (Case(state_dtype="8bit", model=wide), "host", "disk"),
        (Case(precision="bf16", model=wide), "disk", "host"),
        (Case("amsgrad"), "host", "disk"),
        (Case("sgd"), "disk", "host"),
        (Case("lion", "bf16"), "host", "disk"),
        (Case("adagrad"), "disk", "device"),
        (Case("nadam"), "disk", "host"),
        (Case("adafactor"), "host", "disk"),
        (Case("muon"), "device", "disk"),
        (Case(model=mixed), "disk", "device"),
        (Case(model=mixed, precision="bf16"), "host", "disk"),
    ],
    ids=lambda value: (
        "-".join(map(str, (value.optimizer, value.precision, value.state_dtype, value.model.__name__)))
        if isinstance(value, Case)
        else value
    ),
)
def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(
    case: Case, saved_at: str, loaded_at: str, tmp_path: Path, seed: int
) -> None:
    model, optimizer, session = case.session(saved_at, tmp_path)
    with session:
        torch.manual_seed(seed)
        train(model, optimizer, session, range(2))
        saved = session.save(tmp_path / "run", extra={"next": 2})
        assert saved.folder.name == "step-00000002"
        train(model, optimizer, session, range(2, 4))
        expected = outcome(model, session)
        calls = getattr(model, "calls", 0)
    model, optimizer, session = case.session(loaded_at, tmp_path)
    with session:
        train(model, optimizer, session, range(7, 8))  # state, buffers and options of its own, and a gradient
        session.backward(model(batch(model, 8)))
        loaded = session.load(tmp_path / "run")
        assert (loaded.step, loaded.extra, loaded.exact, loaded.notes) == (2, {"next": 2}, True, ())
        assert all(parameter.grad is None for parameter in model.parameters())
        train(model, optimizer, session, range(2, 4))
        assert_same_bits(outcome(model, session), expected)
        assert getattr(model, "calls", 0) == calls


@pytest.mark.parametrize("loaded_at", HOMES)
def test_moments_that_were_never_stepped_are_saved_as_the_zeros_they_are(loaded_at: str, tmp_path: Path) -> None:
    case = Case(precision="bf16")
    model, optimizer, session = case.session("disk", tmp_path)
    with session:
        session.save(tmp_path / "run")
        train(model, optimizer, session, range(2))
        expected = outcome(model, session)
    model, optimizer, session = case.session(loaded_at, tmp_path)
    with session:
        session.load(tmp_path / "run")
        train(model, optimizer, session, range(2))
        assert_same_bits(outcome(model, session), expected)


def test_the_loss_scale_of_fp16_goes_on_where_it_was(tmp_path: Path) -> None:
    case = Case(precision="fp16")
    model, optimizer, session = case.session("host", tmp_path)
    with session:
        session.backward(model(batch(model, 0)) * 1e30)
        assert session.step().skipped
        optimizer.zero_grad()
        train(model, optimizer, session, range(1))
        saved = session.save(tmp_path / "run")
        assert saved.folder.name == "step-00000001", "a skipped step is not counted"
        session.backward(model(batch(model, 1)))
        expected = session.step().loss_scale
    model, optimizer, session = case.session("host", tmp_path)
    with session:
        session.load(tmp_path / "run")
        session.backward(model(batch(model, 1)))
        assert session.step().loss_scale == expected == 2.0**15


@pytest.mark.parametrize("home", HOMES)
def test_a_session_without_an_optimizer_takes_the_trained_weights(home: str, tmp_path: Path) -> None:
    case = Case(model=mixed, precision="bf16")
    model, optimizer, session = case.session("host", tmp_path)
    with session:
        train(model, optimizer, session, range(2))
        session.save(tmp_path / "run")
        expected = session.weights_sha256()
    model = mixed()
    with enable(model, None, home, tmp_path, precision="bf16") as session:
        loaded = session.load(tmp_path / "run")
        assert session.weights_sha256() == expected
        assert any("trainable in the checkpoint, frozen now" in note for note in loaded.notes)


def test_moments_in_another_encoding_are_rounded_with_a_note_and_widened_without(tmp_path: Path) -> None:
    model, optimizer, session = Case().session("host", tmp_path)
    with session:
        train(model, optimizer, session, range(2))
        exact = outcome(model, session)
        session.save(tmp_path / "fp32")
    model, optimizer, session = Case(state_dtype="8bit").session("disk", tmp_path)
    with session:
        loaded = session.load(tmp_path / "fp32")
        assert not loaded.exact
        assert any("rounded" in note and "exp_avg" in note for note in loaded.notes)
        rounded = outcome(model, session)
        session.save(tmp_path / "8bit")
    torch.testing.assert_close(rounded["0.exp_avg"], exact["0.exp_avg"], rtol=0.1, atol=1e-3)
    assert_same_bits({"w": rounded["sha256"]}, {"w": exact["sha256"]})
    model, optimizer, session = Case().session("host", tmp_path)
    with session:
        assert session.load(tmp_path / "8bit").exact
        assert_same_bits(outcome(model, session), rounded)


def test_the_random_states_of_torch_numpy_and_python_are_restored(tmp_path: Path) -> None:
    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    _, _, session = Case().session("host", tmp_path)
    with session:
        session.save(tmp_path / "run")
        drawn = draw()
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        session.load(tmp_path / "run")
        assert draw() == drawn


# ------------------------------------------------------------------------------------------------------ refusals


def damage(folder: Path) -> None:
    """One bit in the middle of the last tensor file: of a state tensor, not of user data."""
    path = sorted(folder.glob("*.safetensors"))[-1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def save_run(case: Case, folder: Path) -> Path:
    """A checkpoint of two steps."""
    model, optimizer, session = case.session("host", folder)
    with session:
        train(model, optimizer, session, range(2))
        return session.save(folder / "run").folder


@pytest.mark.parametrize("home", HOMES)
def test_a_refused_load_leaves_weights_moments_options_and_random_states_as_they_were(
    home: str, tmp_path: Path
) -> None:
    damage(save_run(Case(), tmp_path))
    save_run(Case(model=mixed), tmp_path / "other")
    model, optimizer, session = Case().session(home, tmp_path)
    with session:
        train(model, optimizer, session, range(3))
        before, randoms = outcome(model, session), torch.get_rng_state()
        with pytest.raises(CorruptCheckpointError, match="checksum"):
            session.load(tmp_path / "run")
        with pytest.raises(CheckpointError, match=r"other groups of parameters|of another model"):
            session.load(tmp_path / "other" / "run")
        with pytest.raises(CheckpointError, match="no checkpoint"):
            session.load(tmp_path / "nowhere")
        assert_same_bits(outcome(model, session), before)
        assert torch.equal(torch.get_rng_state(), randoms)
        train(model, optimizer, session, range(3, 4))


def test_another_optimizer_is_refused_unless_asked_for_and_then_the_options_stay(tmp_path: Path) -> None:
    save_run(Case(), tmp_path)
    model = gpt()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5, **SINGLE)
    with enable(model, optimizer, "host", tmp_path) as session:
        with pytest.raises(CheckpointError, match=r"optimizer AdamW, this session has Adam.*strict=False"):
            session.load(tmp_path / "run")
        loaded = session.load(tmp_path / "run", strict=False)
        assert "options of the optimizer stay" in loaded.notes[0]
        assert optimizer.param_groups[0]["lr"] == 0.5


def test_options_that_need_moments_which_are_not_kept_are_refused(tmp_path: Path) -> None:
    save_run(Case("amsgrad"), tmp_path)
    _, optimizer, session = Case().session("host", tmp_path)
    with session:
        with pytest.raises(UnsupportedOptimizerError, match="max_exp_avg_sq"):
            session.load(tmp_path / "run")
        assert not optimizer.param_groups[0]["amsgrad"]


def seal(manifest: dict[str, Any]) -> str:
    """The file of an edited manifest, with its checksum."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return json.dumps({"checksum": zlib.crc32(text.encode()), "manifest": manifest})


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("random", "python"), []),
        (("random", "numpy", "state"), []),
        (("optimizer",), {}),
        (("optimizer",), []),
        (("optimizer", "groups"), None),
        (("optimizer", "groups", 0, "options"), "x"),
        (("modules",), []),
    ],
)
def test_options_and_random_states_that_make_no_sense_are_refused_and_change_nothing(
    keys: tuple[str | int, ...], value: object, tmp_path: Path
) -> None:
    path = save_run(Case(), tmp_path) / "manifest.json"
    manifest = json.loads(path.read_text())["manifest"]
    *above, last = keys
    holder = manifest["rank_extra"][0]
    for key in above:
        holder = holder[key]
    holder[last] = value
    path.write_text(seal(manifest))
    model, optimizer, session = Case().session("host", tmp_path)
    with session:
        before, randoms = outcome(model, session), (random.getstate(), torch.get_rng_state().tolist())
        with pytest.raises(CheckpointError, match=r"cannot be used|that these versions take|no dictionary"):
            session.load(tmp_path / "run")
        assert (random.getstate(), torch.get_rng_state().tolist()) == randoms
        assert_same_bits(outcome(model, session), before)
        train(model, optimizer, session, range(1))


@pytest.mark.parametrize("step", [-1, 1.0, True, 1 << 60])
def test_a_step_that_is_no_count_is_refused_before_a_byte_is_written(step: object, tmp_path: Path) -> None:
    _, _, session = Case().session("host", tmp_path)
    with session:
        with pytest.raises(ConfigError, match="step="):
            session.save(tmp_path / "run", step=step)
        assert not (tmp_path / "run").exists()


def test_what_cannot_be_saved_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    _, _, session = Case().session("host", tmp_path)
    with session:
        with pytest.raises(CheckpointError, match=r"extra\['when'\]"):
            session.save(tmp_path / "run", extra={"when": object()})
        with pytest.raises(ConfigError, match="step="):
            session.save(tmp_path / "run", step=-1)
        with pytest.raises(ConfigError, match="keep="):
            session.save(tmp_path / "run", keep=0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("home", ["host", "disk"])
def test_a_disk_that_is_full_keeps_the_old_checkpoint_and_the_run_alive(home: str, tmp_path: Path) -> None:
    model, optimizer, session = Case().session(home, tmp_path)
    with session:
        train(model, optimizer, session, range(4))
        expected = outcome(model, session)
    model, optimizer, session = Case().session(home, tmp_path)
    with session:
        train(model, optimizer, session, range(2))
        session.save(tmp_path / "run")
        train(model, optimizer, session, range(2, 3))
        kept = []
        for at in range(0, 40, 3):
            calls = Syscalls(tmp_path / "run", full_at=at)
            with calls.watched():
                try:
                    session.save(tmp_path / "run")
                except DiskFullError as error:
                    kept.append(error)  # whoever keeps it must not keep the session's memory with it
        assert len(kept) >= 3
        train(model, optimizer, session, range(3, 4))
        assert_same_bits(outcome(model, session), expected)
    model, optimizer, session = Case().session(home, tmp_path)
    with session:
        session.load(tmp_path / "run" / "step-00000002")
        train(model, optimizer, session, range(2, 4))
        assert_same_bits(outcome(model, session), expected)


def test_a_load_that_fails_midway_fails_the_session(tmp_path: Path) -> None:
    """Scenario: a module that refuses its own state, after the weights were taken over."""
    save_run(Case(model=mixed), tmp_path)
    model, _, session = Case(model=mixed).session("host", tmp_path)
    with session:
        model.set_extra_state = lambda state: state["not there"]
        with pytest.raises(KeyError):
            session.load(tmp_path / "run")
        with pytest.raises(SessionFailedError, match="ended midway"):
            session.weights_sha256()


def test_between_a_backward_that_steps_and_its_step_nothing_is_saved(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), **SINGLE)
    with offload.enable(
        model, optimizer, device="cpu", precision="fp32", device_memory="1GiB", accumulate=1, overlap="backward"
    ) as session:
        model(torch.ones(2, 64)).sum().backward()
        with pytest.raises(ConfigError, match=r"call step\(\) first"):
            session.save(tmp_path / "run")
        optimizer.step()
        session.save(tmp_path / "run")


# ---------------------------------------------------------------------------------------------- beside training


def test_a_save_beside_training_holds_what_was_there_when_it_was_asked_for(tmp_path: Path) -> None:
    model, optimizer, session = Case().session("device", tmp_path)
    with session:
        train(model, optimizer, session, range(2))
        before = session.metrics()["peak_bytes"][Tier.HOST]
        first = session.save(tmp_path / "a", wait=False)
        train(model, optimizer, session, range(2, 4))
        second = session.save(tmp_path / "b", wait=False)
        expected = outcome(model, session)
        assert (first.folder.name, second.folder.name) == ("step-00000002", "step-00000004")
        assert first.durable
        assert second.durable
        held = session.metrics()["peak_bytes"][Tier.HOST]
        assert held <= session.metrics()["budget_bytes"][Tier.HOST]
        assert held >= before + sum(p.numel() * 12 for p in model.parameters()), "the copy is charged"
        session.load(tmp_path / "a")
        train(model, optimizer, session, range(2, 4))
        assert_same_bits(outcome(model, session), expected)


def test_a_copy_that_does_not_fit_the_budget_is_saved_at_once(tmp_path: Path) -> None:
    model, optimizer, session = Case().session("disk", tmp_path)
    with session:
        train(model, optimizer, session, range(1))
        assert session.save(tmp_path / "run", wait=False).durable


# ------------------------------------------------------------------------------------------------------- memory


def test_with_state_on_disk_saving_and_loading_take_at_most_64_mib_above_training(tmp_path: Path) -> None:
    """A few staging buffers and buffers: far less than the state, which one copy of would show."""
    script = Path(__file__).with_name("measure_checkpoint.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    peaks = measured["peak_rss_bytes"]
    assert measured["state_on_disk_bytes"] >= 128 * MIB
    assert measured["host_peak_bytes"] <= measured["host_budget_bytes"]
    for name in ("save", "load", "export"):
        assert peaks[name] <= peaks["train"] + 64 * MIB, f"{name}: {peaks}"
