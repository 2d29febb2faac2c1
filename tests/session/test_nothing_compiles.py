"""Kernels are compiled when a session starts, never while it trains."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import torch
from torch import nn
from numba.core import event

import offload

folder, precision = sys.argv[1:]
torch.manual_seed(0)
model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)), nn.Linear(64, 8))
groups = [{"params": list(model[:2].parameters())}, {"params": list(model[2:].parameters()), "lr": 1e-3}]
optimizer = torch.optim.AdamW(groups, lr=1e-2)
recorder = event.RecordingListener()
event.register("numba:compile", recorder)
budgets = {"device_memory": "24KiB", "host_memory": "260KiB"}
with offload.enable(model, optimizer, device="cpu", disk=folder, precision=precision, **budgets) as session:
    before = len(recorder.buffer)
    for number in range(3):
        for _ in range(1 + number % 2):
            skips = model[1:] if number == 1 else model  # a block without a gradient
            session.backward(skips(torch.ones(2, 64, dtype=torch.bfloat16)).float().sum())
        session.step()
        optimizer.zero_grad()
    model.state_dict()
    with session.gathered() as masters:
        masters["0.0.weight"].add_(1.0)
    after = len(recorder.buffer)
names = sorted({str(each.data["dispatcher"]) for _, each in recorder.buffer[before:after]})
print(before, after, *names, sep="\\n")
"""


def test_after_the_start_nothing_is_compiled(tmp_path: Path) -> None:
    (tmp_path / "swap").mkdir()
    # an empty cache: what is not compiled at the start would be compiled later
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "swap"), "bf16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=170)
    assert done.returncode == 0, done.stderr
    before, after, *names = done.stdout.splitlines()
    assert int(before) > 0
    assert after == before, names
