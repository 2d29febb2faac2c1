"""Small models that are made of blocks named in a list.

Owns: the blocks, how one forward goes through them (`route`), and the optimizer's groups.
Does not: choose (cases.py) or train (program.py).
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from offload.optim import Lion

VOCAB: Final = 40
LENGTH: Final = 6
WIDE: Final = 300
"""A weight of more than 65,536 elements, the smallest chunk: its flat has two."""

KINDS: Final = ("linear", "residual", "wide", "twice", "shares", "frozen", "half frozen", "branch", "norm", "dropout")
ROUTES: Final = ("run", "run", "run", "skip", "checkpoint", "reentrant", "left", "right")
OPTIMIZERS: Final = ("AdamW", "AdamW", "AdamW", "AdamW", "amsgrad", "SGD", "Lion")


class Norm(nn.Module):
    """By the root mean square, of plain operations: the outputs of torch's fused norms have other dtypes on the device
    `meta`, which the double of an accelerator asks for them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Block(nn.Module):
    """One block; `before` is the block whose weights one that `shares` uses."""

    def __init__(self, kind: str, width: int, before: "Block | None") -> None:
        super().__init__()
        self.kind = kind
        inner = WIDE if kind == "wide" else width
        self.norm = Norm(width)
        if kind != "norm":
            self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width, bias=kind != "linear")
        if kind == "wide":
            self.middle = nn.Linear(inner, inner)
        if kind == "branch":
            self.other = nn.Linear(width, width)
        if kind == "shares" and before is not None and before.kind not in ("norm", "wide"):
            self.up = before.up  # the module: its partition belongs to the other block
            self.down.weight = before.down.weight
        if "frozen" in kind:
            self.up.requires_grad_(False)
            if kind == "frozen":
                self.requires_grad_(False)

    def forward(self, x: Tensor, side: str) -> Tensor:
        y = self.norm(x)
        if self.kind == "norm":
            return y
        if self.kind == "branch" and side == "right":
            return x + self.other(y)
        y = torch.tanh(self.up(y))
        if self.kind == "wide":
            y = torch.tanh(self.middle(y))
        y = self.down(y)
        if self.kind == "twice":
            y = self.down(torch.tanh(self.up(y)))
        if self.kind == "dropout":
            y = F.dropout(y, 0.3, self.training)
        return x + y


class Model(nn.Module):
    """Embedding, blocks, norm, head; takes tokens (batch, LENGTH) and returns a loss."""

    def __init__(self, kinds: Sequence[str], width: int, *, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList()
        before: Block | None = None
        for kind in kinds:
            before = Block(kind, width, before)
            self.blocks.append(before)
        self.norm = Norm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.route: Sequence[str] = ()
        """How the next forward takes each block: one of ROUTES."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block, way in zip(self.blocks, self.route, strict=True):
            if way in ("checkpoint", "reentrant") and torch.is_grad_enabled():
                x = checkpoint(block, x, "left", use_reentrant=way == "reentrant")
            elif way != "skip":
                x = block(x, way)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def make_optimizer(name: str, model: nn.Module, num_groups: int) -> torch.optim.Optimizer:
    """Groups take the parameters in turn, and differ in their rates and decays."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": trainable[index::num_groups], "lr": 0.01 / (1 + index), "weight_decay": 0.1 * index}
        for index in range(num_groups)
    ]
    if name == "SGD":
        return torch.optim.SGD(groups, momentum=0.9)
    if name == "Lion":
        return Lion(groups)
    return torch.optim.AdamW(groups, eps=1e-5, amsgrad=name == "amsgrad")
