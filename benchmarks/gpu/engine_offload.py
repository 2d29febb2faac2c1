"""This library: weights, gradients and state under byte budgets."""

from typing import Any

import torch
from llama import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Engine, Losses
from torch import Tensor

import offload
from benchmarks.measure.result import versions
from offload.concurrency.lanes import COMPUTE_STREAM, TRAINING_LANE
from offload.report.lane_shares import shares

PER_LANE = ("bytes_moved", "busy_s", "wait_s")


def make(model: Losses, asked: dict[str, Any]) -> Engine:
    """`offload.enable` with the budgets of the row."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    overlap = "forward" if asked["clip"] else "backward"  # without a norm to wait for, a step need not wait at all
    session = offload.enable(
        model, optimizer, device=asked["device"], device_memory=asked["device_bytes"],
        host_memory=asked["host_bytes"], disk=asked["disk"] if asked.get("state_on_disk") else None, precision="bf16",
        accumulate=1, max_grad_norm=MAX_GRAD_NORM if asked["clip"] else None, state_dtype=asked["state_dtype"],
        overlap=overlap,
    )  # fmt: skip

    def begin() -> None:
        session.metrics()  # waits until nothing is under way
        session.timeline.restart()

    def backward(loss: Tensor) -> None:
        loss.backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def figures() -> dict[str, Any]:
        metrics = session.metrics()
        spans = session.timeline.spans()
        compute = COMPUTE_STREAM if any(span.lane == COMPUTE_STREAM for span in spans) else TRAINING_LANE
        return {
            **{name: metrics[name] for name in (*PER_LANE, "homes", "peak_bytes", "budget_bytes", "disk_mode")},
            "waited_lane": compute,
            "waited_s": metrics["wait_s"].get(compute, 0.0),
            "exposed_s": {lane: share.exposed_s for lane, share in shares(spans, compute).items()},
            "waits_by_reason_s": {lane: totals.waits_by_reason_s for lane, totals in session.timeline.totals().items()},
        }

    return Engine(
        model, backward, step, settle=session.metrics, begin=begin, figures=figures,
        close=lambda: session.close(give_back=False),
        facts={
            "state": f"fp32 master, {asked['state_dtype']} moments", "overlap": overlap, "plan": session.plan.table(),
            "versions": versions(("numpy", "numba")),
        },
    )  # fmt: skip
