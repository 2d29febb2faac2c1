"""Sessions on the accelerator: nothing stops the training thread, memory stays flat and within the plan, races.

What needs a process of its own (a capped allocator, the sanitizer) runs tests/gpu/capped_run.py and sanitized_run.py.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.units import MIB
from tests.gpu import capped_run
from tests.gpu.rig import mlp_session, mlp_step

ROOT = Path(__file__).parents[2]
MANY = 1000
WARM_UP = 20


def run_script(name: str, *arguments: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """The JSON of its last line."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "gpu" / name), *arguments], capture_output=True, text=True, check=False,
        timeout=170, env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


# ------------------------------------------------------------------------------------------------ both devices


def test_nothing_is_left_after_a_session(device: str) -> None:
    for _ in range(2):  # the first run brings in workspaces that stay
        gc.collect()
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        model, optimizer, session = mlp_session(64, 4, device, device_memory="96KiB")
        for _ in range(3):
            mlp_step(model, optimizer, torch.ones(8, 64, device=device, dtype=torch.bfloat16))
        session.close(give_back=False)
        del model, optimizer, session
        gc.collect()
    assert (torch.cuda.memory_allocated() if device == "cuda" else 0) <= before


def test_the_peak_on_the_device_is_within_the_budget(device: str) -> None:
    model, optimizer, session = mlp_session(64, 6, device, device_memory="96KiB")
    for _ in range(4):
        mlp_step(model, optimizer, torch.ones(8, 64, device=device, dtype=torch.bfloat16))
    metrics = session.metrics()
    session.close(give_back=False)
    assert metrics["peak_bytes"]["device"] <= metrics["budget_bytes"]["device"] == 96 * 1024


@pytest.mark.parametrize("what", ["plain", "ours"])
def test_the_run_under_a_cap_trains_where_there_is_room(what: str) -> None:
    losses = capped_run.train(what, "cpu")["losses"]
    assert losses[-1] < losses[0]


# --------------------------------------------------------------------------------------------- the accelerator


@pytest.mark.gpu
def test_a_model_that_torch_cannot_hold_trains_under_a_cap() -> None:
    plain = run_script("capped_run.py", "--device", "cuda", "--what", "plain")
    ours = run_script("capped_run.py", "--device", "cuda", "--what", "ours")
    assert not plain["finished"]
    assert "out of memory" in plain["error"].lower()
    assert ours["finished"], ours["error"]
    assert ours["losses"][-1] < ours["losses"][0]
    assert ours["max_reserved_bytes"] <= ours["cap_bytes"]


@pytest.mark.gpu
def test_the_training_thread_never_waits_for_the_device() -> None:
    model, optimizer, session = mlp_session(256, 8, "cuda", device_memory="1MiB", max_grad_norm=1.0)
    x = torch.ones(8, 256, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        mlp_step(model, optimizer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            mlp_step(model, optimizer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    session.close(give_back=False)


@pytest.mark.gpu
def test_reserved_memory_is_flat_over_many_steps_and_within_the_plan() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    model, optimizer, session = mlp_session(256, 8, "cuda", device_memory="8MiB")
    x = torch.ones(8, 256, device="cuda", dtype=torch.bfloat16)
    for _ in range(WARM_UP):
        mlp_step(model, optimizer, x)
    torch.cuda.synchronize()
    after_warm_up = torch.cuda.memory_reserved()
    for _ in range(MANY - WARM_UP):
        mlp_step(model, optimizer, x)
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() == after_warm_up
    workspaces = 96 * MIB  # of cuBLAS, and activations in blocks of 2 and 20 MiB: the user's
    assert after_warm_up - before <= session.plan.device_bytes + workspaces
    session.close(give_back=False)


@pytest.mark.gpu
def test_the_stream_sanitizer_finds_nothing() -> None:
    found = run_script("sanitized_run.py", environment={"TORCH_CUDA_SANITIZER": "1"})
    assert found["num_copies_seen"] > 0, "the sanitizer must see the copies of our lanes"
    assert found["finished"]


@pytest.mark.gpu
def test_the_stream_sanitizer_finds_a_wait_that_is_missing() -> None:
    found = run_script("sanitized_run.py", "--skip", "WEIGHTS_ARRIVED", environment={"TORCH_CUDA_SANITIZER": "1"})
    assert not found["finished"]
    assert "CUDASanitizerErrors" in found["error"]
