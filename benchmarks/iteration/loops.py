"""The training loops that are compared: plain torch, ours, FSDP2.

Owns: each engine's set-up, its step, its pass forward.
Does not: time anything (worker.py); DeepSpeed's (deepspeed_loop.py), which is not always installed.
Threads: the main thread, and those of each engine.

Note [Same program]: every loop clips to the same norm and has the same AdamW. In fp32 the plain loop is what a user
writes: forward, backward, clip, step. In bf16 it keeps fp32 masters beside the bf16 weights, as those do who train in
bf16 and want fp32 steps. `fused` is a second plain loop: by default torch's AdamW on the CPU steps parameter by
parameter in Python.
"""

import os
import socket
from typing import Any, Final, Protocol

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from benchmarks.iteration.layouts import plan_for
from benchmarks.iteration.subjects import Subject
from offload.config import Precision, make_config
from offload.enable import start
from offload.units import Tier

LEARNING_RATE: Final = 1e-4
WEIGHT_DECAY: Final = 0.1
MAX_GRAD_NORM: Final = 1.0
DEVICE_MEMORY: Final = "3GiB"
"""More than any model here takes: the plan of each layout is made within it (layouts.py)."""


class Loop(Protocol):
    """One engine with its model and one batch."""

    def step(self) -> Tensor:
        """Forward, backward, clip, step; the loss."""
        ...

    def evaluate(self) -> Tensor:
        """Forward alone, without a graph; the loss."""
        ...

    def settle(self) -> None:
        """Returns when nothing is under way any more."""
        ...

    def close(self) -> None:
        """End the engine."""
        ...


def cast(batch: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Floating tensors in `dtype`, others as they are."""
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in batch)


def make_adamw(parameters: Any, *, fused: bool | None = None) -> torch.optim.AdamW:
    """The optimizer of every loop."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=fused)


def make_model(subject: Subject, seed: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A fresh model and batch: the same values for every loop."""
    torch.manual_seed(seed)
    return subject.make(), subject.batch()


class PlainLoop:
    """torch alone: Note [Same program]."""

    def __init__(self, subject: Subject, seed: int, dtype: torch.dtype, *, fused: bool) -> None:
        self.model, batch = make_model(subject, seed)
        self.model.to(dtype)
        self._batch = cast(batch, dtype)
        self._weights = list(self.model.parameters())
        self._masters: list[nn.Parameter] = []
        if dtype != torch.float32:
            self._masters = [nn.Parameter(weight.detach().float()) for weight in self._weights]
        self._optimizer = make_adamw(self._masters or self._weights, fused=True if fused else None)

    def step(self) -> Tensor:
        """One iteration."""
        loss: Tensor = self.model(*self._batch)
        loss.backward()  # type: ignore[no-untyped-call]
        for master, weight in zip(self._masters, self._weights, strict=False):
            master.grad = weight.grad.float() if weight.grad is not None else None
            weight.grad = None
        nn.utils.clip_grad_norm_(self._masters or self._weights, MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._masters:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, self._masters)
        return loss.detach()

    def evaluate(self) -> Tensor:
        """One pass forward."""
        with torch.no_grad():
            loss: Tensor = self.model(*self._batch)
        return loss

    def settle(self) -> None:
        """All is done when a call returns."""

    def close(self) -> None:
        """Nothing to end."""


class OffloadLoop:
    """A session whose plan puts every kind of bytes where `layout` says."""

    def __init__(self, subject: Subject, seed: int, precision: str, *, layout: str, folder: str) -> None:
        self.model, batch = make_model(subject, seed)
        self._optimizer = make_adamw(self.model.parameters())
        config = make_config(
            device_memory=DEVICE_MEMORY, host_memory=None, disk=folder, disk_space=None, precision=precision,
            max_grad_norm=MAX_GRAD_NORM, accumulate=1, wait_timeout_s=600.0,
        )  # fmt: skip
        self.session = start(self.model, self._optimizer, config, "cpu", plan_of=plan_for(layout))
        self._batch = cast(batch, Precision(precision).dtype)

    def step(self) -> Tensor:
        """One iteration; the step may go on in the background."""
        loss: Tensor = self.model(*self._batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def evaluate(self) -> Tensor:
        """One pass forward."""
        with torch.no_grad():
            loss: Tensor = self.model(*self._batch)
        return loss

    def settle(self) -> None:
        """Returns when the step and its writes are done."""
        self.session.metrics()

    def close(self) -> None:
        """End the session."""
        self.session.close()

    def facts(self) -> dict[str, Any]:
        """Partitions, and the homes of all bytes."""
        homes = self.session.plan.bytes_by_kind_and_tier
        return {
            "partitions": len(self.session.plan.homes),
            "homes": {kind: {str(tier): int(by_tier[tier]) for tier in Tier} for kind, by_tier in homes.items()},
        }


class Fsdp2Loop:
    """torch's own: every block and the root fully sharded over one rank, weights, gradients and state on the host."""

    def __init__(self, subject: Subject, seed: int, dtype: torch.dtype) -> None:
        self.model, batch = make_model(subject, seed)
        self._batch = cast(batch, dtype)
        one_rank()
        policy = MixedPrecisionPolicy()
        if dtype != torch.float32:
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)
        mesh, offload = init_device_mesh("cpu", (1,)), CPUOffloadPolicy(pin_memory=False)
        for block in subject.blocks(self.model):
            fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload)
        fully_shard(self.model, mesh=mesh, mp_policy=policy, offload_policy=offload)
        self._optimizer = make_adamw(self.model.parameters(), fused=True)

    def step(self) -> Tensor:
        """One iteration."""
        loss: Tensor = self.model(*self._batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def evaluate(self) -> Tensor:
        """One pass forward."""
        with torch.no_grad():
            loss: Tensor = self.model(*self._batch)
        return loss

    def settle(self) -> None:
        """All is done when a call returns."""

    def close(self) -> None:
        """End its group."""
        torch.distributed.destroy_process_group()


def one_rank() -> None:
    """A group of this process alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0"}
    os.environ["WORLD_SIZE"] = "1"
    torch.distributed.init_process_group("gloo")
