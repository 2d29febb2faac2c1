"""Gradient offload: gradients from a device slot into their homes, with the sums of squares of the norm.

Owns: the homes of gradients and the sums of squares of what is in them.
Does not: take gradients from autograd (gradients/intake.py) or consume them (optimizer/).
Threads: `submit` on the training thread; the units run on the lanes `d2h issue` and `land`.

Four routes. Direct: the home is on the host and takes the wire's dtype, so the copy ends in it. Staging buffer: the home is on
disk, is wider than the wire, or adds to what it holds. In place: the home is on the device of a host that can address
it, so the kernel reads the slot itself. On device: the home is on an accelerator (device_offloading.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
from torch import Tensor

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Reason
from offload.device.protocol import Mark
from offload.gradients.on_device import DeviceOffload
from offload.kernels import reduce
from offload.memory.region import bits, typed
from offload.memory.ring import Lease, Ring
from offload.model.partitions import Partition, block_segments
from offload.runtime import Runtime
from offload.storage.homes import Chunk, DiskHome, Home
from offload.units import DISK_ALIGN_BYTES, Tier, round_up

Ready = Mark | Future[Mark]
"""Since when a slot holds gradients: a point of the compute queue, or one that a collective futures."""


@dataclass(slots=True, eq=False)
class GradientChunk:
    """One chunk of a gradient: its home, and its share of the norm."""

    chunk: Chunk
    home: Home
    entries: np.ndarray[Any, Any]
    """(segments,) int64: which entry of the flat each segment belongs to."""
    starts: np.ndarray[Any, Any]
    """(segments,) int64: first element, relative to the chunk. Cut at blocks: partition.block_segments."""
    stops: np.ndarray[Any, Any]
    sums: np.ndarray[Any, Any]
    """(segments,) float64: sum of squares of what the home holds."""
    owners: frozenset[int]
    """The entries that reach into the chunk."""
    whole: "_Whole"
    consumed: "Future[Any] | None" = None
    """The newest step unit that reads the home: no gradient offload submitted after it may begin before it is done."""
    offloaded: "Future[Any] | None" = None
    """The newest gradient offload."""
    read_by: Mark | None = None
    """After the newest step that reads the home on an accelerator. Set by that unit, before it is done."""

    def sums_place(self) -> tuple[str, int, int, int]:
        """The sums of squares, for `Lanes.declare`."""
        return ("sums", self.chunk.partition_id, self.chunk.start, self.chunk.numel)


class _Whole(NamedTuple):
    """What a gradient offload of all entries at once works on: the usual case, so it is found out only once."""

    segments: np.ndarray[Any, Any]
    runs: list[tuple[int, int]]


NO_SEGMENTS: Final = np.empty(0, np.int64)


def gradient_chunk(partition: Partition, home: Home) -> GradientChunk:
    """The segments of one chunk: parameter by parameter, block by block, without padding."""
    chunk = home.chunk
    rows = [
        (index, a - chunk.start, b - chunk.start)
        for index, entry in enumerate(partition.trainable.entries)
        for a, b in block_segments(max(entry.start, chunk.start), min(entry.stop, chunk.stop))
        if a < b
    ]
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    entries, starts, stops = (np.ascontiguousarray(table[:, i]) for i in range(3))
    segments = np.arange(len(rows))
    return GradientChunk(
        chunk, home, entries, starts, stops, sums=np.zeros(len(rows)), owners=frozenset(entries.tolist()),
        whole=_Whole(segments, _joined(starts, stops, segments)),
    )  # fmt: skip


def _joined(starts: np.ndarray[Any, Any], stops: np.ndarray[Any, Any], segments: np.ndarray[Any, Any]) -> list[Any]:
    """Stretches of these segments, joined over padding but not over segments that are not among them."""
    runs: list[tuple[int, int]] = []
    previous = -1
    for segment in segments.tolist():
        low, high = int(starts[segment]), int(stops[segment])
        if runs and segment - 1 == previous:
            runs[-1] = (runs[-1][0], high)
        else:
            runs.append((low, high))
        previous = segment
    return runs


class _Route(Enum):
    DIRECT = "direct"
    BUFFER = "buffer"
    IN_PLACE = "in place"
    ON_DEVICE = "on device"


@dataclass(slots=True, eq=False)
class _Job:
    """One chunk of one gradient offload."""

    target: GradientChunk
    first: np.ndarray[Any, Any]
    """Segments that overwrite the home."""
    again: np.ndarray[Any, Any]
    """Segments that add to it."""
    keep_old: bool
    """The home holds more that must stay, and is not addressable."""
    source: Tensor
    """The device slot: bytes of the whole flat."""
    route: _Route
    consumed: "Future[Any] | None"
    """The step unit, of those submitted so far, that reads the home."""
    before: "Future[Any] | None"
    """The gradient offload before this one in the same home."""
    lease: Lease | None = None
    issued: "Future[Any] | None" = None
    arrived: Mark | None = None
    """Set before `issued` resolves."""


class GradientOffload:
    """Carries gradients home."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        chunks: Sequence[Sequence[GradientChunk]],
        ring: Ring,
        workspace: Tensor | None = None,
    ) -> None:
        """`workspace`: on an accelerator that is home to gradients, OFFLOAD_WORKSPACE_ITEMSIZE of the largest chunk."""
        wire, home, device, lanes = runtime.precision, runtime.gradient_precision, runtime.device, runtime.lanes
        self.chunks = chunks
        self.home_dtype = home
        self._wire = wire
        self._device = device
        self._lanes = lanes
        self._ring = ring
        self._on_device: DeviceOffload | None = None
        if workspace is not None:
            targets = [target for row in chunks for target in row]
            self._on_device = DeviceOffload(
                targets, workspace=workspace, wire=wire, home=home, device=device, lanes=lanes
            )
        self._issue_lane = lanes.lane("d2h issue")
        self._store_lane = lanes.lane("land")
        self._squares = reduce.square_sums_kernel(home.value)
        self._store_first = reduce.store_kernel(wire.value, home.value, False)
        self._store_again = reduce.store_kernel(wire.value, home.value, True)
        self.last: Future[Any] = lanes.resolved("nothing offloaded")

    def submit(
        self, pid: int, arrived: set[int], offloaded: set[int], source: Tensor, ready: "Ready", slot: Lease,
        issued: "Future[Any]",
    ) -> None:  # fmt: skip
        """Bring the entries `arrived` of a partition home from the device slot `source` (bytes of the flat).

        `offloaded`: entries whose home already holds a gradient of this step; those that arrive again are added to it.
        `ready`: since when the slot holds them. Its lease is given back by the unit whose future is `issued`.
        """
        jobs = [
            job for target in self.chunks[pid] if (job := self._job(target, arrived, offloaded, source)) is not None
        ]
        if not jobs:
            self._issue_lane.submit(partial(self._release_unused, slot, ready), issued.name, issued)
            return
        done = [self._lanes.future(f"land {pid} chunk {job.target.chunk.index}") for job in jobs]
        self.last = done[-1]
        for job, offloaded_future in zip(jobs, done, strict=True):
            job.target.offloaded = offloaded_future
        if all(job.route is _Route.IN_PLACE for job in jobs):  # nothing to issue: one lane less to wake
            for job, offloaded_future in zip(jobs, done, strict=True):
                work = partial(self._store_in_place, job, ready, offloaded_future)
                self._store_lane.submit(work, offloaded_future.name, offloaded_future)
            slot.release(done[-1])
            issued.resolve()
            return
        in_place = any(job.route is _Route.IN_PLACE for job in jobs)
        for job, offloaded_future in zip(jobs, done, strict=True):
            last = job is jobs[-1]
            give_back = partial(self._release_slot, slot, done[-1] if in_place else None) if last else None
            job.issued = self._issue_lane.submit(
                partial(self._issue, job, ready, offloaded_future, give_back),
                f"issue {offloaded_future.name}",
                issued if last else None,
            )
        for job, offloaded_future in zip(jobs, done, strict=True):
            self._store_lane.submit(partial(self._store, job), offloaded_future.name, offloaded_future)

    def _job(self, target: GradientChunk, arrived: set[int], offloaded: set[int], source: Tensor) -> _Job | None:
        coming, here = target.owners & arrived, target.owners & offloaded
        if not coming:
            return None
        first, again = target.whole.segments, NO_SEGMENTS
        if here or len(coming) < len(target.owners):
            chosen = np.isin(target.entries, np.fromiter(coming, np.int64))
            added = np.isin(target.entries, np.fromiter(coming & here, np.int64, len(coming & here)))
            first, again = np.flatnonzero(chosen & ~added), np.flatnonzero(added)
        tier = target.home.tier
        if tier is Tier.DEVICE:
            route = _Route.IN_PLACE if self._device.is_host else _Route.ON_DEVICE
        elif tier is Tier.HOST and self._wire == self.home_dtype and not len(again):
            route = _Route.DIRECT
        else:
            route = _Route.BUFFER
        return _Job(
            target=target,
            first=first,
            again=again,
            keep_old=bool(here),
            source=source,
            route=route,
            consumed=target.consumed,
            before=target.offloaded,
        )

    # -------------------------------------------------------------------------------------------- the lanes

    def _release_slot(self, slot: Lease, offloaded: "Future[Any] | None") -> None:
        slot.release(offloaded, mark=self._device.d2h.record())

    def _release_unused(self, slot: Lease, ready: "Ready") -> None:
        mark = self._reached(ready)
        # Only ranks use a slot of which nothing is offloaded here: others' shards are averaged in it.
        slot.release(mark=mark if isinstance(ready, Future) else None)

    def _reached(self, ready: "Ready") -> Mark | None:
        if isinstance(ready, Future):
            # The event does not exist before the collective has been issued.
            return self._lanes.wait(ready, Reason.AVERAGE_ISSUED)
        return ready

    def _issue(
        self, job: _Job, ready: "Ready", offloaded: "Future[Any]", release_slot: Callable[[], None] | None
    ) -> None:
        if job.consumed is not None:
            # Without this the next gradient overwrites one that the step has not yet read.
            self._lanes.wait(job.consumed, Reason.GRADIENT_CONSUMED)
        if job.route is _Route.IN_PLACE:
            job.arrived = self._reached(ready)
        elif job.route is _Route.ON_DEVICE:
            self._issue_on_device(job, ready)
        else:
            destination: Tensor
            if job.route is _Route.BUFFER:
                job.lease = self._ring.acquire(released_by=offloaded)
                destination = job.lease.bytes
            else:
                if job.before is not None:
                    # Without this a gradient that was dropped meanwhile is added to this one when it is offloaded at last.
                    self._lanes.wait(job.before, Reason.OFFLOADED)
                destination = job.target.home.bytes
            itemsize = self._wire.dtype.itemsize
            first = job.target.chunk.start * itemsize
            if (mark := self._reached(ready)) is not None:
                # Without this a gradient is copied that the device has not finished computing.
                self._device.d2h.after(mark, Reason.GRADIENT_READY)
            for low, high in self._runs(job):
                self._device.d2h.copy(
                    destination[low * itemsize : high * itemsize],
                    job.source[first + low * itemsize : first + high * itemsize],
                    f"gradient {job.target.chunk.partition_id}",
                )
            job.arrived = self._device.d2h.record()
        if release_slot is not None:
            release_slot()

    def _issue_on_device(self, job: _Job, ready: "Ready") -> None:
        if (mark := self._reached(ready)) is not None:
            # Without this a gradient is offloaded that the device has not finished computing.
            self._device.d2h.after(mark, Reason.GRADIENT_READY)
        if job.target.read_by is not None:
            # Without this a gradient of the user's own, behind which there is no use of the new weights, overwrites one
            # that the step on the device has not yet read.
            self._device.d2h.after(job.target.read_by, Reason.GRADIENT_CONSUMED)
        assert self._on_device is not None
        start, stop = (at * self._wire.dtype.itemsize for at in (job.target.chunk.start, job.target.chunk.stop))
        self._on_device.issue(job.target, job.source[start:stop], self._runs(job), job.first, job.again)
        job.arrived = self._device.d2h.record()

    def _runs(self, job: _Job) -> list[tuple[int, int]]:
        """Stretches that arrive, joined over padding but not over entries that stay."""
        if job.first is job.target.whole.segments:
            return job.target.whole.runs
        return _joined(job.target.starts, job.target.stops, np.sort(np.concatenate([job.first, job.again])))

    def _store_in_place(self, job: _Job, ready: "Ready", offloaded: "Future[Any]") -> None:
        self._issue(job, ready, offloaded, None)
        self._store(job)

    def _store(self, job: _Job) -> None:
        if job.issued is not None:
            # The event that `arrived` names does not exist before the copy has been issued.
            self._lanes.wait(job.issued, Reason.COPY_ISSUED)
        assert job.arrived is not None
        # Without this half a copy is read, and enters the norm and the step.
        self._lanes.wait(job.arrived.future, Reason.GRADIENT_ON_HOST)
        if job.route is _Route.ON_DEVICE:
            return
        target, numel = job.target, job.target.chunk.numel
        itemsize = self._wire.dtype.itemsize
        if job.route is _Route.DIRECT:
            values = bits(typed(target.home.bytes[: numel * itemsize], self._wire.dtype))
            self._lanes.declare(reads=[target.home.bytes], writes=[target.sums_place()])
            self._with_sums(self._squares, target, job.first, values)
            return
        if job.route is _Route.IN_PLACE:
            first = target.chunk.start * itemsize
            source = job.source[first : first + numel * itemsize]
        else:
            assert job.lease is not None
            source = job.lease.bytes[: numel * itemsize]
        home_bytes = self._home_bytes(job)
        home = bits(typed(home_bytes[: numel * self.home_dtype.dtype.itemsize], self.home_dtype.dtype))
        self._lanes.declare(reads=[source], writes=[home_bytes, target.sums_place()])
        values = bits(typed(source, self._wire.dtype))
        for kernel, segments in ((self._store_first, job.first), (self._store_again, job.again)):
            if len(segments):
                self._with_sums(kernel, target, segments, values, home)
        written = None
        if isinstance(target.home, DiskHome):
            written = target.home.write(home_bytes, f"gradient {target.chunk.partition_id}")
        if job.lease is not None:
            job.lease.release(written)

    def _with_sums(
        self, kernel: Callable[..., None], target: GradientChunk, segments: np.ndarray[Any, Any], *arrays: Any
    ) -> None:
        """Run a kernel that finds the sums of squares of these segments."""
        if segments is target.whole.segments:
            kernel(*arrays, target.starts, target.stops, target.sums)
            return
        sums = np.empty(len(segments))
        kernel(*arrays, target.starts[segments], target.stops[segments], sums)
        target.sums[segments] = sums

    def _home_bytes(self, job: _Job) -> Tensor:
        """Where the home is while the kernel works: itself, or the second half of the staging buffer with what it held."""
        home = job.target.home
        if not isinstance(home, DiskHome):
            return home.bytes
        assert job.lease is not None
        offset = round_up(job.target.chunk.numel * self._wire.dtype.itemsize, DISK_ALIGN_BYTES)
        record = job.lease.bytes[offset : offset + home.num_bytes]
        if job.keep_old:
            # Without this the kernel adds to what the staging buffer held before.
            self._lanes.wait(home.read(record, "gradient so far"), Reason.READ)
        return record
