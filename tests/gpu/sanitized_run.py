"""A few steps under torch's stream sanitizer, our lanes included. Prints one line of JSON.

    TORCH_CUDA_SANITIZER=1 python tests/gpu/sanitized_run.py [--skip WEIGHTS_ARRIVED]

The sanitizer sees operators of the threads that its mode was entered in: the main one, and autograd's. Copies of lanes
would go unseen, so each enters the mode for itself; events and streams it sees from any thread. Its tables are not made
for several threads: one lock is held for every operator that it looks at.
"""

import argparse
import json
import os
import sys
import threading
from typing import Any

import torch
import torch.cuda._sanitizer as sanitizer

from offload.concurrency.lanes import Reason
from offload.device import accelerator
from tests.gpu.rig import mlp_session, mlp_step

STEPS = 4
lock = threading.RLock()
num_copies = 0


class SharedMode(sanitizer.CUDASanitizerDispatchMode):
    """The mode of one thread, with the tables of the main one."""

    def __init__(self, event_handler: Any) -> None:
        torch.utils._python_dispatch.TorchDispatchMode.__init__(self)
        self.event_handler = event_handler


def watch_lanes(event_handler: Any, skipped: str | None) -> None:
    """Every copy of ours goes by the sanitizer; a wait named `skipped` is left out."""
    looking = sanitizer.CUDASanitizerDispatchMode.__torch_dispatch__

    def one_at_a_time(self: Any, *arguments: Any, **named: Any) -> Any:
        with lock:
            return looking(self, *arguments, **named)

    sanitizer.CUDASanitizerDispatchMode.__torch_dispatch__ = one_at_a_time  # type: ignore[method-assign]
    copying, waiting = accelerator.AcceleratorQueue.copy, accelerator.AcceleratorComputeQueue.after

    def copy(self: Any, *arguments: Any, **named: Any) -> None:
        global num_copies
        with lock, SharedMode(event_handler):
            num_copies += 1
            copying(self, *arguments, **named)

    def after(self: Any, mark: Any, reason: Reason) -> None:
        if reason.name != skipped:
            with lock:
                waiting(self, mark, reason)

    accelerator.AcceleratorQueue.copy = copy  # type: ignore[method-assign]
    accelerator.AcceleratorComputeQueue.after = after  # type: ignore[method-assign]


def main() -> int:
    """Run, and answer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--skip", choices=[reason.name for reason in Reason])
    options = parser.parse_args()
    if not os.environ.get("TORCH_CUDA_SANITIZER"):
        raise SystemExit("set TORCH_CUDA_SANITIZER=1")
    torch.cuda.init()
    watch_lanes(sanitizer.cuda_sanitizer.dispatch.event_handler, options.skip)
    found: dict[str, Any] = {"finished": False}
    try:
        model, optimizer, session = mlp_session(256, 6, "cuda", device_memory="1MiB")
        x = torch.ones(8, 256, device="cuda", dtype=torch.bfloat16)
        for _ in range(STEPS):
            mlp_step(model, optimizer, x)
        session.metrics()
        session.close(give_back=False)
        found["finished"] = True
    except BaseException as error:
        found["error"] = f"{type(error).__name__}: {error} / {error.__cause__!r}"
    found["num_copies_seen"] = num_copies
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)  # threads of a run that was stopped midway may still wait


if __name__ == "__main__":
    raise SystemExit(main())
