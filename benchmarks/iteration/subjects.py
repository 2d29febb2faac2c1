"""The models that iterations are compared with.

Owns: three models and their batches.
Does not: train them (loops.py) or know what is compared (worker.py).
Threads: the main thread.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from offload.cli.gpt import GPT, config_for

README_SEQ: Final = 128
README_BATCH: Final = 8
LLAMA_SEQ: Final = 256
TINY_WIDTH: Final = 64
TINY_ROWS: Final = 8


class TinyLayer(nn.Module):
    """A residual block of six parameters and some microseconds of work."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(TINY_WIDTH)
        self.widen = nn.Linear(TINY_WIDTH, 2 * TINY_WIDTH)
        self.project = nn.Linear(2 * TINY_WIDTH, TINY_WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (rows, TINY_WIDTH)
        changed: Tensor = x + self.project(functional.gelu(self.widen(self.norm(x))))
        return changed


class TinyLayers(nn.Module):
    """Many layers of which each is nearly nothing: what remains is the cost of the loop around them."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TinyLayer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:  # (rows, TINY_WIDTH)
        for layer in self.layers:
            x = layer(x)
        return x.float().square().mean()


class LlamaLoss(nn.Module):
    """A Llama that returns the loss of predicting each token from those before it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.llama = LlamaForCausalLM(config)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, seq) int64
        loss: Tensor = self.llama(input_ids=tokens, labels=tokens).loss
        return loss


@dataclass(frozen=True, slots=True)
class Subject:
    """One model with its batch."""

    name: str
    words: str
    tokens: int
    """Of one batch."""
    make: Callable[[], nn.Module]
    """fp32, from the seed that torch has."""
    batch: Callable[[], tuple[Tensor, ...]]
    """The model's arguments."""
    blocks: Callable[[Any], nn.ModuleList]
    """What FSDP2 shards one by one."""


def subjects(*, quick: bool) -> dict[str, Subject]:
    """By name; `quick`: of a size that proves only that they run."""
    gpt = config_for(300_000 if quick else 5_000_000, seq=README_SEQ)
    llama, layers = _llama_config(quick=quick), 8 if quick else 200

    def text() -> tuple[Tensor, ...]:
        window = torch.randint(0, 256, (README_BATCH, README_SEQ + 1))
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def tokens() -> tuple[Tensor, ...]:
        return (torch.randint(0, llama.vocab_size, (1, LLAMA_SEQ)),)

    def rows() -> tuple[Tensor, ...]:
        return (torch.randn(TINY_ROWS, TINY_WIDTH),)

    readme = Subject(
        name="readme", words="README's model, 5 M", tokens=README_BATCH * README_SEQ,
        make=lambda: GPT(gpt), batch=text, blocks=lambda model: model.blocks,
    )  # fmt: skip
    llama_50m = Subject(
        name="llama", words=f"Llama, 50 M, {LLAMA_SEQ} tokens", tokens=LLAMA_SEQ,
        make=lambda: LlamaLoss(llama), batch=tokens, blocks=lambda model: model.llama.model.layers,
    )  # fmt: skip
    tiny = Subject(
        name="tiny", words=f"{layers} tiny layers", tokens=TINY_ROWS,
        make=lambda: TinyLayers(layers), batch=rows, blocks=lambda model: model.layers,
    )  # fmt: skip
    return {subject.name: subject for subject in (readme, llama_50m, tiny)}


def _llama_config(*, quick: bool) -> LlamaConfig:
    """48.5 million parameters."""
    layers, width, vocabulary = (2, 64, 256) if quick else (10, 512, 16_000)
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=LLAMA_SEQ,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
