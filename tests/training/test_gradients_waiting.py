"""Gradients wait for their copy as autograd made them: of one partition, no longer than until another one's come, and
each contribution of a parameter that comes several times is added on its own."""

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import offload

PARAMETERS = 3
BLOCKS = 6


class Alive:
    """Gradients that are in memory, by block."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.seen: list[set[int]] = []

    def gradient(self, block: int, numel: int) -> Tensor:
        values = np.full(numel, 1.0, np.float32)  # its tensor keeps it alive, whoever holds that
        self.blocks.append(block)
        weakref.finalize(values, self.blocks.remove, block)
        return torch.from_numpy(values)


class _Work(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int, alive: Alive, *parameters: Tensor) -> Tensor:
        ctx.block, ctx.alive, ctx.numels = block, alive, [p.numel() for p in parameters]
        return x + parameters[0][0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.alive.seen.append(set(ctx.alive.blocks))
        return gradients[0] * 1, None, None, *(ctx.alive.gradient(ctx.block, numel) for numel in ctx.numels)


class Block(nn.Module):
    """One parameter of it is never used, so its gradient is never complete, unless all are."""

    def __init__(self, number: int, alive: Alive, *, used: int) -> None:
        super().__init__()
        self.number, self.alive, self.used = number, alive, used
        for index in range(PARAMETERS):
            self.register_parameter(f"p{index}", nn.Parameter(torch.zeros(64)))

    def forward(self, x: Tensor) -> Tensor:
        chosen = list(self._parameters.values())[: self.used]
        return _Work.apply(x, self.number, self.alive, *chosen)


def seen_in_backward(used: int) -> list[set[int]]:
    alive = Alive()
    model = nn.Sequential(*(Block(number, alive, used=used) for number in range(BLOCKS)))
    optimizer = torch.optim.AdamW(model.parameters())
    with offload.enable(model, optimizer, device="cpu", device_memory="1MiB", host_memory="64MiB", precision="fp32"):
        for _ in range(2):
            model(torch.zeros(8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert alive.blocks == []
    return alive.seen


def test_of_a_partition_that_is_complete_nothing_is_left_when_the_next_one_computes() -> None:
    assert seen_in_backward(PARAMETERS) == [set()] * 2 * BLOCKS


def test_of_partitions_that_are_never_complete_only_the_latest_is_left() -> None:
    later_first = [set(), *({number} for number in range(BLOCKS - 1, 0, -1))]
    assert seen_in_backward(PARAMETERS - 1) == 2 * later_first


class UsedAgain(nn.Module):
    """`weight` gets a gradient from each checkpoint, before that of `scale` makes the partition complete."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.weight = nn.Parameter(torch.linspace(-1.0, 1.0, 64).view(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        for _ in range(3):
            x = checkpoint(lambda y: torch.tanh(y @ self.weight), x, use_reentrant=True)
        return x


def test_a_parameter_that_comes_again_before_the_rest_of_its_partition_is_added_as_in_torch() -> None:
    x = torch.linspace(-2.0, 2.0, 32).view(4, 8)
    expected = UsedAgain()
    expected(x).square().sum().backward()
    model = UsedAgain()
    optimizer = torch.optim.AdamW(model.parameters())
    with offload.enable(
        model, optimizer, device="cpu", device_memory="1MiB", host_memory="64MiB", precision="fp32"
    ) as session:
        model(x).square().sum().backward()
        found = session.gathered_gradients()
        assert found.keys() == {"scale", "weight"}
        for name, parameter in expected.named_parameters():
            assert torch.equal(found[name], parameter.grad)
