"""Graphs that autograd allows and few write: gradients have the bits that they have in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offload.errors import UnsupportedModelError
from tests.training.models import seeded
from tests.training.oracle import Oracle, adamw, assert_same_bits, enable, weights_of

WIDTH = 16
Body = Callable[["Model", Tensor], Tensor]


class Block(nn.Module):
    """A residual MLP; subclasses change its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Model(nn.Module):
    """Four blocks between two linear layers; `body` says how the blocks are called."""

    def __init__(self, block: type[nn.Module], body: Body) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([block() for _ in range(4)])
        self.last = nn.Linear(WIDTH, WIDTH)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self, self.first(x)))


def one_after_another(model: Model, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x)
    return x


def build(block: type[nn.Module] = Block, body: Body = one_after_another) -> Model:
    model = seeded(lambda: Model(block, body))
    assert isinstance(model, Model)
    return model


def data(seed: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int) -> Tensor:
    return model(data(seed)).square().mean()


def plain_loop(model: nn.Module, optimizer: Any) -> None:
    for seed in range(2):
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_as_in_memory(
    make: Callable[[], nn.Module], home: str, folder: Path, loop: Callable[[nn.Module, Any], None] = plain_loop
) -> None:
    """Run the loop in memory with our kernel and in a session on the smallest budgets: equal bits."""
    expected, model = make(), make()
    loop(expected, Oracle(adamw(expected)))
    optimizer = adamw(model)
    with enable(model, optimizer, home, folder):
        loop(model, optimizer)
    assert_same_bits(weights_of(model), weights_of(expected))


# ---------------------------------------------------------------------------------- custom functions and weights


class SavesWeights(torch.autograd.Function):
    """A linear layer that saves its weight, its transpose and a product of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, weight.t())
        ctx.bias = bias  # kept without asking autograd
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, transposed = ctx.saved_tensors
        assert torch.equal(weight.t(), transposed)
        assert not ctx.bias.isnan().any()
        return gradient @ weight, gradient.t() @ x, gradient.sum(0)


class CustomFunctionBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(SavesWeights.apply(x, self.up.weight, self.up.bias))
        return x + SavesWeights.apply(y, self.down.weight, self.down.bias)


class ReturnsViewOfInput(torch.autograd.Function):
    """A view for autograd, whose backward needs a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (weight,) = ctx.saved_tensors
        return gradient * weight.mean(), torch.ones_like(weight) * gradient.mean()


class CustomViewBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return ReturnsViewOfInput.apply(x + self.mlp(x), self.up.weight)


class DerivedWeightBlock(Block):
    """Normalised weights: what backward needs is computed from the parameters, and saved."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.up.weight * torch.rsqrt(self.up.weight.square().sum(1, keepdim=True))
        return x + self.down(torch.tanh(F.linear(x, weight.sigmoid(), self.up.bias)))


# ---------------------------------------------------------------------------------------- views, changes in place


class ViewBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.mlp(x)).view(2, 2, WIDTH)


class TransposedViewBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x))).view(2, 2, WIDTH).transpose(0, 1)


class SlicesBlock(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]
        y = x + self.mlp(x)
        return y[:2], None, y[2:]


class InnerInPlaceBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).add_(0.5)
        y[:, :2] = 0.5
        y[:, 2:4].mul_(2.0)
        return self.down(y.tanh_()).add_(x)


class ViewOfInputInPlaceBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x + 1.0)
        x.view(-1)[:3].mul_(2.0)
        return x.add_(y)


class ReturnsInputBlock(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return x, self.mlp(x)


def view_changed_by_the_caller(model: Model, x: Tensor) -> Tensor:
    for block in model.blocks:
        view = block(x)
        view.add_(1.0)
        view[0].mul_(0.5)
        x = view.reshape(4, WIDTH)
    return x


def slices_changed_by_the_caller(model: Model, x: Tensor) -> Tensor:
    for block in model.blocks:
        low, _, high = block(x)
        x = torch.cat([low.mul_(0.5), high])
    return x


def input_returned(model: Model, x: Tensor) -> Tensor:
    for block in model.blocks:
        same, more = block(x)
        x = same * 0.5 + more
    return x


# -------------------------------------------------------------------------------------- who feeds whom how often


class SharedInputBlock(nn.Module):
    """Attention over a memory that all blocks share: used twice in each, as in an encoder-decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, *, memory: dict[str, list[Tensor]], bias: Tensor | None = None) -> Tensor:
        (states,) = memory["states"]
        scores = self.query(x) @ self.key(states).t() + (0.0 if bias is None else bias)
        return x + scores.softmax(-1) @ self.value(states)


def shared_memory(model: Model, x: Tensor) -> Tensor:
    states = torch.sin(3.0 * x)
    for block in model.blocks:
        x = block(x, memory={"states": [states]})
    return x + states


def shared_leaf(model: Model, x: Tensor) -> Tensor:
    """A buffer that needs a gradient: a leaf that feeds every block."""
    memory = torch.linspace(-1.0, 1.0, 4 * WIDTH).view(4, WIDTH).requires_grad_()
    bias = torch.zeros(4, 4, requires_grad=True)
    for block in model.blocks:
        x = block(x, memory={"states": [memory]}, bias=bias)
    return x


def one_block_at_three_depths(model: Model, x: Tensor) -> Tensor:
    blocks = list(model.blocks)
    for index in (0, 1, 0, 2, 3, 0):
        x = blocks[index](x)
    return x


def skipped(model: Model, x: Tensor) -> Tensor:
    return model.blocks[3](model.blocks[1](x))


def all_outputs_in_the_loss(model: Model, x: Tensor) -> Tensor:
    outputs = [x]
    for block in model.blocks:
        outputs.append(block(outputs[-1]))
    return torch.stack(outputs).mean(0)


def detached_half_way(model: Model, x: Tensor) -> Tensor:
    x = model.blocks[1](model.blocks[0](x)).detach()
    return model.blocks[3](model.blocks[2](x))


def without_gradient_in_between(model: Model, x: Tensor) -> Tensor:
    x = model.blocks[0](x)
    with torch.no_grad():
        shift = model.blocks[1](x)
    return model.blocks[3](x + shift)


GRAPHS: dict[str, Callable[[], Model]] = {
    "custom function": lambda: build(CustomFunctionBlock),
    "custom function that returns a view": lambda: build(CustomViewBlock),
    "derived weights": lambda: build(DerivedWeightBlock),
    "view changed by the caller": lambda: build(ViewBlock, view_changed_by_the_caller),
    "transposed view changed by the caller": lambda: build(TransposedViewBlock, view_changed_by_the_caller),
    "slices, one changed by the caller": lambda: build(SlicesBlock, slices_changed_by_the_caller),
    "changes in place inside": lambda: build(InnerInPlaceBlock),
    "a view of the input changed in place": lambda: build(
        ViewOfInputInPlaceBlock, lambda model, x: one_after_another(model, x * 1.5)
    ),
    "input returned": lambda: build(ReturnsInputBlock, input_returned),
    "shared memory": lambda: build(SharedInputBlock, shared_memory),
    "shared leaf": lambda: build(SharedInputBlock, shared_leaf),
    "one block at three depths": lambda: build(body=one_block_at_three_depths),
    "blocks skipped": lambda: build(body=skipped),
    "all outputs in the loss": lambda: build(body=all_outputs_in_the_loss),
    "detached half way": lambda: build(body=detached_half_way),
    "no_grad in between": lambda: build(body=without_gradient_in_between),
}


@pytest.mark.parametrize("home", ["host", "disk"])
@pytest.mark.parametrize("name", GRAPHS)
def test_gradients_have_the_bits_of_memory(name: str, home: str, tmp_path: Path) -> None:
    assert_same_as_in_memory(GRAPHS[name], home, tmp_path)


# ---------------------------------------------------------------------------------------------- ways to backward


@pytest.mark.parametrize("name", ["custom function", "view changed by the caller", "shared memory"])
def test_a_retained_graph_takes_a_second_loss_and_the_same_one_again(name: str, tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> None:
        for seed in range(2):
            out = model(data(seed))
            first = out.square().mean()
            first.backward(retain_graph=True)
            first.backward(retain_graph=True)
            out.sin().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_same_as_in_memory(GRAPHS[name], "disk", tmp_path, loop)


def test_backward_for_some_parameters_leaves_the_others_without_a_gradient(tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> None:
        assert isinstance(model, Model)
        chosen = [model.blocks[1].up.weight, model.last.bias]
        loss_of(model, 0).backward(inputs=chosen)
        assert [p.grad is not None for p in (*chosen, model.blocks[2].up.weight)] == [True, True, False]
        optimizer.step()
        optimizer.zero_grad()
        plain_loop(model, optimizer)

    assert_same_as_in_memory(build, "disk", tmp_path, loop)


def test_gradients_of_activations_by_autograd_grad_are_exact(tmp_path: Path) -> None:
    def gradients(model: Model) -> list[Tensor]:
        seen: list[Tensor] = []
        model.body = lambda model, x: [seen.append(x := block(x)) for block in model.blocks] and x  # type: ignore[func-returns-value]
        loss = loss_of(model, 0)
        return list(torch.autograd.grad(loss, seen))

    expected, model = build(), build()
    wanted = gradients(expected)
    with enable(model, adamw(model), "disk", tmp_path) as session:
        found = gradients(model)
        assert not session.gathered_gradients()
        plain_loop(model, session.optimizer)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_gradients_that_users_retain_on_activations_are_exact(tmp_path: Path) -> None:
    def retained(model: Model) -> list[Tensor | None]:
        seen: list[Tensor] = []
        for block in model.blocks:
            block.register_forward_hook(lambda module, args, output: (output.retain_grad(), seen.append(output))[0])
        loss_of(model, 0).backward()
        return [activation.grad for activation in seen]

    expected, model = build(), build()
    wanted = retained(expected)
    with enable(model, adamw(model), "disk", tmp_path):
        found = retained(model)
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_hook_on_a_parameter_changes_its_gradient_as_in_torch(tmp_path: Path) -> None:
    def make() -> Model:
        model = build()
        model.blocks[2].up.weight.register_hook(lambda gradient: 3.0 * gradient)
        return model

    assert_same_as_in_memory(make, "disk", tmp_path)


def test_after_a_refused_double_backward_training_goes_on(tmp_path: Path) -> None:
    expected, model = build(), build()
    plain_loop(expected, Oracle(adamw(expected)))
    optimizer = adamw(model)
    with enable(model, optimizer, "disk", tmp_path):
        for _ in range(2):
            x = data(0).requires_grad_()
            with pytest.raises(UnsupportedModelError, match=r"double backward .*Run this part of the loss outside"):
                torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
            with pytest.raises(UnsupportedModelError, match="double backward"):
                loss_of(model, 0).backward(create_graph=True)
            optimizer.zero_grad()
        plain_loop(model, optimizer)
    assert_same_bits(weights_of(model), weights_of(expected))


@pytest.mark.parametrize("name", ["custom function", "view changed by the caller", "shared memory"])
def test_a_graph_older_than_the_step_raises_and_training_goes_on(name: str, tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> None:
        for seed in range(2):
            old = loss_of(model, 10 + seed)
            loss_of(model, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
            if isinstance(optimizer, torch.optim.Optimizer):  # in torch the same: its step changes weights in place
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    old.backward()
                optimizer.zero_grad()

    assert_same_as_in_memory(GRAPHS[name], "disk", tmp_path, loop)


def test_a_graph_older_than_a_step_that_skipped_its_partitions_is_still_good(tmp_path: Path) -> None:
    """In torch a parameter without a gradient is not changed by a step: graphs on it alone stay valid."""

    def loop(model: nn.Module, optimizer: Any) -> None:
        assert isinstance(model, Model)
        old = model.blocks[3](data(0)).square().mean()
        model.blocks[1](data(1)).square().mean().backward()
        optimizer.step()
        old.backward()
        optimizer.step()

    assert_same_as_in_memory(build, "disk", tmp_path, loop)
