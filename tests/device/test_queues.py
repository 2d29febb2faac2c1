"""What an accelerator's queues say to its streams, and what the timeline then shows. No accelerator is needed."""

import threading
from collections.abc import Iterator

import pytest
import torch

from offload.concurrency.lanes import COMPUTE_STREAM, Lanes, Reason
from offload.concurrency.timeline import Timeline
from offload.device.host import HostDevice
from offload.device.page_lock import Borders
from offload.device.queues import AcceleratorComputeQueue, AcceleratorQueue, EventClock, named
from offload.errors import BudgetError, ConfigError, DeviceError
from tests.doubles.event_streams import FakeEvent, FakeStreams


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    lanes = Lanes(Timeline(), wait_timeout_s=10.0)
    yield lanes
    lanes.close()


def queue_of(streams: FakeStreams, lanes: Lanes, name: str = "h2d") -> AcceleratorQueue:
    return AcceleratorQueue(name, streams, lanes, Borders())


def some_bytes(num_bytes: int = 64) -> torch.Tensor:
    return torch.arange(num_bytes, dtype=torch.uint8)


def test_copies_between_two_marks_are_one_span_with_their_time_on_the_device(lanes: Lanes) -> None:
    streams = FakeStreams()
    queue = queue_of(streams, lanes)
    destination = torch.zeros(64, dtype=torch.uint8)
    queue.copy(destination[:32], some_bytes()[:32], "weights 1")
    queue.copy(destination[32:], some_bytes()[32:], "weights 1")
    streams.time_ms = 250.0
    lanes.wait(queue.record().future, Reason.WEIGHTS_ARRIVED)
    (span,) = lanes.timeline.spans("h2d")
    assert (span.name, span.num_bytes) == ("weights 1", 64)
    assert span.stop_s - span.start_s == pytest.approx(0.25)
    assert torch.equal(destination, some_bytes())


def test_another_name_or_a_wait_on_the_stream_ends_a_span(lanes: Lanes) -> None:
    streams = FakeStreams()
    queue = queue_of(streams, lanes)
    for name in ("weights 1", "weights 2"):
        queue.copy(torch.zeros(64, dtype=torch.uint8), some_bytes(), name)
    streams.time_ms = 10.0
    queue.after(AcceleratorComputeQueue(streams, lanes).record(), Reason.SLOT_RELEASED)
    streams.time_ms = 500.0
    queue.copy(torch.zeros(64, dtype=torch.uint8), some_bytes(), "weights 2")
    lanes.wait(queue.record().future, Reason.WEIGHTS_ARRIVED)
    spans = lanes.timeline.spans("h2d")
    assert [span.name for span in spans] == ["weights 1", "weights 2", "weights 2"]
    assert sum(span.stop_s - span.start_s for span in spans) == pytest.approx(0.01)


def test_a_copy_within_the_device_is_not_counted_as_crossing_the_link(lanes: Lanes) -> None:
    queue = queue_of(FakeStreams(), lanes)
    queue.copy(torch.zeros(64, dtype=torch.uint8), some_bytes(), "x", crosses_link=False)
    lanes.wait(queue.record().future, Reason.WEIGHTS_ARRIVED)
    assert lanes.timeline.spans("h2d") == []
    assert lanes.timeline.totals()["h2d local"].num_bytes == 64


def test_a_pass_over_device_memory_takes_no_time_of_the_link(lanes: Lanes) -> None:
    streams = FakeStreams()
    queue = queue_of(streams, lanes)
    queue.copy(torch.zeros(64, dtype=torch.uint8), some_bytes(), "weights 1")
    streams.time_ms = 10.0
    queue.run(lambda: None, "kernel 1", 0)
    streams.time_ms = 50.0
    lanes.wait(queue.record().future, Reason.WEIGHTS_ARRIVED)
    totals = lanes.timeline.totals()
    assert (totals["h2d"].num_bytes, totals["h2d"].busy_s) == (64, pytest.approx(0.01))
    assert totals["h2d local"].busy_s == pytest.approx(0.04)


def test_a_mark_is_done_when_its_event_has_passed_and_not_before(lanes: Lanes) -> None:
    streams = FakeStreams(holds=True)
    queue = queue_of(streams, lanes)
    queue.copy(torch.zeros(64, dtype=torch.uint8), some_bytes(), "x")
    mark = queue.record()
    later = threading.Timer(0.05, streams.let_pass)
    assert not mark.future.done()
    later.start()
    lanes.wait(mark.future, Reason.GRADIENT_ON_HOST)
    assert mark.event.query()
    later.join()


def test_a_mark_recorded_twice_is_one_event_until_something_is_submitted(lanes: Lanes) -> None:
    streams = FakeStreams()
    queue, compute = queue_of(streams, lanes), AcceleratorComputeQueue(streams, lanes)
    queue.copy(torch.zeros(64, dtype=torch.uint8), some_bytes(), "x")
    first = queue.record()
    assert queue.record() is first
    queue.after(compute.record(), Reason.SLOT_RELEASED)
    assert queue.record() is not first


def test_the_stream_waits_for_the_mark_before_what_is_submitted_next(lanes: Lanes) -> None:
    streams = FakeStreams(holds=True)
    queue, compute = queue_of(streams, lanes), AcceleratorComputeQueue(streams, lanes)
    released = compute.record()
    queue.after(released, Reason.SLOT_RELEASED)
    flat = torch.zeros(64, dtype=torch.uint8)
    queue.resize(flat, 0)
    queue.resize(flat, 64)
    waits = streams.calls.index("stream 1 waits for event 0")
    assert streams.calls.index("slot memory under stream 1") > waits
    assert streams.calls.count("slot memory under stream 1") == 2
    assert flat.untyped_storage().nbytes() == 64
    streams.let_pass()


def test_compute_shows_how_long_its_stream_stood_still(lanes: Lanes) -> None:
    streams = FakeStreams(holds=True)
    queue, compute = queue_of(streams, lanes), AcceleratorComputeQueue(streams, lanes)
    queue.copy(torch.zeros(64, dtype=torch.uint8), some_bytes(), "weights 1")
    arrived = queue.record()
    waiting = streams.wait

    def wait(stream: str, event: FakeEvent) -> None:
        waiting(stream, event)
        streams.time_ms += 40.0

    streams.wait = wait  # type: ignore[method-assign]
    compute.after(arrived, Reason.WEIGHTS_ARRIVED)
    streams.let_pass()
    lanes.drain()
    (span,) = lanes.timeline.spans(COMPUTE_STREAM)
    assert (span.name, span.is_wait) == (Reason.WEIGHTS_ARRIVED, True)
    assert span.stop_s - span.start_s == pytest.approx(0.04)


def test_what_has_arrived_already_is_ordered_but_is_no_wait(lanes: Lanes) -> None:
    streams = FakeStreams()
    queue, compute = queue_of(streams, lanes), AcceleratorComputeQueue(streams, lanes)
    compute.after(queue.record(), Reason.WEIGHTS_ARRIVED)
    lanes.drain()
    assert "default waits for event 0" in streams.calls
    assert lanes.timeline.spans(COMPUTE_STREAM) == []


def test_a_collective_runs_under_its_own_stream_and_is_timed(lanes: Lanes) -> None:
    streams = FakeStreams()
    collective, h2d = queue_of(streams, lanes, "collective"), queue_of(streams, lanes)
    ran: list[str] = []
    collective.after(h2d.record(), Reason.WEIGHTS_ARRIVED)
    collective.run(lambda: ran.append(streams.current_stream()), "all-gather 1", 100)
    streams.time_ms = 30.0
    lanes.wait(collective.record().future, Reason.WEIGHTS_ARRIVED)
    assert ran == ["stream 1"]
    (span,) = lanes.timeline.spans("collective")
    assert (span.name, span.num_bytes, span.stop_s - span.start_s) == ("all-gather 1", 100, pytest.approx(0.03))


def test_on_the_host_a_collective_is_over_when_run_returns() -> None:
    lanes = Lanes(Timeline(), wait_timeout_s=10.0)
    device = HostDevice(lanes)
    ran: list[threading.Thread] = []
    device.collective.after(device.h2d.record(), Reason.WEIGHTS_ARRIVED)
    device.collective.run(lambda: ran.append(threading.current_thread()), "all-gather 1", 100)
    assert device.collective.record().future.done()
    assert ran == [threading.current_thread()]
    assert lanes.timeline.totals()["collective"].num_bytes == 100
    lanes.close()


# --------------------------------------------------------------------------------------------------------- times


def passed(time_ms: float) -> FakeEvent:
    event = FakeEvent(f"at {time_ms}", time_ms, timed=True)
    event.passed.set()
    return event


def test_ends_that_the_waiter_saw_late_are_counted_on_from_the_last_one_known() -> None:
    clock = EventClock()
    _, first_stop_s = clock.span(passed(0.0), passed(1000.0))
    # On the device a millisecond later; the waiter looks whenever it comes to it.
    start_s, stop_s = clock.span(passed(1000.5), passed(1001.0))
    assert stop_s <= first_stop_s + 0.001 + 1e-9
    assert stop_s - start_s == pytest.approx(0.0005)


def test_an_end_is_never_later_than_the_moment_it_was_seen() -> None:
    clock = EventClock()
    _, first_stop_s = clock.span(passed(0.0), passed(1.0))
    _, stop_s = clock.span(passed(1.0), passed(60_000.0))  # a device clock that runs fast
    assert stop_s - first_stop_s < 30.0


def test_an_end_that_was_waited_for_is_now_whatever_the_device_clock_says() -> None:
    clock = EventClock()
    _, first_stop_s = clock.span(passed(0.0), passed(1.0))
    stop = FakeEvent("stop", 2.0, timed=True)
    later = threading.Timer(0.05, stop.passed.set)
    later.start()
    _, stop_s = clock.span(passed(1.5), stop)
    later.join()
    assert stop_s - first_stop_s >= 0.04


# -------------------------------------------------------------------------------------------------------- errors


def test_a_failed_call_is_named_with_what_it_was_for(lanes: Lanes) -> None:
    streams = FakeStreams()
    queue = queue_of(streams, lanes)
    streams.fails = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(DeviceError, match=r"copy of 64 bytes \(h2d, weights 3\): CUDA error.*CUDA_LAUNCH_BLOCKING"):
        queue.copy(torch.zeros(64, dtype=torch.uint8), some_bytes(), "weights 3")


def test_device_memory_that_cannot_be_had_is_a_matter_of_the_budget(lanes: Lanes) -> None:
    streams = FakeStreams()
    queue = queue_of(streams, lanes)
    streams.fails = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(BudgetError, match=r"memory of a slot.*Lower device_memory"):
        queue.resize(torch.zeros(64, dtype=torch.uint8), 128)


def test_our_own_errors_keep_their_name() -> None:
    with pytest.raises(ConfigError, match="as it was"), named("a call"):
        raise ConfigError("as it was")
