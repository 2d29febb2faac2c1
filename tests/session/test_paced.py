"""The emulated device: real bytes, and times that are never shorter than what is emulated."""

import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from offload.concurrency.lanes import Lanes, Reason
from offload.concurrency.timeline import Timeline
from offload.device.paced import PacedDevice, sleep_until

NUM_BYTES = 10_000
COPY_S = 0.004


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    lanes = Lanes(Timeline(), wait_timeout_s=30.0)
    yield lanes
    lanes.close()


@pytest.fixture
def device(lanes: Lanes) -> PacedDevice:
    return PacedDevice(lanes, link_bytes_per_s=NUM_BYTES / COPY_S)


def some_bytes() -> torch.Tensor:
    return torch.randint(0, 256, (NUM_BYTES,), dtype=torch.uint8)


def test_a_copy_moves_the_bytes_and_is_not_over_before_the_link_is(lanes: Lanes, device: PacedDevice) -> None:
    source, destination = some_bytes(), torch.zeros(NUM_BYTES, dtype=torch.uint8)
    start_s = time.perf_counter()
    device.h2d.copy(destination, source, "x")
    lanes.wait(device.h2d.record().future, Reason.WEIGHTS_ARRIVED)
    assert time.perf_counter() - start_s >= COPY_S
    assert torch.equal(destination, source)


def test_copies_of_one_direction_take_turns(lanes: Lanes, device: PacedDevice) -> None:
    start_s = time.perf_counter()
    for _ in range(3):
        device.h2d.copy(torch.empty(NUM_BYTES, dtype=torch.uint8), some_bytes(), "x")
    lanes.wait(device.h2d.record().future, Reason.WEIGHTS_ARRIVED)
    assert time.perf_counter() - start_s >= 3 * COPY_S
    spans = lanes.timeline.spans("h2d")
    assert all(after.start_s >= before.stop_s for before, after in pairwise(spans))
    assert all(span.stop_s - span.start_s >= COPY_S * 0.999 for span in spans)


def test_each_direction_has_the_whole_bandwidth(lanes: Lanes, device: PacedDevice) -> None:
    device.link.bytes_per_s = NUM_BYTES / 0.2  # longer than this thread may be kept from submitting the second
    for queue in (device.h2d, device.d2h):
        queue.copy(torch.empty(NUM_BYTES, dtype=torch.uint8), some_bytes(), "x")
    for queue in (device.h2d, device.d2h):
        lanes.wait(queue.record().future, Reason.DRAIN)
    (down,), (up,) = lanes.timeline.spans("h2d"), lanes.timeline.spans("d2h")
    assert up.start_s < down.stop_s
    assert down.start_s < up.stop_s


def test_a_copy_within_the_device_does_not_take_the_link(lanes: Lanes, device: PacedDevice) -> None:
    device.link.bytes_per_s = 1.0  # hours for these bytes
    source, destination = some_bytes(), torch.zeros(NUM_BYTES, dtype=torch.uint8)
    device.h2d.copy(destination, source, "x", crosses_link=False)
    lanes.wait(device.h2d.record().future, Reason.WEIGHTS_ARRIVED)
    assert torch.equal(destination, source)
    assert not lanes.timeline.spans("h2d")


def test_compute_takes_its_time_together_with_what_is_done_in_it(lanes: Lanes, device: PacedDevice) -> None:
    start_s = time.perf_counter()
    for _ in range(3):
        with device.compute_for(COPY_S, "forward"):
            some_bytes()
    spans = lanes.timeline.spans("compute")
    assert [span.name for span in spans] == ["forward"] * 3
    assert time.perf_counter() - start_s >= 3 * COPY_S - 1e-6  # what one is late the next is shorter


def test_nobody_sleeps_until_a_time_that_has_passed() -> None:
    start_s = time.perf_counter()
    sleep_until(start_s - 3600.0)
    assert time.perf_counter() - start_s < 60.0
