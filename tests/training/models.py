"""Tiny models with every shape that offloading must bear: built from configurations, nothing is downloaded.

Owns: the models, one batch for each, and the seeds that make both the same every time.
Does not: train (oracle.py, the tests).
"""

from collections.abc import Callable
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB: Final = 96
BATCH: Final = 2
LENGTH: Final = 10


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The same initial weights at every call, whatever the seed of the test."""
    with torch.random.fork_rng():
        torch.manual_seed(20260101)
        return build().train()


# ------------------------------------------------------------------------------------------ Hugging Face models


def llama() -> nn.Module:
    """Grouped-query attention; blocks of several chunks."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, attention_dropout=0.0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    """Tied embedding and head."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=32,
        n_embd=32,
        n_layer=3,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    """Encoder and decoder; one embedding with several owners; a bias that the first block computes for all."""
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def mixtral() -> nn.Module:
    """A mixture of experts."""
    config = transformers.MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
        attention_dropout=0.0,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def bert() -> nn.Module:
    """A classifier with a pooler."""
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def vit() -> nn.Module:
    """Images; parameters that the embedding module owns directly."""
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


HF_MODELS: Final[dict[str, Callable[[], nn.Module]]] = {
    "llama": llama, "gpt2": gpt2, "t5": t5, "mixtral": mixtral, "bert": bert, "vit": vit,
}  # fmt: skip


def hf_batch(name: str, seed: int) -> dict[str, Tensor]:
    """Arguments of the model's forward, with labels."""
    rng = torch.Generator().manual_seed(seed)
    if name == "vit":
        pixels = torch.randn(BATCH, 3, 16, 16, generator=rng)
        return {"pixel_values": pixels, "labels": torch.randint(0, 3, (BATCH,), generator=rng)}
    tokens = torch.randint(2, VOCAB, (BATCH, LENGTH), generator=rng)
    if name == "bert":
        return {"input_ids": tokens, "labels": torch.randint(0, 3, (BATCH,), generator=rng)}
    return {"input_ids": tokens, "labels": tokens.clone()}


# ------------------------------------------------------------------------------------------------ plain models


def mlp() -> nn.Sequential:
    """Five partitions, for tests that take many steps; takes (batch, 64)."""

    def build() -> nn.Module:
        blocks = (nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4))
        return nn.Sequential(*blocks, nn.Linear(64, 8))

    model = seeded(build)
    assert isinstance(model, nn.Sequential)
    return model


class GPTBlock(nn.Module):
    """Norm, causal attention, norm, MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Token embedding, blocks, norm, head; `tied` shares the embedding with the head."""

    def __init__(self, width: int = 32, depth: int = 3, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList([GPTBlock(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.skip: set[int] = set()
        """Blocks that forward leaves out."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            if index not in self.skip:
                x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def gpt(**options: Any) -> GPT:
    """A seeded GPT."""
    model = seeded(lambda: GPT(**options))
    assert isinstance(model, GPT)
    return model


def tokens(seed: int) -> Tensor:
    """A batch for `gpt`."""
    return torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
