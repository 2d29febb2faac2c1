"""Everything as late as is legal: the same bits with every wait, other bits or an error without one."""

from pathlib import Path

import pytest
import torch
from torch import nn

from offload.config import make_config
from offload.errors import OffloadError
from offload.lanes import Lanes, Reason
from offload.start import start
from offload.timeline import Timeline
from tests.doubles.late import LateLanes

# Weights have the first claim on the host: at `state on disk` they are there, at `all on disk` most are not.
BUDGETS = {
    "bf16": {"host": ("24KiB", "1GiB"), "state on disk": ("24KiB", "220KiB"), "all on disk": ("24KiB", "165KiB")},
    "fp32": {"host": ("40KiB", "1GiB"), "state on disk": ("40KiB", "300KiB"), "all on disk": ("40KiB", "185KiB")},
}
HOMES = list(BUDGETS["bf16"])

Outcome = tuple[list[float], str]


def run(
    lanes: Lanes,
    home: str,
    folder: Path,
    *,
    skipped: tuple[Reason, ...] = (),
    precision: str = "bf16",
    accumulate: int | None = None,
    micro_batches: int = 1,
) -> Outcome:
    """Four steps with clipping; losses and weights."""
    torch.manual_seed(2)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(5)), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    device, host = BUDGETS[precision][home]
    config = make_config(
        device_memory=device,
        host_memory=host,
        disk=folder,
        disk_space=None,
        precision=precision,
        max_grad_norm=1.0,
        accumulate=accumulate,
        wait_timeout_s=5.0,
    )
    session = start(model, optimizer, config, "cpu", lanes=lanes, late_io=isinstance(lanes, LateLanes))
    lanes.skipped_waits |= set(skipped)
    inputs = torch.Generator().manual_seed(1)
    losses = []
    try:
        for _ in range(4):
            for _ in range(micro_batches):
                loss = model(torch.randn(4, 64, generator=inputs)).float().square().mean()
                losses.append(loss.item())
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return losses, session.weights_sha256()
    finally:
        lanes.skipped_waits.clear()
        session.close(give_back=False)


def threads() -> Lanes:
    return Lanes(Timeline(), wait_timeout_s=30.0)


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize(
    ("precision", "accumulate", "micro_batches"), [("fp32", None, 1), ("bf16", 1, 1), ("bf16", 3, 3)]
)
def test_everything_late_gives_the_bits_of_threads(
    home: str, precision: str, accumulate: int | None, micro_batches: int, tmp_path: Path
) -> None:
    more = {"precision": precision, "accumulate": accumulate, "micro_batches": micro_batches}
    assert run(LateLanes(), home, tmp_path, **more) == run(threads(), home, tmp_path, **more)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


HAZARDS = {
    "fetch before the weights were published": (Reason.PUBLISHED, "host"),
    "weights used before they arrived": (Reason.WEIGHTS_ARRIVED, "host"),
    "host reads a gradient before it landed": (Reason.GRADIENT_ON_HOST, "host"),
    "norm taken before all gradients landed": (Reason.LANDED, "host"),
    "slab lent while its last user has not begun": (Reason.SLAB_RETURNED, "state on disk"),
    "slab lent while a transfer uses it": (Reason.SLAB_FREE, "state on disk"),
    "state stepped before it was read": (Reason.STATE_READ, "state on disk"),
    "weights copied on before they were read from disk": (Reason.READ, "all on disk"),
}


@pytest.mark.parametrize("hazard", HAZARDS)
def test_without_its_wait_a_hazard_shows(hazard: str, tmp_path: Path) -> None:
    reason, home = HAZARDS[hazard]
    expected = run(LateLanes(), home, tmp_path)
    try:
        outcome = run(LateLanes(), home, tmp_path, skipped=(reason,))
    except (RuntimeError, OffloadError):
        return  # seen as an error
    assert outcome != expected
