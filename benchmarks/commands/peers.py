"""Other libraries' AdamW as contenders of `offload bench adam`.

Owns: calling torch's and DeepSpeed's optimizers as their users do, on the same memory, threads and hyper-parameters;
the process in which DeepSpeed runs.
Does not: time our kernels (adam_contenders.py) or compare (adam.py).
Threads: the main thread.

Note [Casts]: a bf16 run with fp32 masters has gradients of 16 bits and needs weights of 16 bits. Peers that step fp32
alone get them by `gradient.copy_(gradient_bf16)` before and `weights_bf16.copy_(master)` after: once each, as cheap as
torch can.
"""

import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor

from benchmarks.commands.adam_arrays import BETAS, EPS, LR, WEIGHT_DECAY, AdamArrays
from offload.errors import ConfigError, OffloadError

WORKER: Final = Path(__file__).with_name("deepspeed_worker.py")
PREPARE_TIMEOUT_S: Final = 900.0
"""DeepSpeed compiles its optimizer on first use: a minute, on a busy machine several."""
STEP_TIMEOUT_S: Final = 300.0
"""A step of any size that fits takes seconds: longer means that the process is stuck."""
END_TIMEOUT_S: Final = 10.0
NOT_INSTALLED: Final = "not installed; pip install -e '.[bench]' in the checkout, or name --deepspeed-python"


# ------------------------------------------------------------------------------------------------------- torch


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """torch's operators use that many threads while this is entered."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchStep:
    """torch.optim.AdamW over one fp32 parameter, in memory that it is given."""

    def __init__(self, arrays: AdamArrays, *, fused: bool) -> None:
        self._master = torch.nn.Parameter(arrays["master"])
        self._master.grad = arrays["gradient_fp32"]
        self._gradient_bf16 = arrays["gradient_bf16"].view(torch.bfloat16)
        self._weights_bf16 = arrays["weights"].view(torch.bfloat16)
        self._optimizer = torch.optim.AdamW(
            [self._master], lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=fused, foreach=not fused
        )
        # What its first step would make, but on the pages that all contenders share.
        self._optimizer.state[self._master] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": arrays["exp_avg"],
            "exp_avg_sq": arrays["exp_avg_sq"],
        }

    def step(self) -> None:
        """The optimizer alone: fp32 gradient in, fp32 weights out."""
        self._optimizer.step()

    @torch.no_grad()
    def step_with_casts(self) -> None:
        """See Note [Casts]."""
        gradient = self._master.grad
        if not isinstance(gradient, Tensor):
            raise OffloadError("the gradient of torch's contender is gone; nothing may clear it. Please report it.")
        gradient.copy_(self._gradient_bf16)
        self._optimizer.step()
        self._weights_bf16.copy_(self._master)


# --------------------------------------------------------------------------------------------------- DeepSpeed


@dataclass(frozen=True, slots=True)
class Unavailable:
    """A peer that cannot take part, and why."""

    reason: str


def find_deepspeed(python: Path | None) -> Path | Unavailable:
    """The Python that has DeepSpeed: the one that is named, else this one. Raises ConfigError where it is no file."""
    if python is not None:
        if not python.is_file():
            raise ConfigError(f"--deepspeed-python {python} is not a file; name a Python interpreter that exists.")
        return python
    if importlib.util.find_spec("deepspeed") is None:
        return Unavailable(NOT_INSTALLED)
    return Path(sys.executable)


def start_deepspeed(python: Path, *, numel: int, threads: int, seed: int) -> "DeepSpeedWorker | Unavailable":
    """A process with a stepper of `numel` parameters, or why there is none. The caller closes it."""
    worker = DeepSpeedWorker(python, threads)
    try:
        worker.prepare(numel, threads, seed)
    except WorkerFailed as error:
        worker.close()
        return Unavailable(f"installed, but it does not work: {error}")
    except BaseException:
        worker.close()
        raise
    return worker


NOTHING_MORE: Final[Mapping[str, str]] = {}


class WorkerFailed(OffloadError):
    """The process of a peer answered with an error, ended, or answered nothing in time."""


class DeepSpeedWorker:
    """The process; a context manager."""

    def __init__(
        self, python: Path, threads: int, *, script: Path = WORKER, environment: Mapping[str, str] = NOTHING_MORE
    ) -> None:
        self.versions: dict[str, str] = {}
        self._received = b""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - `close` ends it
        self._answers, answers_of_worker = os.pipe()
        try:
            self._process = subprocess.Popen(
                [str(python), str(script), str(answers_of_worker)],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[answers_of_worker],
                env={**worker_environment(python, threads), **environment},
            )
        except BaseException:
            os.close(self._answers)
            self._log.close()
            raise
        finally:
            os.close(answers_of_worker)  # else the end of the process would not be the end of the pipe

    def prepare(self, numel: int, threads: int, seed: int) -> None:
        """Allocate, and compile where that was not done before."""
        answer = self._ask(f"prepare {numel} {threads} {seed}", PREPARE_TIMEOUT_S)
        self.versions = {"deepspeed": answer["versions"].pop("deepspeed")}
        self.versions |= {f"deepspeed_{name}": version for name, version in answer["versions"].items()}

    def step(self) -> float:
        """The optimizer alone; the seconds that the process measured."""
        return float(self._ask("step", STEP_TIMEOUT_S)["seconds"])

    def step_with_casts(self) -> float:
        """See Note [Casts]."""
        return float(self._ask("step_with_casts", STEP_TIMEOUT_S)["seconds"])

    def close(self) -> None:
        """End the process, by force where it does not end by itself; a second call does nothing."""
        if self._log.closed:
            return
        try:
            if self._process.stdin is not None:
                self._process.stdin.close()
        except OSError:  # it ended already, with a command unread
            pass
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._answers)
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, command: str, timeout_s: float) -> dict[str, Any]:
        commands = self._process.stdin
        if commands is None:
            raise WorkerFailed("the standard input of the process is no pipe")
        try:
            commands.write(f"{command}\n".encode())
            commands.flush()
        except OSError as error:
            raise WorkerFailed(self._last_words()) from error
        answer: dict[str, Any] = json.loads(self._line(time.monotonic() + timeout_s, command))
        if "error" in answer:
            raise WorkerFailed(f"`{command}` answered {answer['error']}")
        return answer

    def _line(self, deadline_s: float, command: str) -> bytes:
        while b"\n" not in self._received:
            # Without the deadline a stuck process would hang the benchmark in silence.
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise WorkerFailed(f"no answer to `{command}` in time")
            part = os.read(self._answers, 65_536)
            if not part:
                raise WorkerFailed(self._last_words())
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _last_words(self) -> str:
        """The last line that the process wrote before it ended: of a traceback the error."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "the process ended without a word"


def worker_environment(python: Path, threads: int) -> dict[str, str]:
    """CPU alone, as many threads as everybody, ninja of the same environment, no import from this folder."""
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(threads),
        "PATH": os.pathsep.join([str(python.absolute().parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONSAFEPATH": "1",
    }
