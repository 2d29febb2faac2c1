"""Six Hugging Face models: what torch.optim.AdamW gives, bit for bit what our kernel gives in memory, on every home."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload.units import Tier
from tests.training.models import HF_MODELS, hf_batch, seeded
from tests.training.oracle import (
    HOMES,
    Oracle,
    adamw,
    assert_close,
    assert_same_bits,
    enable,
    run_steps,
    weights_of,
)

NUM_STEPS = 3
CHECKPOINTING = ["whole", "non-reentrant", "reentrant"]


def build(name: str, checkpointing: str = "whole") -> nn.Module:
    model = seeded(HF_MODELS[name])
    if checkpointing != "whole":
        reentrant = checkpointing == "reentrant"
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:  # else no input of the first block needs a gradient, and torch warns that it has none
            model.enable_input_require_grads()
    return model


def batches(name: str) -> list[dict[str, torch.Tensor]]:
    return [hf_batch(name, seed) for seed in range(NUM_STEPS)]


def run_on(
    home: str, name: str, checkpointing: str, folder: Path, **options: Any
) -> tuple[list[float], str, nn.Module]:
    """Losses, hash and the model after NUM_STEPS on one home."""
    model = build(name, checkpointing)
    optimizer = adamw(model)
    with enable(model, optimizer, home, folder, **options) as session:
        losses = run_steps(model, optimizer, batches(name))
        digest = session.weights_sha256()
        homes = session.plan.bytes_by_kind_and_tier
    assert homes["state"][Tier(home)] == max(homes["state"].values()), homes
    return losses, digest, model


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("name", HF_MODELS)
def test_three_steps_give_what_torch_gives_and_the_bits_of_our_kernel_on_every_home(
    name: str, checkpointing: str, tmp_path: Path
) -> None:
    in_torch, in_memory = build(name, checkpointing), build(name, checkpointing)
    optimizer = adamw(in_torch)
    expected_losses = run_steps(in_torch, optimizer, batches(name))
    oracle_losses = run_steps(in_memory, Oracle(adamw(in_memory)), batches(name))
    hashes = set()
    for home in HOMES if checkpointing == "whole" else ("disk",):
        losses, digest, model = run_on(home, name, checkpointing, tmp_path)
        hashes.add(digest)
        assert losses == oracle_losses, home
        assert losses == pytest.approx(expected_losses, abs=1e-5, rel=0)
        assert_same_bits(weights_of(model), weights_of(in_memory))
        assert_close(weights_of(model), weights_of(in_torch), atol=1e-5)
    assert len(hashes) == 1


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("name", HF_MODELS)
def test_every_gradient_has_the_bits_that_it_has_in_torch(name: str, checkpointing: str, tmp_path: Path) -> None:
    in_torch, model = build(name, checkpointing), build(name, checkpointing)
    for batch in batches(name)[:2]:  # the second adds to the first
        in_torch(**batch).loss.backward()
    with enable(model, adamw(model), "disk", tmp_path) as session:
        for batch in batches(name)[:2]:
            model(**batch).loss.backward()
        gradients = session.gathered_gradients()
    assert_same_bits(gradients, {n: p.grad for n, p in in_torch.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("name", HF_MODELS)
def test_in_bf16_every_home_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    runs = [run_on(home, name, "whole", tmp_path, precision="bf16") for home in HOMES]
    assert len({digest for _, digest, _ in runs}) == 1
    assert runs[0][0] == runs[1][0] == runs[2][0]
    for _, _, model in runs[1:]:
        assert_same_bits(weights_of(model), weights_of(runs[0][2]))  # fp32: from the masters


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_clipping_gives_the_same_bits_on_every_home(name: str, tmp_path: Path) -> None:
    runs = [run_on(home, name, "whole", tmp_path, max_grad_norm=0.1) for home in HOMES]
    assert len({digest for _, digest, _ in runs}) == 1
