"""Storage: every byte that a plan promised, allocated: homes, rings and swap files.

Owns: regions, device buffers, swap files, the I/O queue, and the homes that lie in them.
Does not: decide sizes (placement/plan.py) or move bytes.
Threads: made and closed by the training thread.
"""

import gc
import logging
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Reason
from offload.disk.checksums import Checksums
from offload.disk.io_queue import IoQueue, TransferQueue
from offload.disk.layout import Extent, Layout
from offload.disk.swap_file import SwapFiles
from offload.errors import InternalError
from offload.memory.region import Region
from offload.memory.ring import Ring
from offload.model.partitions import Partition
from offload.planning.disk_settings import DiskSettings
from offload.runtime import Runtime
from offload.storage.homes import Chunk, DiskHome, Home, MemoryHome
from offload.storage.state_tensors import StateTensors, record_bytes
from offload.units import DISK_ALIGN_BYTES, Tier, round_up

log = logging.getLogger("offload")

QueueOf = Callable[..., TransferQueue]
"""Makes the queue of a session's swap files from (files, lanes=, timeline=, and what is set of the disks)."""

NO_MEMORY: Final = torch.empty(0, dtype=torch.uint8)

KINDS = ("weights", "gradients", "state")


class Storage:
    """All memory and files of one session."""

    def __init__(
        self,
        runtime: Runtime,
        state_tensors: Sequence[StateTensors],
        disk: DiskSettings,
        queue_of: QueueOf = IoQueue,
    ) -> None:
        """`state_tensors`: of each partition."""
        plan, ranks = runtime.plan, runtime.ranks
        self.plan = plan
        self._is_sharded = ranks.is_sharded
        self._rank, self._world_size = ranks.rank, ranks.world_size
        self.state_tensors = state_tensors
        """Of each partition's state."""
        self._partitions = runtime.partitions
        self._device = runtime.device
        self._lanes = runtime.lanes
        self._ledger = runtime.ledger
        self._regions: list[Region] = []
        self._rings: list[Ring] = []
        self._device_bytes: list[tuple[str, int]] = []
        self._files: SwapFiles | None = None
        self.queue: TransferQueue | None = None
        self.checksums: Checksums | None = None
        self.weights: list[list[Home]] = []
        """By partition: of the trainable flat parameter, then of the frozen one."""
        self.gradients: list[list[Home]] = []
        self.state: list[list[Home]] = []
        self._itemsizes = (runtime.precision.dtype.itemsize, runtime.gradient_precision.dtype.itemsize)
        try:
            self._make_files(runtime.config.disk_folders, disk, queue_of)
            self._make_homes()
            self.weight_ring = self._host_ring("weight staging", plan.weight_buffer_bytes, plan.weight_buffers)
            self.offload_ring = self._host_ring("gradient staging", plan.offload_buffer_bytes, plan.offload_buffers)
            self.step_ring = self._host_ring("step staging", plan.step_buffer_bytes, plan.step_buffers)
            slots = self.on_device("gradient slots", plan.gradient_slot_bytes * plan.gradient_slots)
            self.gradient_ring = self._ring("gradient slots", slots, plan.gradient_slot_bytes, plan.gradient_slots)
            self.received = self.on_device("parts of other ranks", plan.exchange_bytes)
        except BaseException:
            self.close()
            raise

    @property
    def files(self) -> SwapFiles | None:
        """Where extents lie; None without a disk."""
        return self._files

    @property
    def disk_mode(self) -> str | None:
        """`direct` or `buffered`; None without a disk."""
        return self._files.mode if self._files is not None else None

    def newest_writes(self) -> "list[Future[Any]]":
        """The last write of every chunk that is at home on disk."""
        homes = [home for kind in (self.weights, self.gradients, self.state) for row in kind for home in row]
        on_disk = [home for home in homes if isinstance(home, DiskHome)]
        return [home.last_write for home in on_disk if home.last_write is not None]

    def wait_written(self) -> None:
        """Wait until every write submitted so far has ended."""
        for write in self.newest_writes():
            # Without this what is on its way to the disk is not counted, and a clone has half of it.
            self._lanes.wait(write, Reason.DRAIN)

    def on_device(self, owner: str, num_bytes: int) -> Tensor:
        """Device memory, charged to the ledger until `close`."""
        self._ledger.charge(Tier.DEVICE, owner, num_bytes)
        self._device_bytes.append((owner, num_bytes))
        return self._device.allocate(num_bytes)

    def close(self) -> None:
        """Give everything back. The lanes must be idle. Idempotent."""
        if self.queue is not None:
            self.queue.close()
            self.queue = None
        if self._files is not None:  # before the memory: the files go even where a region cannot
            self._ledger.discharge(Tier.DISK, "swap files", self.plan.disk_bytes)
            self._files.close()
            self._files = None
        # A graph that the user keeps alive reaches all of this through its hooks: only what they reach is let go.
        for ring in self._rings:
            ring.close()
        for homes in (self.weights, self.gradients, self.state):
            for home in (home for row in homes for home in row):
                if isinstance(home, MemoryHome):
                    home.bytes = NO_MEMORY
            homes.clear()
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

    # ---------------------------------------------------------------------------------------------- making

    def _make_files(self, folders: Sequence[Path], disk: DiskSettings, queue_of: QueueOf) -> None:
        """Walk the plan in forward order and give every chunk on disk an extent; then make the files."""
        self._extents: dict[tuple[str, int, bool, int], Extent] = {}
        if not self.plan.disk_bytes:
            return
        layout = Layout(len(folders), disk.shares or None)
        for kind in ("state", "gradients", "weights"):
            for partition, homes in zip(self._partitions, self.plan.homes, strict=True):
                for trainable, tiers in self._tiers(kind, homes):
                    for chunk, tier in zip(self._chunks(partition, trainable), tiers, strict=True):
                        if tier is Tier.DISK:
                            key = (kind, partition.id, trainable, chunk.index)
                            self._extents[key] = layout.allocate(self._num_bytes(kind, chunk))
        self._files = SwapFiles.create(
            folders, run_id=uuid.uuid4().hex[:12], rank=self._rank, bytes_by_file=layout.bytes_by_file
        )
        self._ledger.charge(Tier.DISK, "swap files", self.plan.disk_bytes)
        options = disk.queue_arguments()
        if disk.checksum:
            options["checksums"] = self.checksums = Checksums(self._files)
        self.queue = queue_of(self._files, lanes=self._lanes, timeline=self._lanes.timeline, **options)

    def _make_homes(self) -> None:
        for kind in KINDS:
            host = self._region(f"{kind} at home", self._bytes_at(kind, Tier.HOST))
            # Weights of one rank lie in their slots, which are made later; a shard among several has its own place.
            in_slots = kind == "weights" and not self._is_sharded
            device_bytes = 0 if in_slots else self._bytes_at(kind, Tier.DEVICE)
            device = self.on_device(f"{kind} at home", device_bytes)
            taken = {Tier.HOST: 0, Tier.DEVICE: 0}
            by_partition: list[list[Home]] = getattr(self, kind)
            for partition, homes in zip(self._partitions, self.plan.homes, strict=True):
                row: list[Home] = []
                for trainable, tiers in self._tiers(kind, homes):
                    for chunk, tier in zip(self._chunks(partition, trainable), tiers, strict=True):
                        row.append(self._home(kind, chunk, tier, host, device, taken))
                by_partition.append(row)

    def _home(self, kind: str, chunk: Chunk, tier: Tier, host: Tensor, device: Tensor, taken: dict[Tier, int]) -> Home:
        if tier is Tier.DISK:
            extent = self._extents[kind, chunk.partition_id, chunk.trainable, chunk.index]
            assert self.queue is not None
            return DiskHome(chunk, extent, queue=self.queue, lanes=self._lanes)
        if kind == "weights" and tier is Tier.DEVICE and not self._is_sharded:
            return MemoryHome(chunk, tier, NO_MEMORY)  # its place is the partition's slot: set when slots are made
        num_bytes = self._num_bytes(kind, chunk)
        start = taken[tier]
        taken[tier] += num_bytes
        return MemoryHome(chunk, tier, (host if tier is Tier.HOST else device)[start : start + num_bytes])

    def _tiers(self, kind: str, homes: Any) -> list[tuple[bool, tuple[Tier, ...]]]:
        if kind == "weights":
            return [(True, homes.trainable_weights), (False, homes.frozen_weights)]
        return [(True, getattr(homes, kind))]

    def _chunks(self, partition: Partition, trainable: bool) -> list[Chunk]:
        flat = partition.flat_parameters[0 if trainable else 1]
        chunks = flat.chunks(self.plan.chunk_numel, self._rank, self._world_size)
        return [Chunk(partition.id, trainable, index, start, stop) for index, (start, stop) in enumerate(chunks)]

    def _num_bytes(self, kind: str, chunk: Chunk) -> int:
        if kind == "state":
            return record_bytes(self.state_tensors[chunk.partition_id], chunk.numel)
        itemsize = self._itemsizes[0 if kind == "weights" else 1]
        return round_up(chunk.numel * itemsize, DISK_ALIGN_BYTES)

    def _bytes_at(self, kind: str, tier: Tier) -> int:
        return sum(
            self._num_bytes(kind, chunk)
            for partition, homes in zip(self._partitions, self.plan.homes, strict=True)
            for trainable, tiers in self._tiers(kind, homes)
            for chunk, at in zip(self._chunks(partition, trainable), tiers, strict=True)
            if at is tier
        )

    def _region(self, owner: str, num_bytes: int) -> Tensor:
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        region = Region(num_bytes, owner=owner, ledger=self._ledger, register=self._device.register)
        self._regions.append(region)
        return region.tensor

    def _host_ring(self, owner: str, buffer_bytes: int, num_buffers: int) -> Ring:
        buffer = self._region(owner, buffer_bytes * num_buffers)
        return self._ring(owner, buffer, buffer_bytes, num_buffers)

    def _ring(self, name: str, buffer: Tensor, buffer_bytes: int, num_buffers: int) -> Ring:
        ring = Ring(name, buffer, buffer_bytes=buffer_bytes, num_buffers=num_buffers, lanes=self._lanes)
        self._rings.append(ring)
        return ring
