"""What the ranks of the training tests run: a small model with routed experts, and loops over their part of a batch."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from offload.config import make_config
from offload.enable import start
from offload.ranks.collectives import ProcessRanks
from offload.session import Session
from offload.units import Tier
from tests.ranks.world import Place

WIDTH = 32
BATCH = 12
BUDGETS = {"device": ("8MiB", "64MiB"), "host": ("130KiB", "64MiB"), "disk": ("130KiB", "64KiB")}
"""Device memory of a rank, and host memory of a rank, by where most of the state then is."""
ALONE = {"disk": ("130KiB", "130KiB")}
"""Those of the only rank, whose parts are larger."""


class Block(nn.Module):
    """Two experts; `route` names those that take part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, route: tuple[int, ...]) -> Tensor:
        y = self.mix(self.norm(x))
        for expert in route:
            y = y + self.experts[expert](x).tanh()
        return x + y


class Model(nn.Module):
    """An embedding that is also the head, blocks, and a last norm."""

    def __init__(self, num_blocks: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, route: tuple[int, ...] = (0, 1), skip: int = -1) -> Tensor:
        x = self.embedding(ids)
        for number, block in enumerate(self.blocks):
            if number != skip:
                x = block(x, route)
        return self.head(self.norm(x))


def loss_of(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    """Mean over the batch: equal parts of it have means whose mean is that of the whole."""
    logits = model(ids[:, :-1], **options).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def batches(num: int) -> Iterator[Tensor]:
    """The whole batches, the same on every rank."""
    generator = torch.Generator().manual_seed(11)
    for _ in range(num):
        yield torch.randint(0, 64, (BATCH, 9), generator=generator)


def own_part(batch: Tensor, rank: int, world_size: int) -> Tensor:
    length = len(batch) // world_size
    return batch[rank * length : (rank + 1) * length]


def build(seed: int = 3, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Model(**options)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


@contextmanager
def session_of(
    place: Place, model: nn.Module, optimizer: torch.optim.Optimizer | None, *, home: str = "host", group: Any = None,
    wait_timeout_s: float = 20.0, **options: Any,
) -> Iterator[Session]:  # fmt: skip
    world_size = dist.get_world_size(group) if dist.is_initialized() else 1
    device_memory, host_memory = (BUDGETS if world_size > 1 else BUDGETS | ALONE)[home]
    folder = Path(place.folder) / "swap"
    folder.mkdir(exist_ok=True)
    arguments = {"precision": "fp32", "max_grad_norm": 1.0, "accumulate": None} | options
    config = make_config(
        device_memory=device_memory, host_memory=f"{world_size * int(host_memory[:-3])}{host_memory[-3:]}", disk=folder,
        disk_space="64MiB", wait_timeout_s=wait_timeout_s, **arguments,
    )  # fmt: skip

    def ranks_of(device: torch.device) -> Any:
        return ProcessRanks.join(group, device=device, wait_timeout_s=wait_timeout_s)

    with start(model, optimizer, config, "cpu", ranks_of=ranks_of) as session:
        yield session


def mean_over_ranks(value: float, group: Any = None) -> float:
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return float(total) / dist.get_world_size(group)


def train(place: Place, *, steps: int = 4, seed: int = 3, group: Any = None, **options: Any) -> dict[str, Any]:
    """Losses over the whole batch, norms, and the weights at the end."""
    model, optimizer = build(seed)
    rank, world_size = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
    losses, norms = [], []
    with session_of(place, model, optimizer, group=group, **options) as session:
        for batch in batches(steps):
            loss = loss_of(model, own_part(batch, rank, world_size))
            session.backward(loss)
            norms.append(session.step().grad_norm)
            optimizer.zero_grad()
            losses.append(mean_over_ranks(loss.item(), group))
        digest = session.weights_sha256()
        plan = session.plan
    return {
        "losses": losses,
        "norms": norms,
        "weights": digest,
        "given back": sha256_of(model),
        "moments": sha256_of_state(optimizer),
        "bytes": {kind: sum(by_tier.values()) for kind, by_tier in plan.bytes_by_kind_and_tier.items()},
        "host bytes": plan.host_bytes,
        "disk bytes": sum(by_tier[Tier.DISK] for by_tier in plan.bytes_by_kind_and_tier.values()),
    }


def sha256_of(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def sha256_of_state(optimizer: torch.optim.Optimizer) -> str:
    digest = hashlib.sha256()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for name in sorted(state):
                digest.update(state[name].numpy().tobytes())
    return digest.hexdigest()
