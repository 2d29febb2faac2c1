"""Our side of step_vs_deepspeed.py: weights, gradients and state under byte budgets.

Owns: its loop. Run as a script by this Python.
Does not: choose budgets: they are in the order, the only argument.
Threads: the main thread, and the session's.
"""

import torch
from llama_loop import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    answer,
    asked_of_me,
    make_model,
    resident_bytes,
    run_iterations,
)
from torch import Tensor

import offload
from benchmarks.measure.result import versions


def main() -> None:
    """Train, and answer."""
    asked = asked_of_me()
    baseline_bytes = resident_bytes("VmHWM")
    model = make_model(asked["layers"], asked["seed"], asked["precision"])
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    session = offload.enable(
        model, optimizer, device="cpu", device_memory=asked["device_bytes"], host_memory=asked["host_bytes"],
        disk=asked["disk"], precision=asked["precision"], accumulate=1, max_grad_norm=MAX_GRAD_NORM,
    )  # fmt: skip

    def iterate(tokens: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def settle() -> None:
        session.metrics()  # waits until nothing is under way

    def bytes_and_waits() -> dict[str, dict[str, float]]:
        return {name: dict(session.metrics()[name]) for name in ("bytes_moved", "busy_s", "wait_s")}

    before: list[dict[str, dict[str, float]]] = []

    def settle_and_note() -> None:
        settle()
        before.append(bytes_and_waits())

    try:
        found = run_iterations(iterate, settle_and_note, asked)
        start, stop = before
        metrics = session.metrics()
        found["by_lane"] = {
            name: {lane: value - start[name].get(lane, 0) for lane, value in stop[name].items()} for name in stop
        }
        found["session"] = {name: metrics[name] for name in ("budget_bytes", "peak_bytes", "homes", "disk_mode")}
        found["waits_by_reason_s"] = {
            lane: totals.waits_by_reason_s for lane, totals in session.timeline.totals().items()
        }
        found["plan"] = session.plan.table()
    finally:
        session.close(give_back=False)
    found |= {"baseline_rss_bytes": baseline_bytes, "parameters": num_parameters}
    found["versions"] = versions(("numpy", "numba"))
    answer(asked, found)


if __name__ == "__main__":
    main()
