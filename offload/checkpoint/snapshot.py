"""The state of one moment, for a checkpoint that is written while training goes on.

Owns: what is copied in host memory, what is cloned on disk, whether there is room for both, and reading it back.
Does not: make clones (disk/clone.py), write the checkpoint (checkpoint/) or run in a thread (background.py).
Threads: taken by the training thread with idle lanes; its values are read, and it is closed, by another.

Note [Scratch of a save]: the buffer through which clones are read is a few MiB (with checksum=True one record), as that
of a load, and counts in no budget: rings and homes fill the host budget to the brim, and for want of these few MiB no
save could go on in the background.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from offload.checkpoint.format.state import WEIGHTS, Item, Run, StateSource
from offload.checkpoint.session_state import PlacedRun, SessionValues
from offload.concurrency.lanes import Lanes
from offload.disk import clone
from offload.disk.clone import Clones
from offload.disk.layout import Extent
from offload.memory.ledger import Ledger
from offload.memory.region import typed
from offload.runtime import Runtime
from offload.storage.allocation import Storage, Swap
from offload.storage.homes import DiskHome, Home
from offload.storage.state_tensors import StateTensor, StateTensors, record_bytes
from offload.units import DISK_ALIGN_BYTES, MIB, Tier, round_up

COPY: Final = "copy for a checkpoint"
CLONES: Final = "clones for a checkpoint"

CUT_BYTES: Final = 2 * MIB
"""Read from the clones at once. See Note [Scratch of a save]."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """A run, at most CUT_BYTES of it, and where it lies in what was taken."""

    run: Run
    dtype: torch.dtype
    extent: Extent | None
    """The part of a home that was ever written, beyond it all is zeros; None: copied in memory."""
    offset: int
    """In the extent, in bytes."""

    @property
    def num_bytes(self) -> int:
        return self.run.numel * self.dtype.itemsize


class Snapshots:
    """Takes the state of a session."""

    def __init__(self, runtime: Runtime, values: SessionValues) -> None:
        self._runtime = runtime
        self._ledger = runtime.ledger
        self._storage = values.walk.storage
        self._values = values

    def take(self, source: StateSource, checkpoint: Path) -> "Copied | Snapshot | None":
        """The state as it is now; None where there is no room for it, so that it is saved before training goes on.

        `source` gives the same state; `checkpoint` is where it will be written, which takes room on a disk, too.
        """
        num_bytes = num_bytes_of(source)
        swap = self._storage.swap
        if swap is not None:
            # What is stored in memory is copied there, or to the disk, which is slower.
            for in_memory in (True, False):
                snapshot = self._cloned(swap, checkpoint, num_bytes, copy_in_memory=in_memory)
                if snapshot is not None:
                    return snapshot
        return Copied(source, num_bytes, self._ledger) if self._has_room(Tier.HOST, num_bytes) else None

    def _cloned(
        self, swap: Swap, checkpoint: Path, checkpoint_bytes: int, *, copy_in_memory: bool
    ) -> "Snapshot | None":
        """What is on disk in clones; None where nothing is, or there is no room, or clones cannot be had."""
        runs = self._values.runs(resident=self._runtime.ranks.rank == 0)
        extra_index = None if copy_in_memory else clone.extra_index(swap.files)
        laid = _Laid(runs, self._storage, self._runtime.precision.dtype, extra_index)
        if not (
            laid.extents
            and self._has_room(Tier.HOST, laid.host_bytes)
            and self._has_room(Tier.DISK, laid.disk_bytes)
            and clone.has_room(
                swap.files, laid.extents, extra_bytes=laid.extra_bytes, checkpoint=checkpoint,
                checkpoint_bytes=checkpoint_bytes, num_sharing=self._runtime.ranks.num_local,
            )
        ):  # fmt: skip
            return None
        self._storage.wait_written()  # or a clone holds a part of the last step and a part of the one before
        clones = Clones.take(swap.files, laid.extents, extra_bytes=laid.extra_bytes, checksums=swap.checksums)
        if clones is None:
            return None
        snapshot = Snapshot(self._values.items(), laid, clones, self._ledger, verify=swap.checksums is not None)
        try:
            snapshot.fill(self._runtime.lanes)
        except BaseException:
            snapshot.close()
            raise
        return snapshot

    def _has_room(self, tier: Tier, num_bytes: int) -> bool:
        budget = self._ledger.budget(tier)
        return budget is None or self._ledger.held(tier) + num_bytes <= budget


class _Laid:
    """Where everything lies: in clones of extents, in a file next to them, or in copies in memory."""

    def __init__(
        self, runs: Sequence[PlacedRun], storage: Storage, dtype: torch.dtype, extra_index: int | None
    ) -> None:
        """`extra_index`: of the file for homes in memory; None: their runs are copied in memory."""
        self._storage = storage
        self._dtype = dtype
        self.extra_index = extra_index
        self.extents: list[Extent] = []
        """To be cloned."""
        self.extra: list[tuple[Tensor, Extent]] = []
        """What is in memory, to be written next to the clones."""
        self.extra_bytes = 0
        self.copied: list[tuple[_Cut, Tensor]] = []
        """Runs to be copied in memory, and the bytes that they are; in the order of `cuts`."""
        self._extent_of: dict[Home, Extent | None] = {}
        self.cuts = [cut for placed in runs for cut in self._cuts_of(placed)]
        self.host_bytes = sum(cut.num_bytes for cut, _ in self.copied)
        """Of the copies in memory."""

    @property
    def disk_bytes(self) -> int:
        """What it comes to take, where all that is cloned is overwritten."""
        return self.extra_bytes + sum(extent.num_bytes for extent in self.extents)

    def _cuts_of(self, placed: PlacedRun) -> Iterator[_Cut]:
        if isinstance(placed.place, Tensor):
            values = placed.place.detach().reshape(-1)[placed.start : placed.stop]  # of any strides, anywhere
            extent = self._extra(values, round_up(values.numel() * values.element_size(), DISK_ALIGN_BYTES))
            cut = _Cut(placed.run, values.dtype, extent, 0)
            if extent is None:
                self.copied.append((cut, values))
            yield cut
            return
        chunk = placed.place
        if not chunk.trainable or placed.run.state_tensor == WEIGHTS:
            home = self._storage.weights_of(chunk)
            size = round_up(chunk.numel * self._dtype.itemsize, DISK_ALIGN_BYTES)
            base, dtype = placed.start * self._dtype.itemsize, self._dtype
        else:
            home = self._storage.state_of(chunk)
            state_tensors = self._storage.state_tensors[chunk.partition_id]
            size = record_bytes(state_tensors, chunk.numel)
            at, state_tensor = _tensor_at(state_tensors, placed.run.state_tensor, chunk.numel)
            base, dtype = (
                at + placed.start // state_tensor.block_numel * state_tensor.dtype.itemsize,
                state_tensor.dtype,
            )
        if home not in self._extent_of:
            self._extent_of[home] = self._extent(home, size)
        extent = self._extent_of[home]
        step = CUT_BYTES // dtype.itemsize
        for start in range(placed.run.start, placed.run.stop, step):
            run = Run(placed.run.item, placed.run.state_tensor, start, min(start + step, placed.run.stop))
            cut = _Cut(run, dtype, extent, base + (start - placed.run.start) * dtype.itemsize)
            if extent is None:
                self.copied.append((cut, home.bytes[cut.offset : cut.offset + cut.num_bytes]))
            yield cut

    def _extent(self, home: Home, num_bytes: int) -> Extent | None:
        if isinstance(home, DiskHome):
            self.extents.append(home.stored)
            return home.stored
        return self._extra(home.bytes, num_bytes)

    def _extra(self, values: Tensor, num_bytes: int) -> Extent | None:
        if self.extra_index is None:
            return None
        extent = Extent(self.extra_index, self.extra_bytes, num_bytes)
        self.extra.append((values, extent))
        self.extra_bytes += num_bytes
        return extent


class Snapshot:
    """What is on disk in clones, the rest copied. See StateSource. Close it after a save, also after a failed one."""

    def __init__(self, items: Sequence[Item], laid: _Laid, clones: Clones, ledger: Ledger, *, verify: bool) -> None:
        self._items = items
        self._laid = laid
        self._ledger = ledger
        self._verify = verify
        self._charged: list[tuple[Tier, str, int]] = []
        self._clones = clones
        self._copies: list[Tensor] = []
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._open: Extent | None = None

    def fill(self, lanes: Lanes) -> None:
        """Account for all of it, and copy what is in memory."""
        laid = self._laid
        for tier, owner, num_bytes in ((Tier.HOST, COPY, laid.host_bytes), (Tier.DISK, CLONES, laid.disk_bytes)):
            self._ledger.charge(tier, owner, num_bytes)
            self._charged.append((tier, owner, num_bytes))
        most = max((extent.num_bytes for extent in self._laid.extents), default=0)
        # A cut begins and ends within pages; what is verified is read whole.
        self._buffer = _aligned(max(CUT_BYTES + 2 * DISK_ALIGN_BYTES, most if self._verify else 0))
        for cut, values in self._laid.copied:
            if values.dtype is torch.uint8:  # of a home, not of a buffer of the model's
                lanes.declare(reads=[values])
            copied = values.to("cpu", copy=True).contiguous()
            self._copies.append(copied if copied.dtype is cut.dtype else copied.view(cut.dtype))
        self._copies.reverse()
        self._laid.copied.clear()
        for values, extent in self._laid.extra:
            raw = values.contiguous().view(torch.uint8)
            lanes.declare(reads=[raw])
            for start in range(0, extent.num_bytes, CUT_BYTES):
                part = Extent(extent.file_index, extent.offset + start, min(CUT_BYTES, extent.num_bytes - start))
                staged, held = self._buffer[: part.num_bytes], raw[start : start + part.num_bytes]
                staged[: held.numel()].copy_(held)
                staged[held.numel() :].zero_()
                self._clones.write(part, staged, "copying for a checkpoint")
        self._laid.extra.clear()

    def items(self) -> Sequence[Item]:
        """See StateSource."""
        return self._items

    def runs(self) -> Sequence[Run]:
        """See StateSource."""
        return [cut.run for cut in self._laid.cuts]

    def values(self) -> Iterator[Tensor]:
        """See StateSource. Each copy is released once it was given."""
        for cut in self._laid.cuts:
            yield self._copies.pop() if cut.extent is None else self._read(cut, cut.extent)

    def close(self) -> None:
        """Remove the clones and release the memory. Idempotent."""
        self._clones.close()
        self._copies.clear()
        self._buffer = torch.empty(0, dtype=torch.uint8)
        while self._charged:
            self._ledger.discharge(*self._charged.pop())

    def _read(self, cut: _Cut, extent: Extent) -> Tensor:
        """The entries of a run: valid until the next."""
        buffer, begin, name = self._buffer, cut.offset, f"{cut.run} for a checkpoint"
        if begin >= extent.num_bytes:  # a whole state tensor that was never written
            self._open = None
            return typed(buffer[: cut.num_bytes].zero_(), cut.dtype)
        if self._verify and extent.file_index != self._laid.extra_index:
            if extent != self._open:
                self._open = None
                self._clones.read(extent, buffer[: extent.num_bytes], name, verify=True)
                self._open = extent
        else:
            self._open = None
            first = begin - begin % DISK_ALIGN_BYTES
            num_bytes = round_up(begin + cut.num_bytes, DISK_ALIGN_BYTES) - first
            self._clones.read(Extent(extent.file_index, extent.offset + first, num_bytes), buffer[:num_bytes], name)
            begin -= first
        return typed(buffer[begin : begin + cut.num_bytes], cut.dtype)


class Copied:
    """All values copied in host memory. See StateSource. Close it after a save."""

    def __init__(self, source: StateSource, num_bytes: int, ledger: Ledger) -> None:
        self._items = source.items()
        self._runs = source.runs()
        self._values: list[Tensor] = []
        self._undo: Callable[[], None] | None = partial(ledger.discharge, Tier.HOST, COPY, num_bytes)
        ledger.charge(Tier.HOST, COPY, num_bytes)
        try:
            self._values += (values.clone() for values in source.values())
        except BaseException:
            self.close()
            raise
        self._values.reverse()

    def items(self) -> Sequence[Item]:
        """See StateSource."""
        return self._items

    def runs(self) -> Sequence[Run]:
        """See StateSource."""
        return self._runs

    def values(self) -> Iterator[Tensor]:
        """See StateSource. Each value is released once it was given."""
        while self._values:
            yield self._values.pop()

    def close(self) -> None:
        """Release the memory. Idempotent."""
        self._values.clear()
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()


def num_bytes_of(source: StateSource) -> int:
    """Bytes of all its values."""
    sizes = _sizes(source.items())
    return sum(run.numel * sizes[run.item, run.state_tensor] for run in source.runs())


def _sizes(items: Sequence[Item]) -> dict[tuple[str, str], int]:
    """Bytes of an entry, by item and state tensor."""
    return {
        (item.name, state_tensor.name): state_tensor.dtype.itemsize
        for item in items
        for state_tensor in item.state_tensors
    }


def _tensor_at(state_tensors: StateTensors, name: str, numel: int) -> tuple[int, StateTensor]:
    """Where a state tensor begins in the record of a chunk, in bytes."""
    index = next(index for index, state_tensor in enumerate(state_tensors) if state_tensor.name == name)
    return record_bytes(state_tensors[:index], numel), state_tensors[index]


def _aligned(num_bytes: int) -> Tensor:
    """Memory as direct I/O wants it."""
    memory = torch.empty(num_bytes + DISK_ALIGN_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % DISK_ALIGN_BYTES
    return memory[start : start + num_bytes]
