"""Runs of both devices: a model, budgets that put everything at one home, losses and weights.

Owns: these. Does not: know streams (the tests do).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import offload
from tests.training.models import VOCAB, gpt, hf_batch, llama, seeded, tokens
from tests.training.oracle import adamw, enable

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Tensor]]]] = {
    "gpt": (lambda: gpt(width=64, depth=4), lambda seed: {"tokens": tokens(seed)}),
    "tied gpt": (lambda: gpt(tied=True), lambda seed: {"tokens": tokens(seed)}),
    "llama": (lambda: seeded(llama), lambda seed: hf_batch("llama", seed)),
}


@dataclass(frozen=True)
class Outcome:
    """Of a run."""

    losses: list[float]
    sha256: str
    metrics: dict[str, Any]


def on(device: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch there."""
    return {name: value.to(device) for name, value in batch.items()}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of a model that returns it or an object with it."""
    output = model(**batch)
    loss: Tensor = output.loss if hasattr(output, "loss") else output
    return loss


def train(
    name: str, device: str, home: str, folder: Path, *, steps: int = 4, micro_batches: int = 1, **options: Any
) -> Outcome:
    """Steps of a model whose weights, gradients and state are at this home."""
    build, batch_of = MODELS[name]
    model = build()
    optimizer = adamw(model)
    losses = []
    session = enable(model, optimizer, home, folder, device=device, **options)
    try:
        for step in range(steps):
            for micro in range(micro_batches):
                loss = loss_of(model, on(device, batch_of(100 * step + micro)))
                loss.backward()
            losses.append(loss)
            optimizer.step()
            optimizer.zero_grad()
        # On an accelerator a loss is read only here: reading one waits, and would hide what runs too early.
        return Outcome([loss.item() for loss in losses], session.weights_sha256(), session.metrics())
    finally:
        session.close(give_back=False)


def in_memory(name: str, device: str, *, steps: int = 4) -> list[float]:
    """The same steps by torch alone, in fp32."""
    build, batch_of = MODELS[name]
    model = build().to(device)
    optimizer = adamw(model)
    losses = []
    for step in range(steps):
        loss = loss_of(model, on(device, batch_of(100 * step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def deep_mlp(width: int, depth: int) -> nn.Sequential:
    """For runs of many steps: `depth` partitions of width², and a head; takes (batch, width)."""

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)))

    model = seeded(build)
    assert isinstance(model, nn.Sequential)
    return model


def mlp_session(
    width: int, depth: int, device: str, *, device_memory: int | str, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, offload.Session]:
    """A deep MLP in a session, with everything at home on the host that device_memory does not hold."""
    model = deep_mlp(width, depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"host_memory": "512MiB", "precision": "bf16", "accumulate": 1} | options
    return model, optimizer, offload.enable(model, optimizer, device=device, device_memory=device_memory, **options)


def mlp_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """One; the loss is not read."""
    loss: Tensor = model(x).float().square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


__all__ = ["MODELS", "VOCAB", "Outcome", "deep_mlp", "in_memory", "loss_of", "mlp_session", "mlp_step", "on", "train"]
