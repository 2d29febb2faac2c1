"""torch's own: FSDP2 with CPUOffloadPolicy, fp32 parameters on the host, bf16 on the device, AdamW on the host."""

import os
import socket
from typing import Any

import torch
from llama import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Engine, Losses
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard


def one_rank(device: str) -> None:
    """A group of this process alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    os.environ["LOCAL_RANK"] = "0"
    # Gradients and norms on the host need a backend of the host beside that of the device.
    torch.distributed.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")


def make(model: Losses, asked: dict[str, Any]) -> Engine:
    """As its documentation puts it: every block, then the root."""
    one_rank(asked["device"])
    mesh = init_device_mesh(asked["device"], (1,))
    model.float()
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
        "offload_policy": CPUOffloadPolicy(pin_memory=asked["device"] != "cpu"),
    }
    for layer in model.llama.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(asked["device"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)

    def backward(loss: Tensor) -> None:
        loss.backward()

    def step() -> None:
        if asked["clip"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return Engine(
        model, backward, step, close=torch.distributed.destroy_process_group,
        facts={"state": "fp32 master and moments on the host", "link": "weights cross it in fp32"},
    )  # fmt: skip
