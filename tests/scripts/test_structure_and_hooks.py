"""Models that change while they are offloaded, and hooks of the user's on gradients."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from offload.errors import OffloadError, UnsupportedModelError
from tests.scripts.script import Script, check, outcome
from tests.training.models import gpt, llama
from tests.training.oracle import enable


def replace_head(model: nn.Module) -> None:
    model.head = nn.Linear(32, 7)


def assign_parameter(model: nn.Module) -> None:
    model.norm.weight = nn.Parameter(torch.ones(32))


def add_adapter(model: nn.Module) -> None:
    model.blocks[0].add_module("adapter", nn.Linear(32, 4))


def append_block(model: nn.Module) -> None:
    model.blocks.append(nn.Linear(32, 32))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (replace_head, r"module 'head' \(Linear\) was assigned"),
        (assign_parameter, r"parameter 'norm.weight' was assigned"),
        (add_adapter, r"module 'blocks.0.adapter' \(Linear\) was assigned"),
        (append_block, r"module 'blocks.3' \(Linear\) was assigned"),
    ],
)
def test_what_would_not_be_trained_is_refused_where_it_is_assigned(
    change: Callable[[nn.Module], None], what: str, tmp_path: Path
) -> None:
    def case(s: Script) -> None:
        s.steps()
        if s.session is not None:
            with pytest.raises(UnsupportedModelError, match=f"{what}.*enable again"):
                change(s.model)
        s.steps()

    check(case, "disk", tmp_path)


def test_a_vocabulary_cannot_grow_inside_a_session_and_nothing_has_changed_when_that_is_said(tmp_path: Path) -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    with enable(model, optimizer, "disk", tmp_path):
        before = model.model.embed_tokens.weight.detach().clone()
        with pytest.raises(OffloadError, match="embed_tokens"):
            model.resize_token_embeddings(128)
        assert torch.equal(model.model.embed_tokens.weight, before)
        batch = torch.randint(0, 96, (1, 8))
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


def test_modules_without_parameters_may_come_and_go(tmp_path: Path) -> None:
    def case(s: Script) -> None:
        s.steps()
        s.model.blocks[0].mlp[1] = nn.ReLU()
        s.model.extra = nn.Dropout(0.0)
        s.steps()

    check(case, "disk", tmp_path)


def test_after_a_session_a_model_may_change(tmp_path: Path) -> None:
    script = outcome(lambda s: s.steps(), "disk", tmp_path)
    replace_head(script.model)
    assert script.model.head.out_features == 7


@pytest.mark.parametrize("home", ["device", "disk"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_gradients_see_what_torch_gives_them_and_what_they_write_counts(
    when: str, home: str, tmp_path: Path
) -> None:
    def clip(parameter: torch.Tensor) -> None:
        parameter.grad.clamp_(-1e-3, 1e-3)
        held.append(parameter.grad.clone())

    def build() -> nn.Module:
        model = gpt()
        if when == "before":
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(clip)
        return model

    def case(s: Script) -> None:
        if when == "after":
            s.steps()
            for parameter in s.model.parameters():
                parameter.register_post_accumulate_grad_hook(clip)
        s.steps(2)
        s.see(*sorted(held, key=lambda g: (g.numel(), g.sum().item())))
        held.clear()

    held: list[torch.Tensor] = []
    check(case, home, tmp_path, build=build)


@pytest.mark.parametrize("home", ["device", "disk"])
def test_tensor_hooks_registered_inside_the_session_change_the_gradient(home: str, tmp_path: Path) -> None:
    def case(s: Script) -> None:
        s.steps()
        handle = s.model.head.weight.register_hook(lambda gradient: gradient * 0.5)
        s.steps(2)
        handle.remove()
        s.steps()

    check(case, home, tmp_path)
