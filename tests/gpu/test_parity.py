"""Training on the accelerator is training: the same bits at every home, the gradients and the losses of torch.

The bodies run on the host device as well, where CI sees them.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.rig import MODELS, in_memory, loss_of, mlp_session, mlp_step, on, train
from tests.training.oracle import adamw, enable

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.05},
    "accumulated": {"micro_batches": 3},
    "bf16": {"precision": "bf16", "accumulate": 1},
    "bf16, clipped, in backward's place": {"precision": "bf16", "max_grad_norm": 0.05, "overlap": "off"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", [pytest.param("gpt", marks=pytest.mark.gpu), "tied gpt"])
def test_every_home_gives_the_same_bits(name: str, options: dict[str, Any], device: str, tmp_path: Path) -> None:
    """But for state at home on an accelerator, which agrees to rounding."""
    plenty, host, disk = (train(name, device, home, tmp_path, **options) for home in ("device", "host", "disk"))
    assert (host.losses, host.sha256) == (disk.losses, disk.sha256)
    if device == "cpu":
        assert (plenty.losses, plenty.sha256) == (host.losses, host.sha256)
    else:  # its state is stepped there by torch's own kernel: device_step.py, Note [Device arithmetic]
        assert plenty.metrics["homes"]["state"]["host"] == 0
        assert plenty.losses == pytest.approx(host.losses, rel=1e-2 if "precision" in options else 1e-4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overlap", ["forward", "backward", "off"])
def test_overlap_changes_no_bit(overlap: str, device: str, tmp_path: Path) -> None:
    expected = train("gpt", device, "host", tmp_path, accumulate=1, overlap="off")
    found = train("gpt", device, "host", tmp_path, accumulate=1, overlap=overlap)
    assert (found.losses, found.sha256) == (expected.losses, expected.sha256)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_torch(name: str, device: str, tmp_path: Path) -> None:
    build, batch_of = MODELS[name]
    plain, model = build().to(device), build()
    batch = on(device, batch_of(1))
    loss_of(plain, batch).backward()
    expected = {key: p.grad.cpu() for key, p in plain.named_parameters() if p.grad is not None}
    with enable(model, adamw(model), "host", tmp_path, device=device) as session:
        loss_of(model, batch).backward()
        found = session.gathered_gradients()
        assert found.keys() == expected.keys()
        for key, gradient in found.items():
            # The host's matrix products may sum in another order where memory is aligned otherwise.
            torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.gpu), "tied gpt"])
def test_losses_follow_torch_adamw(name: str, device: str, tmp_path: Path) -> None:
    found = train(name, device, "host", tmp_path)
    assert found.losses == pytest.approx(in_memory(name, device), abs=1e-4)


def test_everything_crossed_the_link_and_nothing_was_fetched_unplanned(device: str, tmp_path: Path) -> None:
    metrics = train("gpt", device, "disk", tmp_path, precision="bf16", accumulate=1).metrics
    assert all(metrics["bytes_moved"][lane] > 0 for lane in ("h2d", "d2h", "read", "write"))
    assert all(metrics["busy_s"][lane] > 0 for lane in ("h2d", "d2h"))
    assert not any(metrics["unplanned_fetches"])


def test_a_loop_under_a_stream_of_its_own_gives_the_same_bits(device: str) -> None:
    """Autograd runs each hook under the stream of its forward: ours must not assume the default one."""

    def run() -> str:
        model, optimizer, session = mlp_session(64, 6, device, device_memory="96KiB")
        x = torch.ones(8, 64, device=device, dtype=torch.bfloat16)
        for _ in range(4):
            mlp_step(model, optimizer, x)
        found = session.weights_sha256()
        session.close(give_back=False)
        return found

    expected = run()
    if device == "cpu":
        assert run() == expected
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert run() == expected
