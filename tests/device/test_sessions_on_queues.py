"""Whole sessions on the accelerator's own queues, over streams that are not there: the bits are those of the host."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.concurrency.lanes import Lanes
from offload.concurrency.timeline import Timeline
from offload.config import make_config
from offload.device.accelerator import AcceleratorDevice
from offload.device.host import HostDevice
from offload.device.page_lock import Borders, HostRegistration
from offload.device.queues import AcceleratorComputeQueue, AcceleratorQueue
from offload.enable import start
from tests.doubles.event_streams import FakeRuntime, FakeStreams
from tests.training.models import mlp

BUDGETS = {"host": ("24KiB", "1GiB"), "all on disk": ("24KiB", "165KiB"), "weights on device": ("1MiB", "1GiB")}


class QueuesOfMemory:
    """A device of the product's queues; its memory is the host's, which nothing but the queues may touch."""

    is_host = False
    slots_share_a_block = False
    numa_node = -1
    reserve_slots: Callable[..., None] = AcceleratorDevice.reserve_slots

    def __init__(self, lanes: Lanes) -> None:
        self.torch_device = torch.device("cpu")
        self.streams = FakeStreams()
        self.runtime = FakeRuntime()
        borders = Borders()
        self._registration = HostRegistration(self.runtime, borders, part_bytes=12_288)
        self.compute = AcceleratorComputeQueue(self.streams, lanes)
        self.h2d, self.d2h, self.collective = (
            AcceleratorQueue(name, self.streams, lanes, borders) for name in ("h2d", "d2h", "collective")
        )

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def register(self, address: int, num_bytes: int) -> Callable[[], None]:
        return self._registration.lock(address, num_bytes, lambda: None)

    def free_bytes(self) -> int:
        return 1 << 40

    def close(self) -> None:
        assert all(event.query() for event in self.streams.events)


def run(device_of: Callable[[Lanes], Any], budgets: tuple[str, str], folder: Path) -> tuple[str, dict[str, Any], Any]:
    """Bits of the weights, metrics, device."""
    devices: list[Any] = []

    def made(name: Any, lanes: Lanes) -> Any:
        devices.append(device_of(lanes))
        return devices[0]

    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    device_memory, host_memory = budgets
    config = make_config(
        device_memory=device_memory, host_memory=host_memory, disk=folder, disk_space=None, precision="bf16",
        max_grad_norm=1.0, accumulate=None, wait_timeout_s=20.0,
    )  # fmt: skip
    session = start(model, optimizer, config, "cpu", device_of=made)
    try:
        for step in range(4):
            x = torch.full((4, 64), 0.1 * (step + 1))
            model(x).float().square().mean().backward()
            session.step()
            optimizer.zero_grad()
        return session.weights_sha256(), session.metrics(), devices[0]
    finally:
        session.close(give_back=False)


@pytest.mark.parametrize("home", BUDGETS)
def test_a_session_on_the_accelerators_queues_gives_the_bits_of_the_host(home: str, tmp_path: Path) -> None:
    expected, on_host, _ = run(HostDevice, BUDGETS[home], tmp_path)
    found, metrics, device = run(QueuesOfMemory, BUDGETS[home], tmp_path)
    assert found == expected
    if home != "weights on device":  # elsewhere the same bytes cross the link; there the host needs no copies at all
        moved, expected_moved = ({**each["bytes_moved"]} for each in (metrics, on_host))
        if home == "all on disk":  # weights that a fetch waits for when they are stepped are not read back
            moved["read"] = expected_moved["read"] = 0
        assert moved == expected_moved
    assert device.runtime.locked == {}, "every region was unlocked"
    assert list(tmp_path.iterdir()) == []


def test_slots_are_reserved_in_one_block_of_the_slots_own_memory() -> None:
    lanes = Lanes(Timeline(), wait_timeout_s=10.0)
    device = QueuesOfMemory(lanes)
    device.reserve_slots(4096)
    assert device.streams.calls.count("slot memory under stream 1") == 2
    lanes.close()
