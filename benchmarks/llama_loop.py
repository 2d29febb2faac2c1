"""The model, the tokens and the clock that both sides of step_vs_deepspeed.py share.

Owns: one Llama of about 220 million parameters at random, its batch, what is timed of an iteration, and how resident
memory is read.
Does not: know offload or DeepSpeed: each worker brings its engine. It needs torch and transformers alone, as the
peer's environment may have nothing else.
Threads: the main thread.

Note [Timed]: the clock starts when nothing is under way and stops when nothing is under way any more, so that work
which an engine leaves to the background counts in full.
"""

import gc
import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LEARNING_RATE: Final = 1e-4
WEIGHT_DECAY: Final = 0.1
MAX_GRAD_NORM: Final = 1.0
DTYPES: Final = {"bf16": torch.bfloat16, "fp32": torch.float32}

Iteration = Callable[[Tensor], Tensor]
"""Forward, backward, step with clipping, gradients dropped; returns the loss."""


def model_config(layers: int) -> LlamaConfig:
    """12 layers: 219.8 million parameters."""
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        use_cache=False,
    )


def make_model(layers: int, seed: int, precision: str) -> LlamaForCausalLM:
    """In "bf16" or "fp32", from the seed: the same bits on both sides."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[precision])
    try:
        return LlamaForCausalLM(model_config(layers))
    finally:
        torch.set_default_dtype(before)


def make_tokens(tokens: int, seed: int) -> Tensor:
    """One batch of one sequence, the same in every iteration: its loss has to fall."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 32_000, (1, tokens), generator=generator)


def resident_bytes(field: str) -> int:
    """`VmHWM` (the most so far) or `VmRSS` (now) of this process."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no line {field}; resident memory can be measured on Linux only.")
    return int(match.group(1)) * 1024


def restart_peak() -> None:
    """`VmHWM` is from now on the most since now."""
    Path("/proc/self/clear_refs").write_text("5")


def run_iterations(iterate: Iteration, settle: Callable[[], None], asked: dict[str, Any]) -> dict[str, Any]:
    """Warm-up, then the iterations that are timed; see Note [Timed]."""
    tokens = make_tokens(asked["tokens"], asked["seed"])
    losses = [float(iterate(tokens)) for _ in range(asked["warm_up"])]
    settle()
    gc.collect()  # an engine that left tensors in cycles is not charged for them while it is timed
    start_peak_bytes = resident_bytes("VmHWM")
    restart_peak()
    times = [time.perf_counter()]
    for number in range(asked["iterations"]):
        losses.append(float(iterate(tokens)))
        if number == asked["iterations"] - 1:
            settle()
        times.append(time.perf_counter())
    training_peak_bytes = resident_bytes("VmHWM")
    return {
        "iteration_s": [stop - start for start, stop in itertools.pairwise(times)],
        "losses": losses,
        "peak_rss_bytes": max(start_peak_bytes, training_peak_bytes),
        "training_peak_rss_bytes": training_peak_bytes,
    }


def asked_of_me() -> dict[str, Any]:
    """The order on the command line, with torch's threads set as it says."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    return asked


def answer(asked: dict[str, Any], found: dict[str, Any]) -> None:
    """To the file that was asked for; standard output belongs to the engines' logs."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    found["versions"] = versions | found.get("versions", {})
    Path(asked["answer"]).write_text(json.dumps(found), encoding="utf-8")
