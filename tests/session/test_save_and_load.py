"""Saved on one home and loaded on another, a run goes on with the same bits; what is refused changes nothing."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import offload
from offload.checkpoint.errors import CheckpointError, CorruptCheckpointError
from offload.errors import ConfigError, DiskFullError, SessionFailedError, UnsupportedOptimizerError
from offload.units import MIB, Tier
from tests.checkpoint.syscalls import Syscalls
from tests.training.models import HF_MODELS, gpt, hf_batch, mlp, seeded, tokens
from tests.training.oracle import HOMES, assert_same_bits, enable

SINGLE = {"foreach": False}


@pytest.fixture(autouse=True)
def syncs_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)


class Mixed(nn.Module):
    """Dropout, statistics in buffers, a tied, a frozen and an integer parameter, and state of a module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.last.weight = self.first.weight
        self.norm = nn.BatchNorm1d(32)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.table = nn.Parameter(torch.arange(5), requires_grad=False)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(self.dropout(self.norm(self.frozen(self.first(x))))).square().mean()

    def get_extra_state(self) -> Any:
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


def mixed() -> nn.Module:
    return seeded(Mixed)


def wide() -> nn.Module:
    """Parameters of several pieces, and pieces of several parameters."""
    return gpt(width=192, depth=1)


def batch(model: nn.Module, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return tokens(seed) if hasattr(model, "embedding") else torch.randn(8, 32, generator=rng)


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Two groups, and a learning rate that the loop changes."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1 and p.is_floating_point()]
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0, "lr": 3e-3}]
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, **SINGLE, **options)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "amsgrad": lambda m: adamw(m, amsgrad=True),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, dampening=0.1, **SINGLE),
    "lion": lambda m: offload.optim.Lion(m.parameters(), lr=1e-3, weight_decay=0.1),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2, initial_accumulator_value=0.1, **SINGLE),
    "nadam": lambda m: torch.optim.NAdam(m.parameters(), lr=1e-3, **SINGLE),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2, **SINGLE),
    "muon": lambda m: torch.optim.Muon([p for p in m.parameters() if p.ndim == 2], lr=1e-2),
}


@dataclass
class Case:
    """One way to train."""

    optimizer: str = "adamw"
    precision: str = "fp32"
    state_dtype: str = "fp32"
    model: Callable[[], nn.Module] = gpt

    def session(self, home: str, folder: Path) -> tuple[nn.Module, torch.optim.Optimizer, offload.Session]:
        model = self.model()
        optimizer = OPTIMIZERS[self.optimizer](model)
        options = {"precision": self.precision, "state_dtype": self.state_dtype, "max_grad_norm": 1.0}
        return model, optimizer, enable(model, optimizer, home, folder, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, session: offload.Session, steps: range) -> None:
    """The rate falls with every step, so options that were not loaded show."""
    for number in steps:
        session.backward(model(batch(model, number)))
        session.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9


def outcome(model: nn.Module, session: offload.Session) -> dict[str, Tensor]:
    """Weights, moments and buffers, flat."""
    state = session.state_dict()
    found = {f"model.{name}": value for name, value in state["model"].items() if isinstance(value, Tensor)}
    for index, kept in state["optimizer"]["state"].items():
        found |= {f"{index}.{name}": torch.as_tensor(value) for name, value in kept.items()}
    found["sha256"] = torch.tensor(bytearray.fromhex(session.weights_sha256()))
    found["lr"] = torch.tensor([group["lr"] for group in state["optimizer"]["param_groups"]])
    return found


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
    """One bit in the middle of the last tensor file: of a plane, not of user data."""
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


def test_a_save_beside_training_that_fails_is_told_where_its_result_is_read_or_logged_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    _, _, session = Case().session("device", tmp_path)
    with session:
        result = session.save(tmp_path / "file", wait=False)
        with pytest.raises(OSError, match="file"):
            result.wait()
        session.save(tmp_path / "file", wait=False)
    assert [record.levelname for record in caplog.records] == ["ERROR"]


# ------------------------------------------------------------------------------------------------------- memory


def test_with_state_on_disk_saving_and_loading_take_at_most_64_mib_above_training(tmp_path: Path) -> None:
    """A few slabs and buffers: far less than the state, which one copy of would show."""
    script = Path(__file__).with_name("measure_checkpoint.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    peaks = measured["peak_rss_bytes"]
    assert measured["state_on_disk_bytes"] >= 128 * MIB
    assert measured["host_peak_bytes"] <= measured["host_budget_bytes"]
    for name in ("save", "load", "export"):
        assert peaks[name] <= peaks["train"] + 64 * MIB, f"{name}: {peaks}"


# --------------------------------------------------------------------------------------------- for other programs


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=inputs).logits.float()


@pytest.mark.parametrize(("name", "precision"), [("llama", "fp32"), ("gpt2", "fp32"), ("llama", "bf16")])
def test_an_exported_folder_opens_with_transformers_and_gives_the_same_logits(
    name: str, precision: str, tmp_path: Path
) -> None:
    model, inputs = seeded(HF_MODELS[name]), hf_batch(name, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **SINGLE)
    dtype = None if precision == "fp32" else precision
    with enable(model, optimizer, "disk", tmp_path, precision=precision) as session:
        model(**inputs).loss.backward()
        optimizer.step()
        session.export(tmp_path / "out", dtype=dtype)
        inside = logits(model, inputs["input_ids"])
    model.config.save_pretrained(tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=getattr(torch, {"bf16": "bfloat16"}.get(precision, "float32"))
    )
    assert torch.equal(logits(opened, inputs["input_ids"]), inside)
    if precision == "fp32":
        assert torch.equal(logits(opened, inputs["input_ids"]), logits(model, inputs["input_ids"]))


@pytest.mark.parametrize("format", ["hf", "dcp"])
def test_what_was_exported_can_be_loaded_again(format: str, tmp_path: Path) -> None:
    case = Case()
    model, optimizer, session = case.session("disk", tmp_path)
    with session:
        train(model, optimizer, session, range(2))
        session.export(tmp_path / "out", format)
        expected = outcome(model, session)
    model, optimizer, session = case.session("host", tmp_path)
    with session:
        train(model, optimizer, session, range(3, 4))
        loaded = session.load(tmp_path / "out")
        found = outcome(model, session)
        kept = [name for name in found if name.startswith("model.") or (format == "dcp" and name[0].isdigit())]
        assert_same_bits({name: found[name] for name in kept}, {name: expected[name] for name in kept})
        assert loaded.exact == (format == "dcp")
        if format == "hf":
            assert found["0.step"] == 0
            assert not found["0.exp_avg"].any()


@pytest.mark.parametrize(
    "case", [Case(), Case("nadam"), Case("sgd", "bf16"), Case(model=mixed)], ids=lambda c: c.optimizer
)
def test_the_state_dict_is_that_of_model_and_optimizer_after_the_session(case: Case, tmp_path: Path) -> None:
    model, optimizer, session = case.session("disk", tmp_path)
    with session:
        train(model, optimizer, session, range(2))
        state = session.state_dict()
        assert session.state_dict(optimizer=False).keys() == {"model"}
    assert_same_bits(
        {n: v for n, v in state["model"].items() if isinstance(v, Tensor)},
        {n: v for n, v in model.state_dict().items() if isinstance(v, Tensor)},
    )
    after = optimizer.state_dict()
    assert state["optimizer"]["param_groups"] == after["param_groups"]
    assert state["optimizer"]["state"].keys() == after["state"].keys()
    for index, kept in after["state"].items():
        found = state["optimizer"]["state"][index]
        assert_same_bits(
            {n: torch.as_tensor(v) for n, v in found.items()}, {n: torch.as_tensor(v) for n, v in kept.items()}
        )
    plain = case.model()
    plain.load_state_dict(state["model"], strict=True)
    OPTIMIZERS[case.optimizer](plain).load_state_dict(state["optimizer"])
