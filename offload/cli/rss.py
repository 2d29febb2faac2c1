"""Resident memory of this program: its peak, and what it needs before any training.

Owns: reading the peak from the kernel, and the baseline that a run's peak is compared with.
Does not: count the library's own bytes (memory/ledger.py does, exactly).
Threads: the main thread.

The baseline is measured in a process of its own (`python -m offload.cli.rss PRECISION` prints it): a peak cannot be
lowered again, so a process that measured itself would report its own measurement.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import torch

import offload
from offload.cli.gpt import GPT, GPTConfig
from offload.errors import OffloadError
from offload.report.console import Console
from offload.units import KIB

BASELINE_CONFIG: Final = GPTConfig(width=64, depth=1, seq=16)
BASELINE_BUDGET: Final = "32MiB"
BASELINE_STEPS: Final = 2
"""The first makes what later ones keep: the second is a warm one."""


def peak_rss_bytes() -> int:
    """The most memory that was resident in this process at any time (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    if match is None:
        raise OffloadError("/proc/self/status has no line VmHWM; peak memory can be measured on Linux only.")
    return int(match.group(1)) * KIB


def measure_baseline_rss_bytes(precision: str) -> int:
    """Peak of a fresh process that imports the library, loads the kernels and trains a one-layer model warm."""
    command = [sys.executable, "-m", "offload.cli.rss", precision]
    alone = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OffloadError(
            f"the process that measures the baseline ended with {done.returncode}: {last_line} "
            f"Run it to see why: {' '.join(command)}"
        )
    return int(done.stdout.split()[-1])


def train_one_layer(precision: str) -> None:
    """The least that trains: import, kernels, session, `BASELINE_STEPS` steps."""
    model = GPT(BASELINE_CONFIG)
    optimizer = torch.optim.AdamW(model.parameters())
    session = offload.enable(
        model, optimizer, device_memory=BASELINE_BUDGET, host_memory=BASELINE_BUDGET, precision=precision
    )
    try:
        tokens = torch.zeros(1, BASELINE_CONFIG.seq, dtype=torch.int64)
        for _ in range(BASELINE_STEPS):
            model(tokens, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        session.weights_sha256()
    finally:
        session.close(give_back=False)


if __name__ == "__main__":
    train_one_layer(sys.argv[1])
    Console(sys.stdout).line(str(peak_rss_bytes()))
