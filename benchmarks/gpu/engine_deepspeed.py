"""DeepSpeed: ZeRO-3 with its optimizer on the host or on disk; its SuperOffload and ZenFlow where it has them.

Runs in DeepSpeed's own environment: torch, transformers and deepspeed alone.
"""

import os
import socket
from typing import Any

import deepspeed
import torch
from llama import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Engine, Losses
from torch import Tensor

ZENFLOW = {"topk_ratio": 0.05, "select_strategy": "auto", "select_interval": "auto", "update_interval": 4,
           "full_warm_up_rounds": 0, "overlap_step": True}  # fmt: skip


def config_of(model: Losses, asked: dict[str, Any]) -> dict[str, Any]:
    """As its documentation puts it for each mode."""
    pinned = asked["device"] != "cpu"
    mode = asked["mode"]
    optimizer: dict[str, Any] = {"device": "cpu", "pin_memory": pinned}
    zero: dict[str, Any] = {"stage": 3, "overlap_comm": pinned, "offload_optimizer": optimizer}
    if mode == "disk":
        optimizer |= {"device": "nvme", "nvme_path": asked["disk"], "buffer_count": 12}
        optimizer |= {"pipeline_read": True, "pipeline_write": True}
        zero["sub_group_size"] = 50_000_000 if asked["params"] != "tiny" else 100_000
    if mode == "superoffload":
        optimizer |= {"super_offload": True, "cpuadam_cores_perc": 0.8}
    if mode == "zenflow":
        zero["stage"] = 2
        zero["zenflow"] = ZENFLOW
    if asked.get("weights_off") and zero["stage"] == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    rows = max(1, asked["tokens"] // min(asked["tokens"], 4096))
    return {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": MAX_GRAD_NORM if asked["clip"] else 0.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}},
        "zero_optimization": zero,
        "aio": {"block_size": 8 << 20, "queue_depth": 32, "intra_op_parallelism": 4, "overlap_events": True},
    }


def one_rank(device: str) -> None:
    """A group of this process alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0"}
    os.environ["WORLD_SIZE"] = "1"
    deepspeed.init_distributed(dist_backend="gloo" if device == "cpu" else "nccl")


def make(model: Losses, asked: dict[str, Any]) -> Engine:
    """`deepspeed.initialize`."""
    one_rank(asked["device"])
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config_of(model, asked))

    def forward(tokens: Tensor) -> Tensor:
        loss: Tensor = engine(tokens)
        return loss

    return Engine(
        forward, engine.backward, engine.step, close=torch.distributed.destroy_process_group,
        facts={"state": "fp32 master and moments", "mode": asked["mode"], "deepspeed": deepspeed.__version__},
    )  # fmt: skip
