"""In-order workers, and the one way to wait.

Owns: `Lane` (an in-order worker), `Lanes` (makes lanes and futures, waits with a deadline and a span, and remembers the
first failure).
Does not: know what the work is. Copies between tiers are in device/, disk transfers in disk/.
Threads: everything here may be called from any thread, except `Lane.submit`, which only the training thread calls
(and a queue of `HostDevice`, which passes on what one lane submits to it): units are numbered in program order.

Note [Waiting]: a unit waits only for futures of units submitted before it, each lane runs its units in the order of
submission, and a lease waits only for a lease acquired earlier. So the unit submitted first among those unfinished
can always run, and no cycle of waits can form.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, Final, Protocol, TypeVar

from offload.concurrency.fork import abandon_in_children
from offload.concurrency.futures import Future
from offload.concurrency.timeline import Timeline
from offload.errors import OffloadError, SessionClosedError, SessionFailedError, WaitTimeoutError

T = TypeVar("T")

POLL_S: Final = 0.2
"""How often a blocked thread looks whether the session has failed or its deadline has passed."""

TRAINING_LANE: Final = "compute"

COMPUTE_STREAM: Final = "compute stream"
"""On the timeline: where an accelerator computes, and what it waits for while no thread does."""

_current = threading.local()


class Reason(StrEnum):
    """Why somebody waits. The value is what the timeline and reports show."""

    WEIGHTS_ARRIVED = "weights not yet on the device"
    FETCH_ISSUED = "fetch not yet issued"
    COPY_ISSUED = "copy not yet issued"
    GATHER_ISSUED = "gather not yet issued"
    SHARD_ARRIVED = "own shard not yet on the device"
    SLOT_GATHERED = "shards still arriving in the slot"
    AVERAGE_ISSUED = "average not yet issued"
    READ_ISSUED = "disk read not yet issued"
    PUBLISHED = "weights not yet published"
    SLOT_RELEASED = "slot still read by compute"
    BUFFER_RELEASED = "staging buffer not yet released"
    BUFFER_FREE = "staging buffer still in a transfer"
    READ = "disk read"
    PLACE_FREE = "place for weights still in use"
    EXTENT_WRITTEN = "extent still being written"
    GRADIENT_READY = "gradient not yet computed"
    GRADIENT_ON_HOST = "gradient not yet on the host"
    GRADIENT_CONSUMED = "gradient still needed by the step"
    OFFLOADED = "gradients not yet offloaded"
    WEIGHTS_READ = "host weights still being copied"
    STATE_READ = "optimizer state not yet read"
    STEP_DONE = "step not yet done"
    AHEAD_DROPPED = "state read ahead not yet released"
    DRAIN = "transfers at close"


Unit = tuple[Callable[[], Any], Future[Any]]
"""Work, and the future of its result."""


class Lane(Protocol):
    """An in-order worker."""

    name: str
    num_submitted: int
    """Units so far."""

    def submit(self, work: Callable[[], T], name: str, future: "Future[T] | None" = None) -> "Future[T]":
        """Run `work` after everything submitted before; returns (or completes the given) future of its result."""

    def submit_turn(self, take: "Callable[[], Unit]") -> None:
        """Run one unit after everything submitted before: `take` says which, when its turn has come."""

    def describe(self) -> list[str]:
        """What runs and what waits, for the message of a deadline."""

    def close(self) -> None:
        """Finish what was submitted and end the thread."""


class ThreadLane:
    """A lane with a thread of its own."""

    def __init__(self, name: str, lanes: "Lanes") -> None:
        self.name = name
        self.num_submitted = 0
        self._lock = threading.Lock()  # several lanes may feed one
        self._lanes = lanes
        self._queue: queue.SimpleQueue[Unit | Callable[[], Unit] | None] = queue.SimpleQueue()
        self._running: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"offload-{name}", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T], name: str, future: Future[T] | None = None) -> Future[T]:
        future = future if future is not None else self._lanes.future(name)
        with self._lock:
            self.num_submitted += 1
        self._queue.put((work, future))
        return future

    def submit_turn(self, take: Callable[[], Unit]) -> None:
        with self._lock:
            self.num_submitted += 1
        self._queue.put(take)

    def describe(self) -> list[str]:
        running = self._running
        waiting = self._queue.qsize()
        return [f"{self.name}: {running or 'idle'}, {waiting} waiting"] if running or waiting else []

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        _current.lane = self.name
        while (unit := self._queue.get()) is not None:
            work, future = unit if isinstance(unit, tuple) else unit()
            self._running = future.name
            self._lanes.run_unit(work, future)
            self._running = None
            del unit, work, future  # nothing may stay alive while the lane idles


class Lanes:
    """Makes lanes and futures; the one way to wait; the session's first failure."""

    def __init__(self, timeline: Timeline, *, wait_timeout_s: float = 600.0) -> None:
        self.timeline = timeline
        self.wait_timeout_s = wait_timeout_s
        self.in_flight: list[Callable[[], list[str]]] = []  # further sources for the message of a deadline
        self._lanes: list[Lane] = []
        self.when_failed: Callable[[BaseException], None] | None = None  # called once, on its lane; it must not wait
        self._failure: BaseException | None = None
        self._failure_lane = ""
        self._last_progress_s = time.perf_counter()
        abandon_in_children(self)

    # ------------------------------------------------------------------------------------------------ making

    def lane(self, name: str) -> Lane:
        """A new in-order worker."""
        lane = self._make_lane(name)
        self._lanes.append(lane)
        return lane

    def future(self, name: str) -> "Future[Any]":
        """A new future."""
        return Future(name)

    def resolved(self, name: str, value: Any = None) -> "Future[Any]":
        """A future that is already resolved."""
        future = self.future(name)
        future.resolve(value)
        return future

    def all_of(self, futures: "Sequence[Future[Any]]", name: str) -> "Future[Any]":
        """A future that is done once all of these are; it fails with the first of their errors."""
        if len(futures) == 1:
            return futures[0]
        joint = self.future(name)
        left = len(futures)
        lock = threading.Lock()

        def one_done() -> None:
            nonlocal left
            with lock:
                left -= 1
                last = left == 0
            if last:
                try:
                    for future in futures:
                        future.result()
                except BaseException as error:
                    joint.fail(error)
                else:
                    joint.resolve()

        if not futures:
            joint.resolve()
        for future in futures:
            future.when_done(one_done)
        return joint

    def _make_lane(self, name: str) -> Lane:
        return ThreadLane(name, self)

    # ----------------------------------------------------------------------------------------------- waiting

    def wait(self, future: "Future[T]", reason: Reason) -> T:
        """Wait until `future` is done and return its value.

        Raises the future's error; SessionFailedError where the session has failed meanwhile; WaitTimeoutError when
        nothing has moved on any lane for `wait_timeout_s`.
        """
        if not future.done():
            start_s = time.perf_counter()
            self._block(future, reason)
            self.timeline.add_wait(current_lane(), reason, start_s, time.perf_counter())
        if current_lane() == TRAINING_LANE:
            # The failure itself must not collect the user's frames: it would keep the graph in them alive, and that
            # reaches the failure through its hooks, a cycle which no collector sees.
            self.check()
        return future.result()

    def _block(self, future: "Future[Any]", reason: Reason) -> None:
        start_s = time.perf_counter()
        while not future.block(POLL_S):
            self.check()
            idle_s = time.perf_counter() - max(start_s, self._last_progress_s)
            if idle_s > self.wait_timeout_s:
                error = WaitTimeoutError(
                    f"lane {current_lane()!r} waits for {future.name!r} ({reason}) and nothing has moved on any lane "
                    f"for {idle_s:.0f} s (wait_timeout_s={self.wait_timeout_s:g}). In flight:\n  "
                    + ("\n  ".join(self.describe()) or "nothing")
                    + "\nLook for a stalled disk; raise wait_timeout_s if the device is only slow."
                )
                self.fail(WaitTimeoutError(*error.args))  # a copy without frames, see wait()
                raise error

    def progress(self) -> None:
        """Note that something moved: the deadline starts anew."""
        self._last_progress_s = time.perf_counter()

    def describe(self) -> list[str]:
        """What is running and waiting on every lane and in every queue."""
        lines = [line for lane in self._lanes for line in lane.describe()]
        return lines + [line for source in self.in_flight for line in source()]

    def declare(self, *, reads: Sequence[Any] = (), writes: Sequence[Any] = (), reclaims: Sequence[Any] = ()) -> None:
        """The current lane is about to access these tensors (uint8) or places on disk.

        `reclaims`: memory that is leased again, whose contents nobody needs any more. Nothing happens here: lanes that
        check the order of accesses override this, the one seam for instruments.
        """

    # ----------------------------------------------------------------------------------------------- failing

    @property
    def failure(self) -> BaseException | None:
        """The first error on any lane, or None."""
        return self._failure

    def fail(self, error: BaseException) -> None:
        """Remember the first failure; units not yet begun will not run."""
        if self._failure is None and not isinstance(error, SessionFailedError):
            self._failure, self._failure_lane = error, current_lane()
            if self.when_failed is not None:
                self.when_failed(error)

    def abandon(self) -> None:
        """In a forked child, which has none of the threads: whatever waits for a lane there fails instead."""
        if self._failure is None:
            self._failure = SessionClosedError("this is a forked process; use the session in the one that made it.")

    def check(self) -> None:
        """Raise SessionFailedError where something has failed."""
        if self._failure is not None:
            raise SessionFailedError(
                f"the session failed on lane {self._failure_lane!r}: {type(self._failure).__name__}: {self._failure} "
                "Its weights are not those of a finished step; leave the context and resume from a checkpoint."
            ) from self._failure

    def run_unit(self, work: Callable[[], T], future: "Future[T]") -> None:
        """Run one unit and settle its future. After a failure nothing runs: its futures fail in order."""
        try:
            self.check()
            value = work()
        except BaseException as error:
            self.fail(error)
            future.fail(error)
            if not isinstance(error, (Exception, OffloadError)):
                raise
        else:
            future.resolve(value)
        finally:
            self.progress()

    def drain(self) -> None:
        """Wait until no lane has anything left, also of what its units submit to other lanes."""
        while True:
            num_submitted = sum(lane.num_submitted for lane in self._lanes)
            for lane in self._lanes:
                with contextlib.suppress(SessionFailedError):  # then nothing is begun any more, and this is the end
                    # Without this a lane ends while units of another still submit to it, and those wait for ever.
                    self.wait(lane.submit(_nothing, "drain"), Reason.DRAIN)
            if sum(lane.num_submitted for lane in self._lanes) == num_submitted + len(self._lanes):
                return

    def close(self) -> None:
        """End all lanes after what was submitted; with a failure, after the units now running."""
        self.drain()
        for lane in self._lanes:
            lane.close()
        self._lanes.clear()


def _nothing() -> None:
    """A unit that only marks a place in a lane."""


def current_lane() -> str:
    """Name of the lane that runs this thread now; the training thread is `compute`."""
    return getattr(_current, "lane", TRAINING_LANE)


def set_current_lane(name: str) -> str:
    """Make this thread act for lane `name`; returns the name before. For threads that serve several lanes in turn."""
    before = current_lane()
    _current.lane = name
    return before
