"""Gradient offload: gradients from a device slot into their homes, with the sums of squares of the norm.

Owns: the copies to the homes of gradients, and the order of what reads and writes these.
Does not: take gradients from autograd (intake.py), decide when they are offloaded (reduction.py) or consume them
(optimizer/).
Threads: `submit` on the training thread, or autograd's own in its place; the units run on the lanes `d2h issue` and
`gradient store`.

Four routes. Direct: the home is on the host and takes the wire's dtype, so the copy ends in it. Staged: the home is on
disk, is wider than the wire, or is added to. In place: the home is on the device of a host, which can address it, so
the kernel reads the slot itself. On device: the home is on an accelerator (on_device.py).
"""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Reason
from offload.device.protocol import Mark
from offload.gradients.chunks import GradientChunk, Segments, Update, update_of
from offload.gradients.on_device import DeviceOffload
from offload.gradients.slots import GradientSlot
from offload.kernels import reduce
from offload.memory.region import bits, typed
from offload.memory.ring import Lease, Ring
from offload.runtime import Runtime
from offload.storage.homes import DiskHome
from offload.units import DISK_ALIGN_BYTES, Tier, round_up

T = TypeVar("T")

Ready = Mark | Future[Mark]
"""Since when a slot holds gradients: a point of the compute queue, or one that a collective resolves."""


class Transfer(NamedTuple):
    """One chunk of one gradient offload, as it was submitted."""

    update: Update
    source: Tensor
    """In the device slot: the bytes of the chunk's elements."""
    stored: "Future[Any]"
    """Done once the home holds them."""
    consumed: "Future[Any] | None"
    """The step unit, of those submitted so far, that reads the home."""
    before: "Future[Any] | None"
    """The gradient offload before this one in the same home."""

    @property
    def target(self) -> GradientChunk:
        return self.update.target


@dataclass(frozen=True, slots=True, eq=False)
class Staged:
    """A copy to a staging buffer has been issued."""

    lease: Lease
    arrived: Mark


Route = tuple[Callable[[Transfer, Ready], Any], Callable[[Transfer, Future[Any]], None]]
"""What the lane `d2h issue` does, and what the lane `gradient store` does with the future of that."""


class GradientOffload:
    """Copies gradients to their homes."""

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
        self._store_lane = lanes.lane("gradient store")
        self._squares = reduce.square_sums_kernel(home.value)
        self._store_first = reduce.store_kernel(wire.value, home.value, False)
        self._store_again = reduce.store_kernel(wire.value, home.value, True)
        self.last: Future[Any] = lanes.resolved("nothing offloaded")

    def submit(
        self, pid: int, arrived: AbstractSet[int], stored: AbstractSet[int], slot: GradientSlot, ready: Ready
    ) -> None:
        """Bring the entries `arrived` of a partition from its device slot to their homes.

        `stored`: entries whose home already holds a gradient of this step; those that arrive again are added to it.
        `ready`: since when the slot holds them. The unit whose future is `slot.issued` releases the slot.
        """
        transfers = self._transfers(pid, arrived, stored, slot.lease.bytes)
        if not transfers:
            unit = partial(self._release_unused, slot.lease, ready)
            self._issue_lane.submit(unit, slot.issued.name, slot.issued)
            return
        self.last = transfers[-1].stored
        routes = [self._route(transfer) for transfer in transfers]
        num_copies = len(routes) - routes.count(None)
        # The last copy releases the slot, after what is stored in place.
        after = self.last if num_copies < len(routes) else None
        works: list[Callable[[], None]] = []
        for transfer, route in zip(transfers, routes, strict=True):
            if route is None:
                works.append(partial(self._store_in_place, transfer, ready))
                continue
            num_copies -= 1
            issue, future = partial(route[0], transfer, ready), None
            if num_copies == 0:
                issue, future = partial(self._issue_last, issue, slot.lease, after), slot.issued
            future = self._issue_lane.submit(issue, transfer.stored.name, future)
            works.append(partial(route[1], transfer, future))
        for transfer, work in zip(transfers, works, strict=True):
            self._store_lane.submit(work, transfer.stored.name, transfer.stored)
        if routes.count(None) == len(routes):  # nothing to issue: one lane less to wake
            slot.lease.release(self.last)
            slot.issued.resolve()

    def wait_stored(self) -> None:
        """Wait for everything submitted so far."""
        # Without this a gradient is read that is still on its way to its home.
        self._lanes.wait(self.last, Reason.OFFLOADED)

    def _transfers(
        self, pid: int, arrived: AbstractSet[int], stored: AbstractSet[int], slot_bytes: Tensor
    ) -> list[Transfer]:
        itemsize = self._wire.dtype.itemsize
        transfers = []
        for target in self.chunks[pid]:
            update = update_of(target, arrived, stored)
            if update is not None:
                chunk = target.home.chunk
                source = slot_bytes[chunk.start * itemsize : chunk.stop * itemsize]
                future = self._lanes.future(target.name)
                transfers.append(Transfer(update, source, future, consumed=target.consumed, before=target.stored))
                target.stored = future
        return transfers

    def _route(self, transfer: Transfer) -> Route | None:
        """None: in place."""
        tier = transfer.target.home.tier
        if tier is Tier.DEVICE:
            on_device = self._on_device
            return None if on_device is None else (partial(self._issue_on_device, on_device), self._store_on_device)
        if tier is Tier.HOST and self._wire == self.home_dtype and not len(transfer.update.again):
            return self._issue_direct, self._store_direct
        return self._issue_staged, self._store_staged

    # --------------------------------------------------------------------------------------------------- direct

    def _issue_direct(self, transfer: Transfer, ready: Ready) -> Mark:
        self._wait_consumed(transfer)
        if transfer.before is not None:
            # Without this a gradient that was dropped meanwhile is added to this one when it is stored at last.
            self._lanes.wait(transfer.before, Reason.OFFLOADED)
        return self._copy(transfer, transfer.target.home.bytes, ready)

    def _store_direct(self, transfer: Transfer, issued: "Future[Mark]") -> None:
        self._wait_on_host(self._issued(issued))
        target = transfer.target
        num_bytes = target.chunk.numel * self._wire.dtype.itemsize
        values = bits(typed(target.home.bytes[:num_bytes], self._wire.dtype))
        self._lanes.declare(reads=[target.home.bytes], writes=[target.sums_place()])
        self._with_sums(self._squares, target, transfer.update.first, values)

    # --------------------------------------------------------------------------------------------------- staged

    def _issue_staged(self, transfer: Transfer, ready: Ready) -> Staged:
        self._wait_consumed(transfer)
        lease = self._ring.acquire(released_by=transfer.stored)
        return Staged(lease, self._copy(transfer, lease.bytes, ready))

    def _store_staged(self, transfer: Transfer, issued: "Future[Staged]") -> None:
        staged = self._issued(issued)
        self._wait_on_host(staged.arrived)
        home, chunk, buffer = transfer.target.home, transfer.target.chunk, staged.lease.bytes
        source = buffer[: chunk.numel * self._wire.dtype.itemsize]
        if not isinstance(home, DiskHome):
            self._store(transfer, source, home.bytes)
            staged.lease.release()
            return
        offset = round_up(source.numel(), DISK_ALIGN_BYTES)
        record = buffer[offset : offset + home.num_bytes]
        if transfer.update.keeps_old:
            # Without this the kernel adds to what the staging buffer held before.
            self._lanes.wait(home.read(record, "gradient so far"), Reason.READ)
        self._store(transfer, source, record)
        staged.lease.release(home.write(record, f"gradient write: {chunk.partition}"))

    # ------------------------------------------------------------------------------------------------- in place

    def _store_in_place(self, transfer: Transfer, ready: Ready) -> None:
        self._wait_consumed(transfer)
        self._wait_on_host(self._reached(ready))
        self._store(transfer, transfer.source, transfer.target.home.bytes)

    # ------------------------------------------------------------------------------------------------ on device

    def _issue_on_device(self, on_device: DeviceOffload, transfer: Transfer, ready: Ready) -> Mark:
        self._wait_consumed(transfer)
        self._after_ready(ready)
        if transfer.target.read_by is not None:
            # Without this a gradient of the user's own, behind which there is no use of the new weights, overwrites one
            # that the step on the device has not yet read.
            self._device.d2h.after(transfer.target.read_by, Reason.GRADIENT_CONSUMED)
        on_device.issue(transfer.update, transfer.source)
        return self._device.d2h.record()

    def _store_on_device(self, transfer: Transfer, issued: "Future[Mark]") -> None:
        """All has been done but for the sums of squares, which the host reads."""
        self._wait_on_host(self._issued(issued))

    # ------------------------------------------------------------------------------------ parts of several routes

    def _wait_consumed(self, transfer: Transfer) -> None:
        if transfer.consumed is not None:
            # Without this the next gradient overwrites one that the step has not yet read.
            self._lanes.wait(transfer.consumed, Reason.GRADIENT_CONSUMED)

    def _reached(self, ready: Ready) -> Mark:
        if not isinstance(ready, Future):
            return ready
        # The event does not exist before the collective has been issued.
        return self._lanes.wait(ready, Reason.AVERAGE_ISSUED)

    def _after_ready(self, ready: Ready) -> None:
        # Without this a gradient is copied that the device has not finished computing.
        self._device.d2h.after(self._reached(ready), Reason.GRADIENT_READY)

    def _copy(self, transfer: Transfer, destination: Tensor, ready: Ready) -> Mark:
        """Issue the copies of what arrives; the mark is reached once they have."""
        self._after_ready(ready)
        itemsize = self._wire.dtype.itemsize
        for low, high in transfer.update.runs:
            part = slice(low * itemsize, high * itemsize)
            name = f"gradient d2h: {transfer.target.chunk.partition}"
            self._device.d2h.copy(destination[part], transfer.source[part], name)
        return self._device.d2h.record()

    def _issue_last(self, issue: Callable[[], T], slot: Lease, after: "Future[Any] | None") -> T:
        """The last copy from a slot: it is free once the copies have been made and `after` is done."""
        issued = issue()
        slot.release(after, mark=self._device.d2h.record())
        return issued

    def _release_unused(self, slot: Lease, ready: Ready) -> None:
        """Only ranks use a slot of which nothing is offloaded here: others' shards are averaged in it."""
        slot.release(mark=self._reached(ready) if isinstance(ready, Future) else None)

    def _issued(self, issued: "Future[T]") -> T:
        # The event does not exist before the copy has been issued.
        return self._lanes.wait(issued, Reason.COPY_ISSUED)

    def _wait_on_host(self, arrived: Mark) -> None:
        # Without this half a copy is read, and enters the norm and the step.
        self._lanes.wait(arrived.future, Reason.GRADIENT_ON_HOST)

    def _store(self, transfer: Transfer, source: Tensor, home: Tensor) -> None:
        """Overwrite or add to what `home` holds (the home itself, or its record in a staging buffer)."""
        target, numel = transfer.target, transfer.target.chunk.numel
        self._lanes.declare(reads=[source], writes=[home, target.sums_place()])
        values = bits(typed(source, self._wire.dtype))
        stored = bits(typed(home[: numel * self.home_dtype.dtype.itemsize], self.home_dtype.dtype))
        update = transfer.update
        for kernel, segments in ((self._store_first, update.first), (self._store_again, update.again)):
            if len(segments):
                self._with_sums(kernel, target, segments, values, stored)

    def _with_sums(
        self, kernel: Callable[..., None], target: GradientChunk, segments: Segments, *arrays: np.ndarray[Any, Any]
    ) -> None:
        """Run a kernel that finds the sums of squares of these segments."""
        if segments is target.whole.segments:
            kernel(*arrays, target.starts, target.stops, target.sums)
            return
        sums = np.empty(len(segments))
        kernel(*arrays, target.starts[segments], target.stops[segments], sums)
        target.sums[segments] = sums
