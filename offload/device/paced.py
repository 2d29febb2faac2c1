"""A device that is emulated: host memory behind a link of a given bandwidth, with compute that is a timed wait.

Owns: when a copy over the link is over, and when the emulated compute is.
Does not: move bytes in any other way than `HostDevice` (host.py), or measure (benchmarks/).
Threads: copies end on the lanes of the two directions; `compute_for` is called by the thread that computes.

Every figure taken on it is emulated: it tells what the runtime hides, and nothing of a real device or link.

Note [Due times]: a copy is made at once, and its lane then sleeps until the link would have been done: bytes by
bandwidth after the copy was submitted, or after the copy before it was due. So a lane that wakes late does not slow
the link; a copy that takes the host longer than the link is late, and its span shows it. Compute likewise: what the
timer of the host is late at the end of a wait, the next wait is shorter; but never by more than `TIMER_LATENESS_S`,
for what is later than that was not the timer.
"""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from offload.concurrency.lanes import TRAINING_LANE, Lanes
from offload.device.host import HostCollectiveQueue, HostComputeQueue, HostCopyQueue, HostDevice
from offload.device.protocol import CopyQueue

EMULATED: Final = "emulated: compute is a timed wait; the link is a copy in host memory that takes bytes by bandwidth"
"""Said of every figure taken on a `PacedDevice`."""

TIMER_LATENESS_S: Final = 100e-6
"""How late a sleep ends on an idle machine: 60 us on a virtual one, less without."""

_TIMER_SLACK: Final = 29  # PR_SET_TIMERSLACK of linux/prctl.h
_MMAP_THRESHOLD: Final = -3  # malloc.h
_TRIM_THRESHOLD: Final = -1
KEEP_BELOW_BYTES: Final = 32 * 1024 * 1024
"""Largest threshold that glibc takes."""

_thread = threading.local()


def sleep_until(due_s: float) -> None:
    """Sleep until `time.perf_counter()` is `due_s`; returns at once where that has passed."""
    if not hasattr(_thread, "exact"):
        # Linux may end a sleep 50 us late, to save power: too much for waits of a millisecond. Of this thread alone.
        prctl = getattr(ctypes.CDLL(None), "prctl", None)
        _thread.exact = prctl is not None and prctl(_TIMER_SLACK, ctypes.c_ulong(1), 0, 0, 0) == 0
    while (left_s := due_s - time.perf_counter()) > 0:
        time.sleep(left_s)


def keep_freed_memory() -> None:
    """Freed slots stay with this process, as with the allocator of a device: a copy into new pages is 3 times slower.

    For the whole process, until the next `HostDevice` sets its own threshold.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, KEEP_BELOW_BYTES)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


class Link:
    """The bandwidth of each direction; may be changed while nothing crosses it."""

    __slots__ = ("bytes_per_s",)

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s

    def seconds(self, num_bytes: int) -> float:
        """What a copy takes."""
        return num_bytes / self.bytes_per_s


class PacedCopyQueue(HostCopyQueue):
    """Copies that take as long as the link would."""

    def __init__(self, name: str, lanes: Lanes, link: Link) -> None:
        super().__init__(name, lanes)
        self._link = link
        self._due_s = 0.0

    def copy(self, destination: Tensor, source: Tensor, name: str, *, crosses_link: bool = True) -> None:
        if not crosses_link:
            super().copy(destination, source, name, crosses_link=False)
            return
        submitted_s = time.perf_counter()
        self._submit(lambda: self._paced(destination, source, name, submitted_s), name)

    def _paced(self, destination: Tensor, source: Tensor, name: str, submitted_s: float) -> None:
        self._lanes.declare(reads=[source], writes=[destination])
        begin_s = max(submitted_s, self._due_s)  # Note [Due times]
        ctypes.memmove(destination.data_ptr(), source.data_ptr(), destination.numel())
        self._due_s = max(time.perf_counter(), begin_s + self._link.seconds(destination.numel()))
        sleep_until(self._due_s)
        self._lanes.timeline.add_work(self._name, name, begin_s, self._due_s, destination.numel())


class PacedDevice(HostDevice):
    """Host memory as the device, behind a paced link, with timed compute."""

    def __init__(self, lanes: Lanes, *, link_bytes_per_s: float) -> None:
        self.torch_device = torch.device("cpu")
        self.link = Link(link_bytes_per_s)
        self.compute = HostComputeQueue(lanes)
        self.h2d: CopyQueue = PacedCopyQueue("h2d", lanes, self.link)
        self.d2h: CopyQueue = PacedCopyQueue("d2h", lanes, self.link)
        self.collective = HostCollectiveQueue(lanes)
        self._timeline = lanes.timeline
        self._late_s = 0.0

    @contextmanager
    def compute_for(self, seconds: float, name: str) -> Iterator[None]:
        """The body, and after it a wait, so that both together take `seconds`."""
        start_s = time.perf_counter()
        due_s = start_s + seconds - self._late_s
        yield
        sleep_until(due_s)
        stop_s = time.perf_counter()
        self._late_s = min(max(stop_s - due_s, 0.0), TIMER_LATENESS_S)
        self._timeline.add_work(TRAINING_LANE, name, start_s, stop_s)
