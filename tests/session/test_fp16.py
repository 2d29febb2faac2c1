"""fp16: dynamic loss scaling, skipped steps, and the same bits whatever the homes."""

from pathlib import Path

import pytest
import torch
from torch import nn

import offload
from offload.errors import ConfigError, NonFiniteError
from offload.optimizer.loss_scale import GROWTH_INTERVAL, INITIAL_SCALE, LossScale
from tests.training.models import mlp

HOMES = {"device": ("1GiB", "1GiB"), "host": ("24KiB", "1GiB"), "disk": ("24KiB", "180KiB")}


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = mlp()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def run(home: str, folder: Path, overflow_at: set[int]) -> tuple[str, list[tuple[float, bool]]]:
    model, optimizer = make()
    device, host = HOMES[home]
    results = []
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    with offload.enable(
        model, optimizer, device="cpu", device_memory=device, host_memory=host, disk=folder, precision="fp16",
        max_grad_norm=1.0,
    ) as session:  # fmt: skip
        for step in range(6):
            loss = model(x).float().square().mean()
            session.backward(loss * (1e30 if step in overflow_at else 1.0))
            result = session.step()
            results.append((result.loss_scale, result.skipped))
            optimizer.zero_grad()
        return session.weights_sha256(), results


def test_overflows_are_skipped_and_halve_the_scale_on_every_home_alike(tmp_path: Path) -> None:
    runs = [run(home, tmp_path, {1, 2}) for home in HOMES]
    assert runs[0] == runs[1] == runs[2]
    scale = INITIAL_SCALE
    assert runs[0][1] == [
        (scale, False), (scale, True), (scale / 2, True), (scale / 4, False), (scale / 4, False), (scale / 4, False)
    ]  # fmt: skip


def test_a_plain_backward_raises_at_the_step_with_the_remedy(tmp_path: Path) -> None:
    model, optimizer = make()
    with offload.enable(model, optimizer, device="cpu", device_memory="1GiB", precision="fp16"):
        model(torch.ones(1, 64)).float().sum().backward()
        with pytest.raises(ConfigError, match=r"session\.backward\(loss\)"):
            optimizer.step()


def test_too_many_skips_in_a_row_name_the_first_parameter(tmp_path: Path) -> None:
    model, optimizer = make()
    with offload.enable(
        model, optimizer, device="cpu", device_memory="1GiB", precision="bf16", max_skipped_steps=3
    ) as session:  # fmt: skip
        for _ in range(3):
            session.backward(model(torch.ones(1, 64)).float().sum() * float("nan"))
            session.step()
            optimizer.zero_grad()
        with pytest.raises(NonFiniteError, match=r"3 steps.*0\.0\.weight"):
            session.backward(model(torch.ones(1, 64)).float().sum())  # looks at the third


def test_the_scale_follows_torchs_grad_scaler() -> None:
    ours, theirs = LossScale(dynamic=True), 2.0**16
    good = 0
    for step in range(3 * GROWTH_INTERVAL):
        skipped = step in (5, 6, GROWTH_INTERVAL + 100)
        ours.update(skipped=skipped)
        theirs, good = (theirs / 2, 0) if skipped else (theirs, good + 1)
        if good == GROWTH_INTERVAL:
            theirs, good = theirs * 2, 0
        assert ours.value == theirs
