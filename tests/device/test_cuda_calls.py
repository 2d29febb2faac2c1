"""What the accelerator says to torch.cuda, by the rules of torch and of CUDA. No accelerator is needed.

torch's own Python code runs, over C functions that are not there (tests/doubles/cuda_layer.py).
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from offload.concurrency.lanes import Lanes, Reason
from offload.concurrency.timeline import Timeline
from offload.device.accelerator import AcceleratorDevice
from offload.device.host import HostDevice
from offload.errors import SessionFailedError
from tests.device.test_sessions_on_queues import run
from tests.doubles.cuda_layer import CudaLayer

BUDGETS = {"host": ("40KiB", "1GiB"), "disk": ("40KiB", "170KiB"), "device": ("1MiB", "1GiB")}


@pytest.fixture
def layer() -> CudaLayer:
    return CudaLayer(num_devices=2)


@pytest.fixture
def device_of(layer: CudaLayer, monkeypatch: pytest.MonkeyPatch) -> Callable[[Lanes], AcceleratorDevice]:
    """The second device; its tensors are in the host's memory."""

    def made(lanes: Lanes) -> AcceleratorDevice:
        layer.install(monkeypatch)
        device = AcceleratorDevice(torch.device("cuda", 1), lanes)
        device.torch_device = torch.device("cpu")
        return device

    return made


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    lanes = Lanes(Timeline(), wait_timeout_s=10.0)
    yield lanes
    lanes.close()


@pytest.mark.parametrize("home", BUDGETS)
def test_a_session_on_one_device_takes_nothing_of_another(
    home: str, layer: CudaLayer, device_of: Callable[[Lanes], AcceleratorDevice], tmp_path: Path
) -> None:
    """Scenario: the training thread's current device is the first, as without `set_device`, and every lane's, too."""
    expected, _, _ = run(HostDevice, BUDGETS[home], tmp_path)
    found, metrics, _ = run(device_of, BUDGETS[home], tmp_path)
    assert found == expected
    assert metrics["homes"]["state"][home] == sum(metrics["homes"]["state"].values())
    assert layer.contexts == {1}
    assert (layer.device(), layer.stream(0), layer.stream(1)) == (0, 0, 0), "the training thread keeps its own"
    assert layer.runtime.locked == {}
    assert layer.pools == {}


def test_slots_get_what_torch_has_cached(
    layer: CudaLayer, device_of: Callable[[Lanes], AcceleratorDevice], lanes: Lanes
) -> None:
    device_of(lanes).reserve_slots(4096)
    assert layer.calls[:2] == ["empty cache", "pool under stream 1 of 1"], "torch gives nothing up for a pool's memory"


@pytest.mark.parametrize("queue", ["h2d", "compute"])
def test_a_lost_device_is_named_by_whoever_waits_for_it(
    queue: str, layer: CudaLayer, device_of: Callable[[Lanes], AcceleratorDevice], lanes: Lanes
) -> None:
    device = device_of(lanes)
    layer.lost = True
    with pytest.raises(SessionFailedError, match=f"{queue} waiter: waiting for the device: .*illegal.* start it again"):
        lanes.wait(getattr(device, queue).record().future, Reason.WEIGHTS_ARRIVED)


def test_closing_a_lost_device_says_so_and_ends_nothing_else(
    layer: CudaLayer,
    device_of: Callable[[Lanes], AcceleratorDevice],
    lanes: Lanes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = device_of(lanes)
    layer.lost = True
    with caplog.at_level(logging.WARNING, logger="offload"):
        device.close()
    del device
    assert "CUDA error: an illegal memory access" in caplog.text
    assert "process ended" not in layer.calls, "torch frees a pool where a failure ends the process"
