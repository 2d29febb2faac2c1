"""The model, the tokens and the clock that all rows of compare.py share.

Owns: the shapes, one random Llama in bf16 with a loss that never holds all logits, its operations per token, what is
timed of a step, and how memory is read.
Does not: know any engine, nor this package: it needs torch and transformers alone, as a peer's environment may have
nothing else.
Threads: the main thread.

Note [Timed]: the clock starts when nothing is under way and stops when nothing is under way any more. Phases come from
one step more, with the device waited for between them: they show where time goes, and their sum exceeds a step's.

Note [Loss]: logits of 64 k tokens would take more memory than the model. Head and loss are taken over chunks of tokens
and recomputed in backward, in every row alike.
"""

import itertools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from shapes import DEFAULT_VOCABULARY, LOSS_CHUNK, SEQUENCE, SHAPES, VOCABULARY
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

LEARNING_RATE: Final = 1e-5
WEIGHT_DECAY: Final = 0.1
MAX_GRAD_NORM: Final = 1.0


class Losses(nn.Module):
    """A Llama that returns its loss. Note [Loss]."""

    def __init__(self, name: str) -> None:
        super().__init__()
        config = LlamaConfig(
            **SHAPES[name], vocab_size=VOCABULARY.get(name, DEFAULT_VOCABULARY), max_position_embeddings=SEQUENCE,
            tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa",
        )  # fmt: skip
        self.llama = LlamaForCausalLM(config)
        self.llama.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean over all tokens but the last of each sequence."""
        hidden = self.llama.model(input_ids=tokens).last_hidden_state[:, :-1].flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, targets.numel(), LOSS_CHUNK):
            chunk = slice(start, start + LOSS_CHUNK)
            total = total + checkpoint(self._chunk, hidden[chunk], targets[chunk], use_reentrant=False)
        return total / targets.numel()

    def _chunk(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self.llama.lm_head(hidden).float(), targets, reduction="sum")


def make_model(name: str, device: str, seed: int) -> Losses:
    """In bf16 on the host; its random numbers are drawn on the device, which takes seconds instead of minutes."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Losses(name)
    finally:
        torch.set_default_dtype(before)
    return model.to("cpu").train()


def num_parameters(model: nn.Module) -> int:
    """All of them."""
    return sum(parameter.numel() for parameter in model.parameters())


def model_flops(name: str, parameters: int, tokens: int, sequence: int) -> float:
    """Of one step: 6 for each parameter outside the embedding and token, and causal attention. Nothing recomputed."""
    shape = SHAPES[name]
    vocabulary = VOCABULARY.get(name, DEFAULT_VOCABULARY)
    matrices = parameters - vocabulary * shape["hidden_size"]
    attention = 6 * shape["num_hidden_layers"] * shape["hidden_size"] * sequence
    return float(tokens * (6 * matrices + attention))


def make_tokens(name: str, tokens: int, device: str, seed: int) -> Tensor:
    """One batch of sequences, the same in every step: its loss has to fall."""
    sequence = min(tokens, SEQUENCE)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = VOCABULARY.get(name, DEFAULT_VOCABULARY)
    return torch.randint(0, vocabulary, (tokens // sequence, sequence), generator=generator).to(device)


# ------------------------------------------------------------------------------------------------------ engines


@dataclass
class Engine:
    """One way to train; `row.py` times it."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Any]
    step: Callable[[], Any]
    """With clipping and the gradients dropped."""
    settle: Callable[[], Any] = lambda: None
    """Wait until nothing is under way, beyond the device's own queue."""
    begin: Callable[[], Any] = lambda: None
    """The timed steps begin."""
    figures: Callable[[], dict[str, Any]] = dict
    """Of its own, over the timed steps."""
    close: Callable[[], Any] = lambda: None
    facts: dict[str, Any] = field(default_factory=dict)
    """What its row says of it."""


# ------------------------------------------------------------------------------------------------ time and memory


def synchronize(device: str) -> None:
    """Nothing is under way on the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def resident_bytes(field_name: str) -> int:
    """`VmHWM` (the most so far) or `VmRSS` (now) of this process. Memory that a driver pins may be missing in it."""
    return _kib_of(Path("/proc/self/status"), field_name) * 1024


def available_bytes() -> int:
    """Of the machine: what is taken of it counts memory that a driver pins, too."""
    return _kib_of(Path("/proc/meminfo"), "MemAvailable") * 1024


def _kib_of(file: Path, field_name: str) -> int:
    match = re.search(rf"^{field_name}:\s+(\d+) kB$", file.read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"{file} has no line {field_name}; memory can be measured on Linux only.")
    return int(match.group(1))


def run_steps(engine: Engine, tokens: Tensor, asked: dict[str, Any]) -> dict[str, Any]:
    """Warm-up, then timed steps until there are enough of them or `seconds` have passed; then one in phases."""
    device = asked["device"]

    def step() -> Tensor:
        loss = engine.forward(tokens)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    def settle() -> None:
        synchronize(device)
        engine.settle()

    losses = [step() for _ in range(asked["warm_up"])]
    settle()
    engine.begin()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    times = [time.perf_counter()]
    while len(times) <= asked["steps"] and times[-1] - times[0] < asked["seconds"]:
        losses.append(step())
        times.append(time.perf_counter())
    settle()
    times[-1] = time.perf_counter()
    found = {
        # Steps of an engine that runs ahead are not told apart by the host's clock: the mean is what counts.
        "step_s": (times[-1] - times[0]) / (len(times) - 1),
        "host_step_s": [stop - start for start, stop in itertools.pairwise(times)],
        "engine": engine.figures(),
        "phases_s": phases(engine, tokens, device),
        "losses": [loss.item() for loss in losses],
        "peak_host_bytes": max(resident_bytes("VmHWM"), asked["available_bytes"] - available_bytes()),
    }
    if device != "cpu":
        found["peak_device_reserved_bytes"] = torch.cuda.max_memory_reserved()
        found["peak_device_allocated_bytes"] = torch.cuda.max_memory_allocated()
    return found


def phases(engine: Engine, tokens: Tensor, device: str) -> dict[str, float]:
    """Seconds of one step's parts. Note [Timed]."""
    marks = [time.perf_counter()]

    def mark(settle: Callable[[], Any] = lambda: None) -> None:
        synchronize(device)
        settle()
        marks.append(time.perf_counter())

    loss = engine.forward(tokens)
    mark()
    engine.backward(loss)
    mark()
    engine.step()
    mark(engine.settle)
    names = ("forward", "backward", "step")
    return {name: stop - start for name, (start, stop) in zip(names, itertools.pairwise(marks), strict=True)}


def cap_device(device: str, cap_bytes: int | None) -> None:
    """From now on the allocator of torch takes no more than this; what it has cached goes back first."""
    if device == "cpu" or cap_bytes is None:
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total))
