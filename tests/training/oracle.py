"""What a training run is checked against, and the homes it is run on.

Owns: an in-memory optimizer made of our own kernel, parameter by parameter; budgets for device, host and disk homes.
Does not: know anything of sessions beyond `offload.enable`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn

import offload
from offload.errors import BudgetError
from offload.kernels.adam import step_kernel
from offload.kernels.master_copy import copy_weights

HOMES: Final = ("device", "host", "disk")
PLENTY: Final = "256MiB"

LR: Final = 1e-3
EPS: Final = 1e-5
"""Larger than torch's: gradients that are zero but for rounding (attention's key bias) must not decide a step."""


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    """torch.optim.AdamW, one tensor at a time, with weight decay."""
    settings = {"lr": LR, "eps": EPS, "weight_decay": 0.05, "foreach": False} | options
    return torch.optim.AdamW(model.parameters(), **settings)


class Oracle:
    """Steps a model in memory with our kernel, with the step counts that torch keeps (one for each parameter)."""

    def __init__(self, optimizer: torch.optim.Optimizer, precision: str = "fp32") -> None:
        self.param_groups = optimizer.param_groups
        self._precision = precision
        self._kernel = step_kernel("fp32", precision)
        self._state: dict[Tensor, tuple[Tensor, Tensor, Tensor]] = {}
        self._num_steps: dict[Tensor, int] = {}
        for group in self.param_groups:
            for p in group["params"]:
                master = p.data.detach().float().clone().flatten()
                self._state[p] = (master, torch.zeros_like(master), torch.zeros_like(master))
                if precision == "bf16":
                    p.data = p.data.bfloat16()
                    copy_weights(master.numpy(), _bits(p.data), precision)

    def step(self) -> None:
        """As `optimizer.step()`."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group)

    def zero_grad(self) -> None:
        """As `optimizer.zero_grad()`."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def _step(self, p: Tensor, group: Mapping[str, Any]) -> None:
        t = self._num_steps[p] = self._num_steps.get(p, 0) + 1
        beta1, beta2 = group["betas"]
        gradient = p.grad.detach().float().contiguous().flatten().numpy()
        self._kernel(
            *(tensor.numpy() for tensor in self._state[p]), gradient, _bits(p.data), 0, group["lr"], beta1, beta2,
            group["eps"], group["weight_decay"], 1.0 - beta1**t, math.sqrt(1.0 - beta2**t), 1.0, True,
        )  # fmt: skip


def _bits(weights: Tensor) -> Any:
    assert weights.is_contiguous()
    flat = weights.detach().view(-1)
    return flat.view(torch.uint16).numpy() if flat.dtype is torch.bfloat16 else flat.numpy()


def enable(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    home: str,
    folder: Path,
    *,
    spare_device_bytes: int = 0,
    **options: Any,
) -> offload.Session:
    """`offload.enable` in fp32 on the host device, with budgets that put everything at `home`.

    `spare_device_bytes`: how much more than the smallest device budget host and disk homes get.
    """
    options = {"precision": "fp32", "device": "cpu"} | options
    if home == "device":
        return offload.enable(model, optimizer, device_memory=PLENTY, host_memory=PLENTY, **options)
    if home == "host":
        device_memory = smallest("device_memory", model, optimizer, host_memory=PLENTY, **options) + spare_device_bytes
        return offload.enable(model, optimizer, device_memory=device_memory, host_memory=PLENTY, **options)
    options["disk"] = folder
    device_memory = smallest("device_memory", model, optimizer, host_memory=PLENTY, **options) + spare_device_bytes
    host_memory = smallest("host_memory", model, optimizer, device_memory=device_memory, **options)
    return offload.enable(model, optimizer, device_memory=device_memory, host_memory=host_memory, **options)


def smallest(budget: str, model: nn.Module, optimizer: torch.optim.Optimizer | None, **options: Any) -> int:
    """The smallest value of this budget, as the error for a budget of one byte names it."""
    with pytest.raises(BudgetError) as raised:
        offload.enable(model, optimizer, **{budget: 1}, **options)
    found = re.search(rf"smallest {budget}\b.*? is (\d+) bytes", str(raised.value))
    assert found is not None, str(raised.value)
    return int(found[1])


def run_steps(model: nn.Module, optimizer: Any, batches: Iterable[Mapping[str, Tensor]]) -> list[float]:
    """Losses of the ordinary loop over models that return an object with a loss."""
    losses = []
    for batch in batches:
        output = model(**batch)
        loss = output.loss if hasattr(output, "loss") else output
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal names and bits; the message names the tensors that differ."""
    assert found.keys() == expected.keys()
    differ = [name for name in found if not torch.equal(found[name].cpu(), expected[name].cpu())]
    assert not differ, f"{len(differ)} of {len(found)} differ: {differ[:5]}"


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], atol: float) -> None:
    """Equal names, values within `atol`."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
