"""In-order workers, promises, and the one way to wait.

Owns: `Promise` (completion of one unit of work), `Lane` (an in-order worker), `Lanes` (makes both, waits with a
deadline and a span, and remembers the first failure).
Does not: know what the work is. Copies between tiers are device.py, disk transfers are disk/.
Threads: everything here may be called from any thread, except `Lane.submit`, which only the training thread calls
(and a stream of `HostDevice`, which passes on what one lane hands it): numbers rise in program order.

Note [Waiting]: a unit waits only for promises of units submitted before it, each lane runs its units in the order of
submission, and a lease waits only for a lease given out earlier. So the unit submitted first among those unfinished
can always run, and no cycle of waits can form.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, Final, Generic, Protocol, TypeVar

from offload.errors import InternalError, OffloadError, SessionClosedError, SessionFailedError, WaitTimeoutError
from offload.forked import let_go_in_children
from offload.timeline import Timeline

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
    SLAB_RETURNED = "slab not yet handed back"
    SLAB_FREE = "slab still in a transfer"
    READ = "disk read"
    PLACE_FREE = "place for weights still in use"
    EXTENT_WRITTEN = "extent still being written"
    GRADIENT_READY = "gradient not yet computed"
    GRADIENT_ON_HOST = "gradient not yet on the host"
    GRADIENT_CONSUMED = "gradient still needed by the step"
    LANDED = "gradients not yet landed"
    WEIGHTS_READ = "host weights still being copied"
    STATE_READ = "optimizer state not yet read"
    STEP_DONE = "step not yet done"
    AHEAD_DROPPED = "state read ahead not yet let go"
    DRAIN = "transfers at close"


class Promise(Generic[T]):
    """Completion of one unit of work; resolves or fails exactly once."""

    __slots__ = ("_callbacks", "_done", "_error", "_gate", "_lock", "_value", "clock", "force", "name")

    def __init__(self, name: str, force: Callable[[], None] | None = None) -> None:
        self.name = name
        self.force = force  # runs the work in the waiting thread: test doubles that run everything late
        self.clock: Any = None  # what the resolving lane had seen: the checking double
        self._done = False
        self._gate = threading.Lock()  # held until it is settled; an Event does the same and costs three times as much
        self._gate.acquire()
        self._lock = threading.Lock()
        self._value: T | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[], None]] = []

    def resolve(self, value: T | None = None) -> None:
        """Complete with a value and run the callbacks in this thread."""
        self._settle(value, None)

    def fail(self, error: BaseException) -> None:
        """Complete with an error, which every `result` raises."""
        self._settle(None, error)

    def done(self) -> bool:
        """Whether it has resolved or failed."""
        return self._done

    def block(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s`; only `Lanes.wait` calls this."""
        if self._gate.acquire(timeout=timeout_s):
            self._gate.release()  # for whoever waits as well
        return self._done

    def result(self) -> T:
        """The value; raises the error of a failed promise. Must be done."""
        if not self._done:
            raise InternalError(f"result of {self.name!r} was read before it was done; wait for it first.")
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call `callback` once done: at once where it is, else in the resolving thread. It must not block."""
        with self._lock:
            if not self._done:
                self._callbacks.append(callback)
                return
        callback()

    def _settle(self, value: T | None, error: BaseException | None) -> None:
        with self._lock:
            if self._done:
                raise InternalError(f"promise {self.name!r} was settled twice.")
            self._value, self._error = value, error
            self._done = True
            self._gate.release()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


class Lane(Protocol):
    """An in-order worker."""

    name: str
    num_submitted: int
    """Units so far."""

    def submit(self, work: Callable[[], T], name: str, promise: "Promise[T] | None" = None) -> "Promise[T]":
        """Run `work` after everything submitted before; returns (or completes the given) promise of its result."""

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
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Promise[Any]] | None] = queue.SimpleQueue()
        self._running: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"offload-{name}", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T], name: str, promise: Promise[T] | None = None) -> Promise[T]:
        promise = promise if promise is not None else self._lanes.promise(name)
        with self._lock:
            self.num_submitted += 1
        self._queue.put((work, promise))
        return promise

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
            work, promise = unit
            self._running = promise.name
            self._lanes.run_unit(work, promise)
            self._running = None
            del unit, work, promise  # nothing may stay alive while the lane idles


class Lanes:
    """Makes lanes and promises; the one way to wait; the session's first failure.

    `skipped_waits` is the switch of the hazard tests: a wait named there does not happen.
    """

    def __init__(self, timeline: Timeline, *, wait_timeout_s: float = 600.0) -> None:
        self.timeline = timeline
        self.wait_timeout_s = wait_timeout_s
        self.skipped_waits: set[Reason] = set()
        self.in_flight: list[Callable[[], list[str]]] = []  # further sources for the message of a deadline
        self._lanes: list[Lane] = []
        self.when_failed: Callable[[BaseException], None] | None = None  # called once, on its lane; it must not wait
        self._failure: BaseException | None = None
        self._failure_lane = ""
        self._last_progress_s = time.perf_counter()
        let_go_in_children(self)

    # ------------------------------------------------------------------------------------------------ making

    def lane(self, name: str) -> Lane:
        """A new in-order worker."""
        lane = self._make_lane(name)
        self._lanes.append(lane)
        return lane

    def promise(self, name: str) -> "Promise[Any]":
        """A new promise."""
        return Promise(name)

    def kept(self, name: str, value: Any = None) -> "Promise[Any]":
        """A promise that is already resolved."""
        promise = self.promise(name)
        self.stamp(promise)
        promise.resolve(value)
        return promise

    def all_of(self, promises: "Sequence[Promise[Any]]", name: str) -> "Promise[Any]":
        """A promise that is done once all of these are; it fails with the first of their errors."""
        if len(promises) == 1:
            return promises[0]
        joint = self.promise(name)
        left = len(promises)
        lock = threading.Lock()

        def one_done() -> None:
            nonlocal left
            with lock:
                left -= 1
                last = left == 0
            if last:
                try:
                    self.stamp(joint, promises)
                    for promise in promises:
                        promise.result()
                except BaseException as error:
                    joint.fail(error)
                else:
                    joint.resolve()

        def force_all() -> None:
            for promise in promises:
                if promise.force is not None:
                    promise.force()

        joint.force = force_all if any(promise.force for promise in promises) else None
        if not promises:
            self.stamp(joint)
            joint.resolve()
        for promise in promises:
            promise.when_done(one_done)
        return joint

    def _make_lane(self, name: str) -> Lane:
        return ThreadLane(name, self)

    # ----------------------------------------------------------------------------------------------- waiting

    def wait(self, promise: "Promise[T]", reason: Reason) -> T | None:
        """Wait until `promise` is done and return its value (None for a wait that a test has switched off).

        Raises the promise's error; SessionFailedError where the session has failed meanwhile; WaitTimeoutError when
        nothing has moved on any lane for `wait_timeout_s`.
        """
        if reason in self.skipped_waits:
            return None
        if not promise.done():
            start_s = time.perf_counter()
            self._block(promise, reason)
            self.timeline.add_wait(current_lane(), reason, start_s, time.perf_counter())
        self.joined(promise)
        if current_lane() == TRAINING_LANE:
            # The failure itself must not collect the user's frames: it would keep the graph in them alive, and that
            # reaches the failure through its hooks, a cycle which no collector sees.
            self.check()
        return promise.result()

    def _block(self, promise: "Promise[Any]", reason: Reason) -> None:
        if promise.force is not None:
            promise.force()
        start_s = time.perf_counter()
        while not promise.block(POLL_S):
            self.check()
            idle_s = time.perf_counter() - max(start_s, self._last_progress_s)
            if idle_s > self.wait_timeout_s:
                error = WaitTimeoutError(
                    f"lane {current_lane()!r} waits for {promise.name!r} ({reason}) and nothing has moved on any lane "
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

    # ------------------------------------------------------------- what doubles want to know; nothing else happens

    def stamp(self, promise: "Promise[Any]", after: "Sequence[Promise[Any]] | None" = None) -> None:
        """`promise` is about to be settled by the current lane, or by the last of the promises it stands for."""

    def joined(self, promise: "Promise[Any]") -> None:
        """The current lane has waited for `promise`: it comes after everything that `promise` came after."""

    def declare(self, *, reads: Sequence[Any] = (), writes: Sequence[Any] = ()) -> None:
        """The current lane is about to touch these tensors (uint8) or places on disk."""

    def reclaimed(self, memory: Any) -> None:
        """This memory (uint8) is about to be lent again: nobody needs what it holds."""

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

    def let_go(self) -> None:
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

    def run_unit(self, work: Callable[[], T], promise: "Promise[T]") -> None:
        """Run one unit and settle its promise. After a failure nothing runs: its promises fail in order."""
        try:
            self.check()
            value = work()
        except BaseException as error:
            self.fail(error)
            self.stamp(promise)
            promise.fail(error)
            if not isinstance(error, (Exception, OffloadError)):
                raise
        else:
            self.stamp(promise)
            promise.resolve(value)
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
    """Make this thread act for lane `name`; returns the name before (test doubles run units in the waiting thread)."""
    before = current_lane()
    _current.lane = name
    return before
