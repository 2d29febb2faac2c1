"""torchao's CPUOffloadOptimizer: weights on the device, gradients and moments on the host, all in bf16."""

from typing import Any

import torch
import torchao
from llama import LEARNING_RATE, WEIGHT_DECAY, Engine, Losses
from torch import Tensor
from torchao.optim import CPUOffloadOptimizer


def make(model: Losses, asked: dict[str, Any]) -> Engine:
    """As its documentation puts it. It has no clipping: gradients leave while backward runs."""
    if asked["clip"]:
        raise SystemExit("torchao's CPUOffloadOptimizer does not clip")
    model.to(asked["device"])
    optimizer = CPUOffloadOptimizer(
        model.parameters(), torch.optim.AdamW, offload_gradients=True, fused=True,
        lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY,
    )  # fmt: skip

    def backward(loss: Tensor) -> None:
        loss.backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    facts = {"state": "bf16 weights and moments, no master", "torchao": torchao.__version__}
    return Engine(model, backward, step, facts=facts)
