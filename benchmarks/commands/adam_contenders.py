"""Our kernels, and what they are measured against, as contenders of `offload bench adam`.

Owns: which kernel steps which arrays in which mode; the slices and workers, the same for the reference; how quick a
kernel is where memory costs nothing.
Does not: time steps (rounds.py), know other libraries (peers.py) or compare (adam.py).
Threads: called from the main thread; kernels run on the workers.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.commands import streams
from benchmarks.commands.adam_arrays import BETAS, EPS, LR, WEIGHT_DECAY, AdamArrays, bias_corrections
from offload.kernels import adam
from offload.kernels.dynamic_map import BLOCK_8BIT_NUMEL
from offload.kernels.workers import TASK_NUMEL, Workers

GRADIENT_FACTOR: Final = 1.0
DECOUPLED: Final = True

BYTES_8BIT: Final = 2 * (2 + 8 / BLOCK_8BIT_NUMEL)
"""Two moments: a code read and written, and their shares of a scale."""


CACHED_STEPS: Final = 40
"""Of one task: some milliseconds, of which other programs on the machine spare at least one step."""


@dataclass(frozen=True, slots=True)
class Mode:
    """One kernel in one mode."""

    name: str
    words: str
    dtype: str
    """Of gradient and weights: bf16 or fp16."""
    master: str
    state: str
    bytes_per_parameter: float
    """Read and written; not the cache lines that a store reads first."""

    @property
    def state_tensors(self) -> tuple[str, ...]:
        """Names of the moments' arrays."""
        if self.state == "fp32":
            return ("exp_avg", "exp_avg_sq")
        if self.state == "bf16":
            return ("exp_avg_bf16", "exp_avg_sq_bf16")
        return ("exp_avg_8bit", "exp_avg_scale", "exp_avg_sq_8bit", "exp_avg_sq_scale")

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of all arrays, in the order of the kernel's arguments."""
        array0, weights = ("remainder", "weights_split") if self.master == "split" else ("master", "weights")
        return (array0, *self.state_tensors, f"gradient_{self.dtype}", weights)


# Where the weights are bf16 the product's master is split: so it is here, but in the step that peers are compared with.
MODES: Final = (
    Mode("fused", "fused", "bf16", "plain", "fp32", 28.0),
    Mode("fused_fp16", "fused, fp16", "fp16", "plain", "fp32", 28.0),
    Mode("split", "split master", "bf16", "split", "fp32", 26.0),
    Mode("bf16_state", "split master, bf16 state", "bf16", "split", "bf16", 18.0),
    Mode("eightbit", "split master, 8-bit state", "bf16", "split", "8bit", 10.0 + BYTES_8BIT),
)

REFERENCE_BYTES: Final = 28.0


class Sliced:
    """Runs a kernel over slices of arrays, by all workers."""

    def __init__(self, arrays: AdamArrays, names: tuple[str, ...], workers: Workers) -> None:
        self.numel = arrays.numel
        self._arrays = [(arrays.bits(name), arrays.numel_per(name)) for name in names]
        self._workers = workers

    def slices(self, start: int, stop: int) -> list[Any]:
        """Of every array. `start` is a multiple of the 8-bit block; so is `stop`, but at the end."""
        return [array[start // per : -(-stop // per)] for array, per in self._arrays]

    def run(self, kernel: Callable[..., None], *scalars: Any) -> None:
        """`kernel(slices…, first, scalars…)` over all elements."""
        self._workers.run(lambda start, stop: kernel(*self.slices(start, stop), start, *scalars), 0, self.numel)


class ReferenceStreams:
    """The bytes of a fused step, with trivial arithmetic: what this machine's memory allows (streams.py)."""

    def __init__(self, arrays: AdamArrays, dtype: str, workers: Workers) -> None:
        self._kernel = streams.streams_kernel(dtype)
        self._sliced = Sliced(arrays, ("master", "exp_avg", "exp_avg_sq", "gradient_zero", "weights"), workers)

    def step(self) -> None:
        """One pass."""
        self._sliced.run(self._kernel)


class OurStep:
    """One of our kernels; each call is the next step of a training run."""

    def __init__(self, arrays: AdamArrays, mode: Mode, workers: Workers) -> None:
        self._kernel = adam.step_kernel(mode.dtype, mode.dtype, master=mode.master, state=mode.state)
        self._sliced = Sliced(arrays, mode.arrays, workers)
        self._is_seeded = mode.state == "bf16"
        self._num_steps = 0

    def step(self) -> None:
        """One step."""
        self._sliced.run(self._kernel, *self._next_scalars())

    def core_s(self, threads: int) -> float:
        """The seconds of a step that is bound by the cores alone: of the quickest of many steps of one task, which
        stays in a cache, on one core."""
        numel = min(TASK_NUMEL, self._sliced.numel)
        slices = self._sliced.slices(0, numel)
        quickest_s = float("inf")
        for _ in range(CACHED_STEPS):
            scalars = self._next_scalars()
            start_s = time.perf_counter()
            self._kernel(*slices, 0, *scalars)
            quickest_s = min(quickest_s, time.perf_counter() - start_s)
        return quickest_s / numel * self._sliced.numel / threads

    def _next_scalars(self) -> tuple[Any, ...]:
        self._num_steps += 1
        seed = (self._num_steps,) if self._is_seeded else ()
        corrections = bias_corrections(self._num_steps)
        return (LR, *BETAS, EPS, WEIGHT_DECAY, *corrections, GRADIENT_FACTOR, DECOUPLED, *seed)
