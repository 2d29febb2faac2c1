"""Autograd in full: whatever a graph looks like, gradients have the bits that they have in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offload.errors import UnsupportedModelError
from tests.training.models import GPT, gpt, hf_batch, llama, seeded, tokens
from tests.training.oracle import Oracle, adamw, assert_same_bits, enable, weights_of

WIDTH = 16
HOMES = ["host", "disk"]


class Block(nn.Module):
    """A residual MLP; subclasses change the form of its inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Stack(nn.Module):
    """Four blocks between two linear layers; `call` says how a block is called."""

    def __init__(self, block: type[nn.Module], call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([block() for _ in range(4)])
        self.last = nn.Linear(WIDTH, WIDTH)
        self.call = call

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.call(block, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


def stack(block: type[nn.Module] = Block, call: Callable[[Any, Tensor], Tensor] = lambda block, x: block(x)) -> Stack:
    """A seeded stack."""
    model = seeded(lambda: Stack(block, call))
    assert isinstance(model, Stack)
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
    build: Callable[[], nn.Module],
    home: str,
    folder: Path,
    loop: Callable[[nn.Module, Any], None] = plain_loop,
    **options: Any,
) -> None:
    """Run the loop in memory with our kernel and in a session: equal bits."""
    expected, model = build(), build()
    loop(expected, Oracle(adamw(expected)))
    optimizer = adamw(model)
    with enable(model, optimizer, home, folder, **options):
        loop(model, optimizer)
    assert_same_bits(weights_of(model), weights_of(expected))


# ------------------------------------------------------------------------------------ forms of input and output


class KeywordBlock(Block):
    def forward(self, *, x: Tensor, scale: float = 1.0, extra: Any = None) -> Tensor:
        return x + scale * self.mlp(x)


class DictBlock(Block):
    def forward(self, x: Tensor) -> dict[str, Any]:  # type: ignore[override]
        return {"out": x + self.mlp(x), "nothing": None}


@dataclass
class Output:
    out: Tensor
    nothing: None = None


class DataclassBlock(Block):
    def forward(self, x: Tensor | Output) -> Output:  # type: ignore[override]
        x = x.out if isinstance(x, Output) else x
        return Output(x + self.mlp(x))


class Pair(NamedTuple):
    out: Tensor
    nothing: None


class NamedTupleBlock(Block):
    def forward(self, pair: Pair) -> Pair:  # type: ignore[override]
        assert isinstance(pair, Pair)
        return Pair(pair.out + self.mlp(pair.out), None)


class NestedBlock(Block):
    def forward(self, inputs: dict[str, Any]) -> Any:  # type: ignore[override]
        x = inputs["deep"][0][0]
        y = self.mlp(x)
        return [{"deep": (y, [x + y, None])}, None, "text", 3]


class InputInPlaceBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x + 1.0)
        return x.mul_(2.0) + y


class ViewBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.mlp(x)).view(2, 2, WIDTH)


FORMS: dict[str, Callable[[], Stack]] = {
    "called twice": lambda: stack(call=lambda b, x: b(b(x))),
    "keyword only": lambda: stack(KeywordBlock, lambda b, x: b(x=x, scale=0.5, extra={"a": [None]})),
    "dict": lambda: stack(DictBlock, lambda b, x: b(x)["out"]),
    "dataclass": lambda: stack(DataclassBlock, lambda b, x: b(Output(x)).out),
    "named tuple": lambda: stack(NamedTupleBlock, lambda b, x: b(Pair(x, None)).out),
    "nested": lambda: stack(NestedBlock, lambda b, x: b({"deep": [(x, None)]})[0]["deep"][1][0]),
    "input changed in place": lambda: stack(InputInPlaceBlock, lambda b, x: b(x * 1.5)),
    "output changed in place": lambda: stack(call=lambda b, x: b(x).mul_(0.5).add_(1.0)),
    "output is a view": lambda: stack(ViewBlock, lambda b, x: b(x).reshape(4, WIDTH)),
    "output unused": lambda: stack(call=lambda b, x: (b(x), b(2 * x))[1]),
}


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_do_not_depend_on_the_form_of_inputs_and_outputs(form: str, home: str, tmp_path: Path) -> None:
    assert_same_as_in_memory(FORMS[form], home, tmp_path)


# ----------------------------------------------------------------------------------------------- checkpointing


class CheckpointInsideBlock(Block):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.mlp, x, use_reentrant=self.use_reentrant)


class CheckpointAroundAll(Stack):
    use_reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.body, self.first(x), use_reentrant=self.use_reentrant))


def checkpoint_around_all(use_reentrant: bool) -> nn.Module:
    model = seeded(lambda: CheckpointAroundAll(Block, lambda block, x: block(x)))
    model.use_reentrant = use_reentrant  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_inside_a_blocks_own_forward(use_reentrant: bool, home: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return seeded(lambda: Stack(lambda: CheckpointInsideBlock(use_reentrant), lambda b, x: b(x)))  # type: ignore[arg-type]

    assert_same_as_in_memory(build, home, tmp_path)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_every_block(use_reentrant: bool, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return stack(call=lambda b, x: checkpoint(b, x, use_reentrant=use_reentrant))

    assert_same_as_in_memory(build, "disk", tmp_path)


def test_one_reentrant_checkpoint_around_four_blocks_fits_the_smallest_budget(tmp_path: Path) -> None:
    assert_same_as_in_memory(lambda: checkpoint_around_all(True), "disk", tmp_path)


# ------------------------------------------------------------------------------------------- graphs and backward


@pytest.mark.parametrize("home", HOMES)
def test_two_losses_over_one_retained_graph(home: str, tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> None:
        for seed in range(2):
            out = model(data(seed))
            out.square().mean().backward(retain_graph=True)
            out.sin().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_same_as_in_memory(stack, home, tmp_path, loop)


def test_two_graphs_before_one_backward(tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> None:
        (loss_of(model, 0) + loss_of(model, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert_same_as_in_memory(stack, "disk", tmp_path, loop)


def test_a_graph_built_before_step_raises_as_torch_does_when_backwarded_after_it(tmp_path: Path) -> None:
    model = stack()
    optimizer = adamw(model)
    with enable(model, optimizer, "disk", tmp_path):
        old = loss_of(model, 0)
        loss_of(model, 1).backward()
        optimizer.step()
        optimizer.zero_grad()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            old.backward()
        loss_of(model, 2).backward()
        optimizer.step()


def test_double_backward_raises_and_says_what_to_do(tmp_path: Path) -> None:
    model = stack()
    optimizer = adamw(model)
    with enable(model, optimizer, "host", tmp_path):
        x = data(0).requires_grad_()
        loss = model(x).square().mean()
        with pytest.raises(UnsupportedModelError, match=r"double backward.*Run this part of the loss outside"):
            torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("home", HOMES)
def test_gradients_of_inputs_are_exact(home: str, tmp_path: Path) -> None:
    expected, model = stack(), stack()
    x, y = data(0).requires_grad_(), data(0).requires_grad_()
    expected(x).square().mean().backward()
    optimizer = adamw(model)
    with enable(model, optimizer, home, tmp_path):
        model(y).square().mean().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.equal(x.grad, y.grad)


# --------------------------------------------------------------------------------------------------- exceptions


class Fault(Exception):
    """Raised by the tests' own code."""


class FaultyBlock(Block):
    fail = ""

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x)
        if self.fail == "forward":
            raise Fault("forward")
        if self.fail == "backward":
            y.register_hook(self._raise)
        return x + y

    def _raise(self, gradient: Tensor) -> None:
        raise Fault("backward")


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_training_goes_on_after_an_exception(where: str, home: str, tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> None:
        assert isinstance(model, Stack)
        for seed in range(3):
            if seed == 1:
                model.blocks[2].fail = where  # type: ignore[assignment]
                with pytest.raises(Fault):
                    loss_of(model, 99).backward()
                model.blocks[2].fail = ""  # type: ignore[assignment]
                optimizer.zero_grad()
            loss_of(model, seed).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_same_as_in_memory(lambda: stack(FaultyBlock), home, tmp_path, loop)


def test_gradients_that_arrived_before_an_exception_stay_as_in_torch(tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> None:
        assert isinstance(model, Stack)
        model.blocks[2].fail = "backward"  # type: ignore[assignment]
        with pytest.raises(Fault):
            loss_of(model, 0).backward()
        optimizer.step()

    assert_same_as_in_memory(lambda: stack(FaultyBlock), "disk", tmp_path, loop)


# ------------------------------------------------------------------------------------------ other ways to call


@pytest.mark.parametrize("home", HOMES)
def test_submodules_called_directly(home: str, tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> None:
        for seed in range(2):
            hidden = model.model(input_ids=hf_batch("llama", seed)["input_ids"]).last_hidden_state
            model.lm_head(hidden).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_same_as_in_memory(lambda: seeded(llama), home, tmp_path, loop)


@pytest.mark.parametrize("home", HOMES)
def test_evaluation_between_steps_sees_the_weights_of_the_last_step(home: str, tmp_path: Path) -> None:
    def run(model: nn.Module, optimizer: Any) -> list[float]:
        seen = []
        for seed in range(3):
            with torch.no_grad():
                seen.append(model(tokens(9)).item())
            model(tokens(seed)).backward()
            with torch.no_grad():
                seen.append(model(tokens(9)).item())
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.inference_mode():
                seen.append(model(tokens(9)).item())
            model.train()
        return seen

    expected, model = gpt(), gpt()
    wanted = run(expected, Oracle(adamw(expected)))
    optimizer = adamw(model)
    with enable(model, optimizer, home, tmp_path):
        assert run(model, optimizer) == wanted
    assert_same_bits(weights_of(model), weights_of(expected))


def test_a_session_without_an_optimizer_evaluates(tmp_path: Path) -> None:
    expected, model = gpt(), gpt()
    with torch.no_grad(), enable(model, None, "disk", tmp_path):
        assert isinstance(model, GPT)
        assert model(tokens(0)).item() == expected(tokens(0)).item()
