"""DeepSpeed's training loop: ZeRO-3 on the CPU, its state in memory or on disk.

Owns: its configuration and its loop. Needs deepspeed: worker.py imports it only where DeepSpeed is asked for.
Does not: tune DeepSpeed: step_vs_deepspeed.py tries its settings on a model for which they matter.
Threads: the main thread, and DeepSpeed's.
"""

from typing import Any, Final

import deepspeed
import torch
from torch import Tensor

from benchmarks.iteration.layouts import DEVICE, DISK_STATE, HOST_STATE
from benchmarks.iteration.loops import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, cast, make_model, one_rank
from benchmarks.iteration.subjects import Subject
from offload.units import MIB

BUCKET_NUMEL: Final = 33_000_000
BUFFER_COUNT: Final = 12
"""Three tiles, each of three state tensors and a gradient."""


def config_of(layout: str, dtype: torch.dtype, folder: str, micro_batch: int) -> dict[str, Any]:
    """As its documentation puts it for ZeRO-3 and ZeRO-Infinity, with the buffers of step_vs_deepspeed.py."""
    zero: dict[str, Any] = {
        "stage": 3, "sub_group_size": BUCKET_NUMEL, "reduce_bucket_size": BUCKET_NUMEL,
        "stage3_prefetch_bucket_size": 13_000_000,
    }  # fmt: skip
    more: dict[str, Any] = {}
    if layout == HOST_STATE:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    elif layout == DISK_STATE:
        zero["offload_optimizer"] = {
            "device": "nvme", "nvme_path": folder, "buffer_count": BUFFER_COUNT, "pipeline_read": True,
            "pipeline_write": True,
        }  # fmt: skip
        more["aio"] = {"block_size": 8 * MIB, "queue_depth": 32, "single_submit": False, "overlap_events": True}
    elif layout != DEVICE:
        raise ValueError(f"DeepSpeed is not compared with {layout!r}")
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": MAX_GRAD_NORM,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}},
        "zero_optimization": zero,
        "wall_clock_breakdown": False,
        **more,
    }


class DeepSpeedLoop:
    """Its engine."""

    def __init__(self, subject: Subject, seed: int, dtype: torch.dtype, *, layout: str, folder: str) -> None:
        model, batch = make_model(subject, seed)
        self._batch = cast(batch, dtype)
        one_rank()
        deepspeed.init_distributed(dist_backend="gloo")
        config = config_of(layout, dtype, folder, self._batch[0].shape[0])
        self._engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(self) -> Tensor:
        """One iteration."""
        loss: Tensor = self._engine(*self._batch)
        self._engine.backward(loss)
        self._engine.step()  # it drops the gradients, too
        return loss.detach()

    def evaluate(self) -> Tensor:
        """One pass forward."""
        with torch.no_grad():
            loss: Tensor = self._engine(*self._batch)
        return loss

    def settle(self) -> None:
        """All is done when a call returns."""

    def close(self) -> None:
        """End its group."""
        torch.distributed.destroy_process_group()
