"""DeepSpeed's side of step_vs_deepspeed.py: ZeRO-3 on the CPU, the optimizer's state on disk.

Owns: its configuration and its loop. Run as a script by the Python of `--deepspeed-python`: it needs torch,
transformers and deepspeed alone, nothing of this package.
Does not: choose the settings of `aio` and of the buffers: they are in the order, the only argument.
Threads: the main thread, and DeepSpeed's.
"""

import gc
import os
import socket
from typing import Any

import deepspeed
import torch
from llama_loop import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    answer,
    asked_of_me,
    make_model,
    resident_bytes,
    run_iterations,
)
from torch import Tensor


def config_of(asked: dict[str, Any]) -> dict[str, Any]:
    """As its documentation puts it for ZeRO-Infinity."""
    setting = asked["setting"]
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": MAX_GRAD_NORM,
        "bf16": {"enabled": asked["precision"] == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}},
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": setting["sub_group_size"],
            "reduce_bucket_size": setting["reduce_bucket_size"],
            "stage3_prefetch_bucket_size": setting["prefetch_bucket_size"],
            "offload_optimizer": {
                "device": "nvme",
                "nvme_path": asked["disk"],
                "buffer_count": setting["buffer_count"],
                "pipeline_read": True,
                "pipeline_write": True,
            },
        },
        "aio": {
            "block_size": setting["block_size"],
            "queue_depth": setting["queue_depth"],
            "intra_op_parallelism": setting["intra_op_parallelism"],
            "single_submit": False,
            "overlap_events": True,
        },
        "wall_clock_breakdown": False,
    }


def one_rank() -> None:
    """A group of this process alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0"}
    os.environ["WORLD_SIZE"] = "1"
    deepspeed.init_distributed(dist_backend="gloo")


def main() -> None:
    """Train, and answer."""
    asked = asked_of_me()
    baseline_bytes = resident_bytes("VmHWM")
    one_rank()
    model = make_model(asked["layers"], asked["seed"], asked["precision"])
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config_of(asked))
    gc.collect()  # its start leaves tensors in cycles: 8 bytes a parameter that its peak would count

    def iterate(tokens: Tensor) -> Tensor:
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()  # it drops the gradients, too
        return loss.detach()

    found = run_iterations(iterate, lambda: None, asked)
    found |= {"baseline_rss_bytes": baseline_bytes, "parameters": num_parameters}
    found["versions"] = {"deepspeed": deepspeed.__version__}
    answer(asked, found)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
