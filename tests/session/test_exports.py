"""What others open: folders of transformers and of torch.distributed.checkpoint, and torch's own state_dict."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.session.runs import OPTIMIZERS, SINGLE, Case, mixed, outcome, train
from tests.training.models import HF_MODELS, hf_batch, seeded
from tests.training.oracle import assert_same_bits, enable


@pytest.fixture(autouse=True)
def syncs_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)


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
