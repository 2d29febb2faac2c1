"""DeepSpeed's CPU optimizer as a contender, in a process and a Python environment of its own.

Owns: the other end of peers.py's pipe. Run as a script, by the Python of `--deepspeed-python`: it needs torch, numpy
and deepspeed alone, nothing of this package.
Does not: decide when to step; each line on standard input is one command, each answer one line of JSON on the
descriptor named as the only argument (standard output belongs to DeepSpeed's log).
Threads: the main thread, and OpenMP's.

Commands: `prepare NUMEL THREADS SEED` answers {"versions": {...}}; `step` and `step_with_casts` answer {"seconds": s};
anything that fails answers {"error": words}. End of input ends it.
"""

import json
import mmap
import os
import sys
import time
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder

BLOCK_NUMEL = 1 << 20
LR = 1e-4
WEIGHT_DECAY = 0.1


def huge_page_tensor(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory as the other contenders have it: huge pages, touched."""
    mapping = mmap.mmap(-1, numel * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.from_numpy(np.frombuffer(mapping, np.uint8)).view(dtype)
    return tensor.zero_()


class Stepper:
    """One fp32 parameter, its state, and the 16-bit gradient and weights of a bf16 run."""

    def __init__(self, numel: int, threads: int, seed: int) -> None:
        torch.set_num_threads(threads)
        rng = np.random.default_rng(seed)
        block = torch.from_numpy(rng.standard_normal(min(numel, BLOCK_NUMEL), np.float32))
        self.gradient_bf16 = huge_page_tensor(numel, torch.bfloat16)
        self.weights_bf16 = huge_page_tensor(numel, torch.bfloat16)
        self.master = torch.nn.Parameter(huge_page_tensor(numel, torch.float32))
        for start in range(0, numel, BLOCK_NUMEL):
            part = block[: numel - start]
            self.master.data[start : start + BLOCK_NUMEL] = part * 0.02
            self.gradient_bf16[start : start + BLOCK_NUMEL] = part
        self.gradient = huge_page_tensor(numel, torch.float32)
        self.gradient.copy_(self.gradient_bf16)
        self.master.grad = self.gradient
        self.optimizer = DeepSpeedCPUAdam([self.master], lr=LR, weight_decay=WEIGHT_DECAY, adamw_mode=True)
        # What its first step would make, but on huge pages.
        self.optimizer.state[self.master] = {
            "step": 0,
            "exp_avg": huge_page_tensor(numel, torch.float32),
            "exp_avg_sq": huge_page_tensor(numel, torch.float32),
        }

    @torch.no_grad()
    def step(self, with_casts: bool) -> float:
        """One step; its seconds."""
        start_s = time.perf_counter()
        if with_casts:
            self.gradient.copy_(self.gradient_bf16)
        self.optimizer.step()
        if with_casts:
            self.weights_bf16.copy_(self.master)
        return time.perf_counter() - start_s


def versions() -> dict[str, str]:
    """Of this environment, with the vector width that DeepSpeed's build chose."""
    vectors = CPUAdamBuilder().simd_width().removeprefix("-D").strip("_")
    return {"deepspeed": deepspeed.__version__, "torch": torch.__version__, "vectors": vectors}


def main() -> None:
    """Answer commands until there are no more."""
    steppers: list[Stepper] = []
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8", buffering=1) as answers:
        for line in sys.stdin:
            command, *numbers = line.split()
            answer: dict[str, Any]
            try:
                if command == "prepare":
                    numel, threads, seed = map(int, numbers)
                    steppers.append(Stepper(numel, threads, seed))
                    answer = {"versions": versions()}
                else:
                    answer = {"seconds": steppers[0].step(with_casts=command == "step_with_casts")}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
