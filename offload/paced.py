"""A device that is emulated: host memory behind a link of a given bandwidth, with compute that is a timed wait.

Owns: when a copy over the link ends, and when the emulated compute does.
Does not: move bytes in any other way than `HostDevice` (device.py), or measure (cli/bench_overlap.py).
Threads: copies end on the lanes of the two directions; `compute_for` is called by the thread that computes.

Every figure taken on it is emulated: it tells what the runtime hides, and nothing of a real device or link.

Note [Due times]: a copy is made at once, and its lane then sleeps until the link would have been done: `bytes /
bandwidth` after the copy was submitted, or after the copy before it was due. So a lane that wakes late does not slow
the link. Only a copy that takes the host longer than the link's time is late, and its span shows it.
"""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from offload.device import CopyQueue, HostComputeQueue, HostCopyQueue, HostDevice, _return_freed_slots
from offload.lanes import TRAINING_LANE, Lanes

EMULATED: Final = "emulated: compute is a timed wait, and the link a copy in host memory that takes bytes / bandwidth"
"""Stands beside every figure taken on a `PacedDevice`."""

_TIMER_SLACK: Final = 29  # PR_SET_TIMERSLACK of linux/prctl.h
_exact = threading.local()


def sleep_until(due_s: float) -> None:
    """Sleep until `time.perf_counter()` is `due_s`; returns at once where that has passed."""
    if not hasattr(_exact, "set"):
        # Linux may end a sleep 50 us late to save power: too much for waits of a millisecond. Of this thread alone.
        prctl = getattr(ctypes.CDLL(None), "prctl", None)
        _exact.set = prctl is not None and prctl(_TIMER_SLACK, ctypes.c_ulong(1), 0, 0, 0) == 0
    while (left_s := due_s - time.perf_counter()) > 0:
        time.sleep(left_s)


class PacedCopyQueue(HostCopyQueue):
    """Copies that take as long as the link of the device would."""

    def __init__(self, name: str, lanes: Lanes, link: "Link") -> None:
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
        start_s = time.perf_counter()
        ctypes.memmove(destination.data_ptr(), source.data_ptr(), destination.numel())
        self._due_s = max(time.perf_counter(), begin_s + destination.numel() / self._link.bytes_per_s)
        sleep_until(self._due_s)
        self._lanes.timeline.add_work(self._name, name, min(start_s, self._due_s), self._due_s, destination.numel())


class Link:
    """The bandwidth of each direction; may be changed between steps."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s


class PacedDevice(HostDevice):
    """Host memory as the device, behind a paced link, with timed compute."""

    def __init__(self, lanes: Lanes, *, link_bytes_per_s: float) -> None:
        _return_freed_slots()
        self.torch_device = torch.device("cpu")
        self.link = Link(link_bytes_per_s)
        self.compute = HostComputeQueue(lanes)
        self.h2d: CopyQueue = PacedCopyQueue("h2d", lanes, self.link)
        self.d2h: CopyQueue = PacedCopyQueue("d2h", lanes, self.link)
        self._timeline = lanes.timeline

    @contextmanager
    def compute_for(self, seconds: float, name: str) -> Iterator[None]:
        """The body, and then a wait, so that both together take `seconds`."""
        start_s = time.perf_counter()
        yield
        sleep_until(start_s + seconds)
        self._timeline.add_work(TRAINING_LANE, name, start_s, time.perf_counter())
