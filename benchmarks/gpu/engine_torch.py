"""Nothing offloaded: bf16 weights, fp32 masters and moments on the device, torch's fused AdamW."""

from typing import Any

import torch
from llama import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Engine, Losses
from torch import Tensor


def make(model: Losses, asked: dict[str, Any]) -> Engine:
    """The usual recipe of a bf16 run whose masters are fp32."""
    model.to(asked["device"])
    weights = [p for p in model.parameters() if p.requires_grad]
    masters = [torch.nn.Parameter(p.detach().float()) for p in weights]
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)

    def backward(loss: Tensor) -> None:
        loss.backward()

    @torch.no_grad()
    def step() -> None:
        for master, weight in zip(masters, weights, strict=True):
            master.grad = weight.grad.float() if weight.grad is not None else None
            weight.grad = None
        if asked["clip"]:
            torch.nn.utils.clip_grad_norm_(masters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_copy_(weights, masters)

    return Engine(model, backward, step, facts={"state": "fp32 master and moments on the device"})
