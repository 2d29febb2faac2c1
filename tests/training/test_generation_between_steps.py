"""`generate()` inside the context, before, between and after training steps: the tokens and weights of memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.models import HF_MODELS, hf_batch, seeded
from tests.training.oracle import Oracle, adamw, assert_same_bits, enable, weights_of

Loop = Callable[[nn.Module, Any], list[Any]]
HOMES = ["host", "disk"]


def generated(model: Any, seed: int, *, use_cache: bool, **how: Any) -> list[list[int]]:
    """Six new tokens and their scores, in evaluation mode."""
    prompt = hf_batch("llama", seed)["input_ids"]
    model.eval()
    out = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, min_new_tokens=6, do_sample=False,
        use_cache=use_cache, pad_token_id=0, output_scores=True, return_dict_in_generate=True, **how,
    )  # fmt: skip
    model.train()
    assert all(torch.isfinite(score).any() for score in out.scores)
    return [*out.sequences.tolist(), [score.max().item() for score in out.scores]]


def train_step(model: nn.Module, optimizer: Any, name: str, seed: int) -> float:
    loss: Tensor = model(**hf_batch(name, seed)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def assert_same_as_in_memory(name: str, loop: Loop, home: str, folder: Path) -> None:
    expected, model = seeded(HF_MODELS[name]), seeded(HF_MODELS[name])
    wanted = loop(expected, Oracle(adamw(expected)))
    optimizer = adamw(model)
    with enable(model, optimizer, home, folder):
        assert loop(model, optimizer) == wanted
    assert_same_bits(weights_of(model), weights_of(expected))


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["llama", "t5", "gpt2", "mixtral"])
def test_generation_before_between_and_after_steps(name: str, use_cache: bool, home: str, tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> list[Any]:
        seen: list[Any] = [generated(model, 7, use_cache=use_cache)]
        for seed in range(2):
            seen += [train_step(model, optimizer, name, seed), generated(model, 7, use_cache=use_cache)]
        return seen

    assert_same_as_in_memory(name, loop, home, tmp_path)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_beam_search_reorders_its_cache(name: str, tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> list[Any]:
        return [train_step(model, optimizer, name, 0), generated(model, 3, use_cache=True, num_beams=3)]

    assert_same_as_in_memory(name, loop, "disk", tmp_path)


def test_generation_between_forward_and_backward_leaves_the_graph_alone(tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> list[Any]:
        loss = model(**hf_batch("llama", 0)).loss
        seen = generated(model, 5, use_cache=True)
        loss.backward()
        seen += generated(model, 5, use_cache=True)
        optimizer.step()
        optimizer.zero_grad()
        return [*seen, train_step(model, optimizer, "llama", 1)]

    assert_same_as_in_memory("llama", loop, "disk", tmp_path)


def test_a_cache_from_before_a_step_may_be_used_after_it(tmp_path: Path) -> None:
    """Keys and values are activations: the user's, not the session's."""

    def loop(model: Any, optimizer: Any) -> list[Any]:
        ids = hf_batch("llama", 2)["input_ids"]
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        step = train_step(model, optimizer, "llama", 0)
        with torch.no_grad():
            logits = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits
        return [step, logits.tolist()]

    assert_same_as_in_memory("llama", loop, "disk", tmp_path)


def encoder_alone(model: Any) -> Tensor:
    encoder_states = model.encoder(input_ids=hf_batch("t5", 1)["input_ids"]).last_hidden_state
    decoder_states = model.decoder(
        input_ids=hf_batch("t5", 2)["input_ids"], encoder_hidden_states=encoder_states
    ).last_hidden_state
    return model.lm_head(decoder_states).square().mean()


def bert_parts(model: Any) -> Tensor:
    hidden = model.bert.embeddings(input_ids=hf_batch("bert", 1)["input_ids"])
    hidden = model.bert.encoder(hidden).last_hidden_state
    return model.classifier(model.bert.pooler(hidden)).square().mean()


def mixtral_layers(model: Any) -> Tensor:
    hidden = model.model.embed_tokens(hf_batch("mixtral", 1)["input_ids"])
    for layer in model.model.layers:
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.model.norm(hidden).square().mean()


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize(
    ("name", "loss_of"), [("t5", encoder_alone), ("bert", bert_parts), ("mixtral", mixtral_layers)]
)
def test_parts_of_a_model_called_directly_train(
    name: str, loss_of: Callable[[Any], Tensor], home: str, tmp_path: Path
) -> None:
    def loop(model: nn.Module, optimizer: Any) -> list[Any]:
        seen = []
        for seed in range(2):
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen += [loss.item(), train_step(model, optimizer, name, seed)]
        return seen

    assert_same_as_in_memory(name, loop, home, tmp_path)
