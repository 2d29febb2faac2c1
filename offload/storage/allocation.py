"""Storage: all memory and files of a session, allocated as its plan says: homes, rings and swap files.

Owns: regions, device buffers, swap files, the disk queue, and the homes that lie in them.
Does not: decide sizes (planning/plan.py) or move bytes.
Threads: made and closed by the training thread.
"""

import gc
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from offload.concurrency.lanes import Reason
from offload.disk.checksums import Checksums
from offload.disk.io_queue import IoQueue, TransferQueue
from offload.disk.layout import Layout
from offload.disk.swap_file import SwapFiles
from offload.errors import InternalError
from offload.memory.region import Region
from offload.memory.ring import Ring
from offload.planning.disk_settings import DiskSettings
from offload.runtime import Runtime
from offload.storage.homes import Chunk, DiskHome, Home, MemoryHome
from offload.storage.state_tensors import StateTensors, record_bytes
from offload.units import DISK_ALIGN_BYTES, Tier, round_up

log = logging.getLogger("offload")

QueueOf = Callable[..., TransferQueue]
"""Makes the queue of a session's swap files from (files, lanes=, options=, checksums=)."""

NO_MEMORY: Final = torch.empty(0, dtype=torch.uint8)


class Memory:
    """Regions of host memory, buffers of the device, and rings over both: charged to the ledger until `close`."""

    def __init__(self, runtime: Runtime) -> None:
        self._device = runtime.device
        self._lanes = runtime.lanes
        self._ledger = runtime.ledger
        self._regions: list[Region] = []
        self._rings: list[Ring] = []
        self._device_bytes: list[tuple[str, int]] = []

    def on_device(self, owner: str, num_bytes: int) -> Tensor:
        """A buffer of the device."""
        self._ledger.charge(Tier.DEVICE, owner, num_bytes)
        self._device_bytes.append((owner, num_bytes))
        return self._device.allocate(num_bytes)

    def on_host(self, owner: str, num_bytes: int) -> Tensor:
        """A region of host memory."""
        if num_bytes == 0:
            return NO_MEMORY
        region = Region(num_bytes, owner=owner, ledger=self._ledger, register=self._device.register)
        self._regions.append(region)
        return region.tensor

    def ring(self, name: str, memory: Tensor, buffer_bytes: int, num_buffers: int) -> Ring:
        """A ring over memory from here."""
        ring = Ring(name, memory, buffer_bytes=buffer_bytes, num_buffers=num_buffers, lanes=self._lanes)
        self._rings.append(ring)
        return ring

    def host_ring(self, name: str, buffer_bytes: int, num_buffers: int) -> Ring:
        """A ring of staging buffers."""
        return self.ring(name, self.on_host(name, buffer_bytes * num_buffers), buffer_bytes, num_buffers)

    def close(self) -> None:
        """Free everything. Idempotent."""
        for ring in self._rings:
            ring.close()
        while self._device_bytes:
            self._ledger.discharge(Tier.DEVICE, *self._device_bytes.pop())
        gc.collect()  # leases and units of the last step may still be in cycles
        while self._regions:
            region = self._regions.pop()
            try:
                region.close()
            except InternalError:
                # After a failure its traceback holds views; the memory goes with it, and the failure must be seen.
                if self._lanes.failure is None:
                    raise
                log.warning("%s stays mapped until the traceback of the failure is dropped", region.owner)


class Swap:
    """The swap files of a session, and the queue that reads and writes them."""

    def __init__(self, runtime: Runtime, bytes_by_file: Sequence[int], disk: DiskSettings, queue_of: QueueOf) -> None:
        self._ledger = runtime.ledger
        self._num_bytes = runtime.plan.disk_bytes
        self._is_open = False
        self.files = SwapFiles.create(
            runtime.config.disk_folders, run_id=uuid.uuid4().hex[:12], rank=runtime.ranks.rank,
            bytes_by_file=bytes_by_file,
        )  # fmt: skip
        try:
            self.checksums = Checksums.of(self.files) if disk.checksum else None
            self.queue: TransferQueue = queue_of(
                self.files, lanes=runtime.lanes, options=disk.queue, checksums=self.checksums
            )
            self._ledger.charge(Tier.DISK, "swap files", self._num_bytes)
            self._is_open = True
        except BaseException:
            self.files.close()
            raise

    def close(self) -> None:
        """Finish all transfers and remove the files. Idempotent."""
        self.queue.close()
        if self._is_open:
            self._is_open = False
            self._ledger.discharge(Tier.DISK, "swap files", self._num_bytes)
            self.files.close()


class Storage:
    """The homes of one session's weights, gradients and optimizer state, and the rings of their transfers."""

    def __init__(
        self,
        runtime: Runtime,
        state_tensors: Sequence[StateTensors],
        disk: DiskSettings,
        queue_of: QueueOf = IoQueue,
    ) -> None:
        """`state_tensors`: of each partition."""
        plan = runtime.plan
        self._runtime = runtime
        self._memory = Memory(runtime)
        self._chunks = [[self._cut(pid, True), self._cut(pid, False)] for pid in range(len(runtime.partitions))]
        """By partition: of the trainable flat parameter, and of the frozen one."""
        self.state_tensors = state_tensors
        """Of each partition's state."""
        self.swap: Swap | None = None
        """None without a disk."""
        self.weights: list[list[Home]] = []
        """By partition: of the trainable chunks, then of the frozen ones."""
        self.gradients: list[list[Home]] = []
        self.state: list[list[Home]] = []
        try:
            on_disk = self._make_swap(disk, queue_of)
            self.weights = self._make_homes("weights", on_disk)
            self.gradients = self._make_homes("gradients", on_disk)
            self.state = self._make_homes("state", on_disk)
            memory = self._memory
            self.weight_ring = memory.host_ring("weight staging", plan.weight_buffer_bytes, plan.weight_buffers)
            self.offload_ring = memory.host_ring("gradient staging", plan.offload_buffer_bytes, plan.offload_buffers)
            self.step_ring = memory.host_ring("step staging", plan.step_buffer_bytes, plan.step_buffers)
            slots = memory.on_device("gradient slots", plan.gradient_slot_bytes * plan.gradient_slots)
            self.gradient_ring = memory.ring("gradient slots", slots, plan.gradient_slot_bytes, plan.gradient_slots)
            self.received = memory.on_device("parts of other ranks", plan.exchange_bytes)
        except BaseException:
            self.close()
            raise

    @property
    def disk_mode(self) -> str | None:
        """`direct` or `buffered`; None without a disk."""
        return self.swap.files.mode if self.swap is not None else None

    def weights_of(self, chunk: Chunk) -> Home:
        """Where its weights are."""
        row = self.weights[chunk.partition_id]
        return row[chunk.index if chunk.trainable else chunk.index + len(self._chunks[chunk.partition_id][0])]

    def state_of(self, chunk: Chunk) -> Home:
        """Where the state of a trainable chunk is."""
        return self.state[chunk.partition_id][chunk.index]

    def wait_written(self) -> None:
        """Wait until every write submitted so far has ended."""
        for home in (home for kind in (self.weights, self.gradients, self.state) for row in kind for home in row):
            if isinstance(home, DiskHome) and home.last_write is not None:
                # Without this what is on its way to the disk is not counted, and a clone has half of it.
                self._runtime.lanes.wait(home.last_write, Reason.DRAIN)

    def on_device(self, owner: str, num_bytes: int) -> Tensor:
        """Device memory, charged to the ledger until `close`."""
        return self._memory.on_device(owner, num_bytes)

    def close(self) -> None:
        """Free everything. The lanes must be idle. Idempotent."""
        if self.swap is not None:  # before the memory: the files go even where a region cannot
            self.swap.close()
            self.swap = None
        # A graph that the user keeps alive reaches all of this through its hooks: only what they reach is released.
        for kind in (self.weights, self.gradients, self.state):
            for home in (home for row in kind for home in row):
                if isinstance(home, MemoryHome):
                    home.bytes = NO_MEMORY
            kind.clear()
        self._memory.close()

    # ---------------------------------------------------------------------------------------------- making

    def _cut(self, pid: int, trainable: bool) -> list[Chunk]:
        """The chunks of this rank's shard of a flat parameter."""
        partition = self._runtime.partitions[pid]
        flat = partition.trainable if trainable else partition.frozen
        ranks = self._runtime.ranks
        chunks = flat.chunks(self._runtime.plan.chunk_numel, ranks.rank, ranks.world_size)
        return [Chunk(pid, partition.name, trainable, index, start, stop) for index, (start, stop) in enumerate(chunks)]

    def _placed(self, kind: str) -> Iterator[tuple[Chunk, Tier]]:
        """Every chunk of a kind of data with its tier, in forward order."""
        for (trainable, frozen), homes in zip(self._chunks, self._runtime.plan.homes, strict=True):
            if kind == "weights":
                yield from zip(trainable, homes.trainable_weights, strict=True)
                yield from zip(frozen, homes.frozen_weights, strict=True)
            else:
                yield from zip(trainable, homes.gradients if kind == "gradients" else homes.state, strict=True)

    def _make_swap(self, disk: DiskSettings, queue_of: QueueOf) -> dict[tuple[str, Chunk], DiskHome]:
        """Walk the plan in forward order and give every chunk on disk an extent; then make the files."""
        runtime = self._runtime
        if not runtime.plan.disk_bytes:
            return {}
        layout = Layout(len(runtime.config.disk_folders), disk.shares or None)
        extents = {
            (kind, chunk): layout.allocate(self._num_bytes(kind, chunk))
            for kind in ("state", "gradients", "weights")
            for chunk, tier in self._placed(kind)
            if tier is Tier.DISK
        }
        self.swap = Swap(runtime, layout.bytes_by_file, disk, queue_of)
        queue, lanes = self.swap.queue, runtime.lanes
        return {key: DiskHome(key[1], extent, queue=queue, lanes=lanes) for key, extent in extents.items()}

    def _make_homes(self, kind: str, on_disk: dict[tuple[str, Chunk], DiskHome]) -> list[list[Home]]:
        # Weights of one rank lie in their slots, which are made later; a shard among several has its own place.
        in_slots = kind == "weights" and not self._runtime.ranks.is_sharded
        places = {
            Tier.HOST: self._memory.on_host(f"{kind} in their homes", self._bytes_at(kind, Tier.HOST)),
            Tier.DEVICE: self._memory.on_device(
                f"{kind} in their homes", 0 if in_slots else self._bytes_at(kind, Tier.DEVICE)
            ),
        }
        taken = dict.fromkeys(places, 0)
        rows: list[list[Home]] = [[] for _ in self._chunks]
        for chunk, tier in self._placed(kind):
            row = rows[chunk.partition_id]
            if tier is Tier.DISK:
                row.append(on_disk[kind, chunk])
            elif tier is Tier.DEVICE and in_slots:
                row.append(MemoryHome(chunk, tier, NO_MEMORY))  # its place is set when slots are made
            else:
                start = taken[tier]
                taken[tier] += self._num_bytes(kind, chunk)
                row.append(MemoryHome(chunk, tier, places[tier][start : taken[tier]]))
        return rows

    def _num_bytes(self, kind: str, chunk: Chunk) -> int:
        if kind == "state":
            return record_bytes(self.state_tensors[chunk.partition_id], chunk.numel)
        runtime = self._runtime
        dtype = (runtime.precision if kind == "weights" else runtime.gradient_precision).dtype
        return round_up(chunk.numel * dtype.itemsize, DISK_ALIGN_BYTES)

    def _bytes_at(self, kind: str, tier: Tier) -> int:
        return sum(self._num_bytes(kind, chunk) for chunk, at in self._placed(kind) if at is tier)
