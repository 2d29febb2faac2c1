"""Tiny models of Hugging Face, and their state as a session would give it to a checkpoint."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from offload.checkpoint.format.state import Item, Kind, StateTensor
from tests.checkpoint.memory import MOMENTS, PLAIN, SPLIT, State, put_master, put_moment

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 64


def gpt2() -> nn.Module:
    """Head tied to the embedding."""
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32)).eval()


def llama() -> nn.Module:
    """Nothing tied, grouped heads."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


MODELS = {"gpt2": gpt2, "llama": llama}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def state_of(model: nn.Module, *, split: bool = False, moments: str = "fp32", num_frozen: int = 0) -> State:
    """Its parameters with random moments, the first `num_frozen` of them frozen; tied ones once, with their aliases."""
    tensors = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    state, rng = State([]), np.random.default_rng(0)
    for index, (first, *aliases) in enumerate(names.values()):
        tensor = tensors[first].detach()
        is_trained = isinstance(tensors[first], nn.Parameter) and index >= num_frozen
        state_tensors = (
            (*(SPLIT if split else PLAIN), *MOMENTS[moments]) if is_trained else (StateTensor("weights", tensor.dtype),)
        )
        kind = Kind.BUFFER if not isinstance(tensors[first], nn.Parameter) else Kind.FROZEN
        item = Item(
            name=first, kind=Kind.TRAINABLE if is_trained else kind, shape=tuple(tensor.shape), dtype=tensor.dtype,
            state_tensors=state_tensors, step=5 if is_trained else 0, aliases=tuple(aliases),
        )  # fmt: skip
        state.items.append(item)
        if not is_trained:
            state.state_tensors[first, "weights"] = tensor.reshape(-1).clone()
            continue
        put_master(state, item, tensor.reshape(-1).clone())
        for name in ("exp_avg", "exp_avg_sq"):
            moment = torch.from_numpy(rng.standard_normal(item.numel).astype(np.float32))
            put_moment(state, item, name, moment.abs() if name == "exp_avg_sq" else moment)
    return state


def with_config(model: nn.Module, folder: Path) -> Path:
    model.config.save_pretrained(folder)
    return folder
