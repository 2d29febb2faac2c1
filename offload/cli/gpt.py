"""A byte-level GPT in plain torch, and its size for a number of parameters.

Owns: the model that `offload train` trains. It knows nothing of this package: any torch model would do.
Does not: read text (text.py) or train (train.py).
Threads: as torch.

Every module that owns parameters directly fills them in its own `reset_parameters`, and nothing else is computed when
the model is built: under `offload.deferred_init()` it is built without memory and filled block by block.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from offload.errors import ConfigError

VOCAB: Final = 256
HEAD_WIDTH: Final = 64
INIT_STD: Final = 0.02
SIZE_TOLERANCE: Final = 0.2
"""A configuration has the number of parameters asked for within this share."""

PRESETS: Final = {5_000_000: (256, 6), 25_000_000: (512, 8), 120_000_000: (768, 16), 1_000_000_000: (2048, 20)}
"""Width and depth by number of parameters: many blocks, so that one of them is a small share of the model."""

WIDTH_PER_BLOCK: Final = 48
"""The width for each block of depth that other sizes aim at; the presets lie around it."""

_SUFFIXES: Final = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTConfig:
    """Sizes of the model."""

    width: int
    """Elements of one position's representation; a multiple of `HEAD_WIDTH`."""
    depth: int
    """Number of blocks."""
    seq: int
    """Positions that it has embeddings for."""

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, biases and norms included."""
        block = 12 * self.width**2 + 13 * self.width
        return self.depth * block + (2 * VOCAB + self.seq + 2) * self.width


MAX_PARAMETERS: Final = 10**13
"""Its shape is found by trying widths; beyond this that would take minutes."""


def parse_count(text: str) -> int:
    """A number of parameters from a text as "5m", "1.5b" or "300000". Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmb]?)\s*", text.lower())
    if match is None or float(match.group(1)) == 0:
        raise ConfigError(f"{text!r} is not a number of parameters; write it as 25m, 1b or a count.")
    count = float(match.group(1)) * _SUFFIXES[match.group(2)]
    if count > MAX_PARAMETERS:
        raise ConfigError(
            f"{text!r} parameters are too many for a GPT of bytes; at most {MAX_PARAMETERS:.0e} are taken."
        )
    return round(count)


def config_for(num_parameters: int, *, seq: int) -> GPTConfig:
    """The configuration nearest in shape to the presets with that many parameters, within `SIZE_TOLERANCE`."""
    if num_parameters in PRESETS:
        width, depth = PRESETS[num_parameters]
        preset = GPTConfig(width=width, depth=depth, seq=seq)
        if _is_near(preset, num_parameters):
            return preset
    fitting = [c for c in _candidates(num_parameters, seq) if _is_near(c, num_parameters)]
    if not fitting:
        smallest = GPTConfig(width=HEAD_WIDTH, depth=1, seq=seq).num_parameters
        raise ConfigError(
            f"no byte-level GPT for sequences of {seq} has {num_parameters:,} parameters; the smallest has "
            f"{smallest:,}. Ask for more parameters or shorter sequences."
        )
    return min(fitting, key=_distance_from_shape)


def _candidates(num_parameters: int, seq: int) -> Iterator[GPTConfig]:
    """For each width the depth that comes nearest to the number of parameters."""
    width = HEAD_WIDTH
    while True:
        one = GPTConfig(width=width, depth=1, seq=seq).num_parameters
        block = GPTConfig(width=width, depth=2, seq=seq).num_parameters - one
        yield GPTConfig(width=width, depth=max(1, 1 + round((num_parameters - one) / block)), seq=seq)
        if one > num_parameters:
            return
        width += HEAD_WIDTH


def _is_near(config: GPTConfig, num_parameters: int) -> bool:
    return abs(config.num_parameters - num_parameters) <= SIZE_TOLERANCE * num_parameters


def _distance_from_shape(config: GPTConfig) -> float:
    return abs(math.log(config.width / (WIDTH_PER_BLOCK * config.depth)))


class Embedding(nn.Embedding):
    """An embedding with small values, so that the first logits are nearly uniform."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)


class Linear(nn.Linear):
    """A linear layer with normal weights of the given spread and no bias at the start."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, std: float = INIT_STD) -> None:
        self.std = std  # before the constructor of torch, which fills the weights
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Causal self-attention with heads of `HEAD_WIDTH`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.qkv = Linear(config.width, 3 * config.width)
        self.project = Linear(config.width, config.width, std=_residual_std(config))

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq, width)
        batch, seq, width = x.shape
        qkv = self.qkv(x).view(batch, seq, 3, width // HEAD_WIDTH, HEAD_WIDTH)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch, heads, seq, HEAD_WIDTH)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        projected: Tensor = self.project(mixed.transpose(1, 2).reshape(batch, seq, width))
        return projected


class MLP(nn.Module):
    """Two linear layers, four times as wide in between."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.widen = Linear(config.width, 4 * config.width)
        self.project = Linear(4 * config.width, config.width, std=_residual_std(config))

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq, width)
        projected: Tensor = self.project(functional.gelu(self.widen(x)))
        return projected


class Block(nn.Module):
    """Attention and MLP, each behind its norm and added to the stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq, width)
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class GPT(nn.Module):
    """Predicts the next byte. Called with inputs and targets it returns their mean cross-entropy."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = Embedding(VOCAB, config.width)
        self.positions = Embedding(config.seq, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = Linear(config.width, VOCAB, bias=False)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:  # both (batch, seq), int64 bytes
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1], device=inputs.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        # In 16 bits the sum over the vocabulary would lose what the loss is made of.
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _residual_std(config: GPTConfig) -> float:
    """Two layers of each block add to the stream; their sum keeps its spread whatever the depth."""
    return INIT_STD / math.sqrt(2 * config.depth)
