"""The walls: byte budgets are kept, the ledger sees everything, and the optimizer overlaps the next forward."""

import mmap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
import offload.memory.region as region
from offload.cli.gpt import GPT, config_for
from offload.config import make_config
from offload.enable import PlanOf, make_plan, start
from offload.session import Session
from offload.units import KIB, MIB
from tests.doubles.smallest_rings import make_smallest_plan

Result = tuple[list[float], str, dict[str, Any], Session]


def run(
    device_memory: str, host_memory: str, disk: Path | None, *, precision: str = "fp32", steps: int = 3,
    plan_of: PlanOf = make_plan,
) -> Result:  # fmt: skip
    """Train a small GPT built without memory; losses, weights, figures and the closed session."""
    torch.manual_seed(5)
    with offload.deferred_init():
        model = GPT(config_for(400_000, seq=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = make_config(
        device_memory=device_memory, host_memory=host_memory, disk=disk, disk_space=None, precision=precision,
        max_grad_norm=1.0, accumulate=None, wait_timeout_s=60,
    )  # fmt: skip
    tokens = torch.Generator().manual_seed(6)
    losses = []
    with start(model, optimizer, config, "cpu", plan_of=plan_of) as session:
        for _ in range(steps):
            x = torch.randint(0, 256, (2, 17), generator=tokens)
            loss = model(x[:, :-1], x[:, 1:])
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        sha, metrics = session.weights_sha256(), session.metrics()
    return losses, sha, metrics, session


@pytest.mark.parametrize(("precision", "tight"), [("fp32", ("8MiB", "6MiB")), ("bf16", ("6MiB", "4MiB"))])
def test_the_same_bits_on_every_tier(precision: str, tight: tuple[str, str], tmp_path: Path) -> None:
    budgets = [("1GiB", "1GiB"), ("5MiB", "1GiB"), ("4MiB", tight[0]), ("4MiB", tight[1])]
    everywhere = [run(device, host, tmp_path, precision=precision) for device, host in budgets]
    first = everywhere[0]
    for losses, sha, _, _ in everywhere[1:]:
        assert losses == first[0]
        assert sha == first[1]
    moved = [metrics["bytes_moved"] for _, _, metrics, _ in everywhere]
    assert not any(moved[0].values())
    assert moved[1]["h2d"] > 0
    assert moved[1]["read"] == moved[1]["write"] == 0
    assert moved[2]["read"] > 0
    assert list(tmp_path.iterdir()) == []


def test_peaks_stay_within_budgets_and_equal_the_plan(tmp_path: Path) -> None:
    _, _, metrics, session = run("4MiB", "8MiB", tmp_path)
    assert metrics["peak_bytes"]["device"] <= session.plan.device_bytes <= 4 * MIB
    assert metrics["peak_bytes"]["host"] <= session.plan.host_bytes <= 8 * MIB
    assert metrics["peak_bytes"]["disk"] == session.plan.disk_bytes


def test_every_ring_at_its_minimum_still_trains_to_the_same_bits(tmp_path: Path) -> None:
    roomy, tight = run("1GiB", "1GiB", None), run("4MiB", "6MiB", tmp_path, plan_of=make_smallest_plan)
    assert tight[3].plan.step_buffers == tight[3].plan.offload_buffers == tight[3].plan.gradient_slots == 1
    assert tight[:2] == roomy[:2]


def test_the_runtime_allocates_nothing_large_outside_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[int] = []
    grown: list[int] = []
    original_map, original_resize = region.map_anonymous, torch.UntypedStorage.resize_

    def counted_map(num_bytes: int) -> mmap.mmap:
        mapped.append(num_bytes)
        return original_map(num_bytes)

    def counted_resize(storage: torch.UntypedStorage, num_bytes: int) -> Any:
        grown.append(num_bytes - storage.nbytes())
        return original_resize(storage, num_bytes)

    monkeypatch.setattr(region, "map_anonymous", counted_map)
    monkeypatch.setattr(torch.UntypedStorage, "resize_", counted_resize)
    _, _, metrics, session = run("4MiB", "8MiB", tmp_path)
    page_slack = len(mapped) * 4 * KIB
    assert 0 < sum(mapped) <= session.plan.host_bytes + page_slack
    held = peak = 0
    for change in grown:
        held = max(held + change, 0)  # a slot is made with memory, which is let go before anything is counted
        peak = max(peak, held)
    assert 0 < peak <= session.plan.device_bytes
    assert session.plan.host_bytes == metrics["peak_bytes"]["host"] + session.plan.build_bytes


def test_the_step_works_on_late_partitions_when_the_next_forward_has_begun(tmp_path: Path) -> None:
    session = run("4MiB", "8MiB", tmp_path, steps=6)[3]
    kernels = [s for s in session.timeline.spans("step") if not s.is_wait]
    fetched = [s for s in session.timeline.spans("h2d") if not s.is_wait and s.name == "weights h2d: tokens"]
    # A fetch of the first partition that starts while later chunks of the same step are still to come.
    overlapped = [
        f for f in fetched if any(k.name == "step: tokens" and k.stop_s <= f.start_s for k in kernels)
        and any(f.start_s < k.start_s < f.start_s + 1.0 and k.name != "step: tokens" for k in kernels)
    ]  # fmt: skip
    assert overlapped


def test_nothing_is_fetched_unplanned_from_the_second_step_on(tmp_path: Path) -> None:
    metrics = run("4MiB", "8MiB", tmp_path, steps=5)[2]
    assert metrics["unplanned_fetches"][1:] == [0, 0, 0, 0]
    assert metrics["disk_mode"] == "direct"


class _Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("user's own")


def test_an_exception_in_the_loop_leaves_no_thread_and_no_file(tmp_path: Path) -> None:
    before = threading.active_count()
    model = _Failing()
    optimizer = torch.optim.AdamW(model.parameters())
    with (
        pytest.raises(ValueError, match="user's own"),
        offload.enable(model, optimizer, device="cpu", device_memory="1MiB", host_memory="1GiB", disk=tmp_path),
    ):
        model(torch.ones(1, 4))
    assert threading.active_count() == before
    assert list(tmp_path.iterdir()) == []
    assert torch.isfinite(model.inner.weight).all()
