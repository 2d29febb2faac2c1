"""Runs to be saved and loaded: models with all that a checkpoint must hold, optimizers, and the bits of an outcome.

Owns: these. Does not: save or load.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import offload
from tests.training.models import gpt, seeded, tokens
from tests.training.oracle import enable

SINGLE = {"foreach": False}


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
    """Parameters of several chunks, and chunks of several parameters."""
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
