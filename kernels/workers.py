"""Threads that run kernels.

Owns: the threads, and how a range is cut for them: at borders that never depend on their number; the CPUs they may
run on.
Does not: know the kernels. They release the GIL, so plain threads scale.
Threads: `run` may be called from any thread, also from several at once. The caller takes tasks itself, so a call ends
whatever else the threads are busy with.
"""

import logging
import os
import queue
import threading
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Final, Self

TASK_NUMEL: Final = 4 * 65_536
"""Elements a thread takes at once: about 8 MiB of traffic, so that the cost of handing it over vanishes, and a chunk
of full size is enough for eight threads."""

NODES: Final = Path("/sys/devices/system/node")


_log = logging.getLogger(__name__)


def cpus_near(node: int, allowed: Collection[int], nodes: Path = NODES) -> frozenset[int]:
    """The CPUs of NUMA node `node` among those `allowed` (os.sched_getaffinity); pure but for reading `nodes`.

    All that are allowed where nothing is gained by choosing: the node is unknown (-1, as sysfs says of a device), does
    not exist, or has no CPU that is allowed.
    """
    try:
        text = (nodes / f"node{node}" / "cpulist").read_text(encoding="ascii")
    except OSError:
        return frozenset(allowed)
    ranges = [part.partition("-") for part in text.strip().split(",") if part]
    of_node = {cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1)}
    return frozenset(of_node.intersection(allowed) or allowed)


class Job:
    """One call of `run`: its tasks in order, their errors, and whether all have ended."""

    __slots__ = ("_errors", "_idle", "_lock", "_num_running", "_tasks", "_work")

    def __init__(self, work: Callable[[int, int], None], tasks: list[tuple[int, int]]) -> None:
        self._work = work
        self._tasks = tasks[::-1]
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._num_running = 0
        self._errors: dict[int, BaseException] = {}

    def take_part(self) -> None:
        """Run tasks until none is left, also after an error: what is left behind must not depend on timing."""
        while True:
            with self._lock:
                if not self._tasks:
                    return
                start, stop = self._tasks.pop()
                self._num_running += 1
            error: BaseException | None = None
            try:
                self._work(start, stop)
            except BaseException as caught:
                error = caught
            with self._lock:
                self._num_running -= 1
                if error is not None:
                    self._errors[start] = error
                if not self._num_running:
                    self._idle.notify_all()

    def result(self) -> None:
        """Wait for the tasks that other threads still run, else the caller reads arrays that are being written."""
        with self._lock:
            while self._num_running:
                self._idle.wait()
        if self._errors:
            raise self._errors[min(self._errors)]


class Workers:
    """A fixed number of threads for kernels, the caller's among them.

    `cpus`: all that the threads may run on (`cpus_near` a device); None leaves that to the system. The caller's own
    thread keeps its CPUs.
    """

    def __init__(self, num_threads: int, cpus: Collection[int] | None = None) -> None:
        self.num_threads = num_threads
        self._cpus = None if cpus is None else frozenset(cpus)
        allowed = os.sched_getaffinity(0)
        if self._cpus is not None and not self._cpus & allowed:
            raise ValueError(
                f"workers on CPUs {sorted(self._cpus)}: this process may run on {sorted(allowed)} alone. "
                "Choose among those, or None."
            )
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, name=f"offload-kernel-{i}", daemon=True)
            for i in range(1, num_threads)
        ]  # fmt: skip
        for thread in self._threads:
            thread.start()

    def run(self, work: Callable[[int, int], None], start: int, stop: int) -> None:
        """`work(a, b)` over [start, stop), cut at absolute multiples of TASK_NUMEL; returns when all is done.

        An error in a task is raised here, after all tasks have ended; of several the one of the lowest task.
        """
        borders = (
            [start, *range((start // TASK_NUMEL + 1) * TASK_NUMEL, stop, TASK_NUMEL), stop] if start < stop else []
        )
        tasks = list(pairwise(borders))
        job = Job(work, tasks)
        for _ in range(min(len(self._threads), len(tasks) - 1)):
            self._jobs.put(job)
        job.take_part()
        job.result()

    def close(self) -> None:
        """End the threads, after the jobs that were begun."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _set_affinity(self, cpus: Collection[int] | None) -> None:
        if cpus is None:
            return
        try:
            os.sched_setaffinity(0, cpus)  # of this thread alone
        except OSError as error:
            # The set of CPUs was changed from outside in the meantime. Slower memory, same results.
            _log.warning("thread %s keeps its CPUs: %s", threading.current_thread().name, error)

    def _serve(self) -> None:
        self._set_affinity(self._cpus)
        while (job := self._jobs.get()) is not None:
            job.take_part()
            del job  # a thread at rest keeps no arrays alive

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
