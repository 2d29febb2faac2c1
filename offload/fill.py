"""Values into the homes and out of them: at the start, at the end, and whenever somebody reads weights.

Owns: the way from a model's parameters to weights, masters and moments at home, and back.
Does not: train. Every function needs idle lanes.
Threads: the training thread.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from offload.config import Precision
from offload.device import Device
from offload.homes import Home, Piece
from offload.kernels import master_copy
from offload.lanes import Lanes, Promise, Reason
from offload.memory.region import bits, typed
from offload.memory.ring import SlabRing
from offload.optimizer.planes import ADAM_PLANES, plane_views, record_bytes
from offload.partition import Entry, Partition
from offload.storage import Storage
from offload.units import Tier
from offload.weights.slots import Slot


class Filler:
    """Reads and writes homes piece by piece, through a slab where they are on disk."""

    def __init__(
        self, storage: Storage, slots: Sequence[Slot], *, precision: Precision, device: Device, lanes: Lanes
    ) -> None:
        self._storage = storage
        self._slots = slots
        self._precision = precision
        self._device = device
        self._lanes = lanes

    # ----------------------------------------------------------------------------------------------- in

    def fill(self, partition: Partition, optimizer: torch.optim.Optimizer | None) -> None:
        """Values of the partition's parameters, and moments the optimizer already has, into their homes."""
        for (piece, state), (_, weights) in zip(
            self._storage.state[partition.id], self._trainable_weights(partition.id), strict=True
        ):
            with self._state(state, piece, write=True) as record:
                planes = plane_views(ADAM_PLANES, record, piece.numel)
                for plane in planes.values():
                    plane.fill(0)
                for entry, in_piece, in_entry in overlaps(partition.trainable.entries, piece):
                    self._fill_entry(
                        entry, in_entry, {n: torch.from_numpy(p[in_piece]) for n, p in planes.items()}, optimizer
                    )
                with self._weights(piece, weights, write=True) as values:
                    master_copy.copy_weights(planes["master"], bits(values), self._precision.value)
        for piece, weights in self._storage.weights[partition.id]:
            if not piece.trainable:
                with self._weights(piece, weights, write=True) as values:
                    for entry, in_piece, in_entry in overlaps(partition.frozen.entries, piece):
                        values[in_piece].copy_(entry.parameter.detach().reshape(-1)[in_entry])

    def _fill_entry(self, entry: Entry, in_entry: slice, planes: dict[str, Tensor], optimizer: object) -> None:
        sources = {"master": entry.parameter.detach()}
        state = getattr(optimizer, "state", {}).get(entry.parameter, {})
        sources |= {name: state[name] for name in ("exp_avg", "exp_avg_sq") if name in state}
        for name, source in sources.items():
            planes[name].copy_(source.reshape(-1)[in_entry])

    # ---------------------------------------------------------------------------------------------- out

    def read_into(self, partition: Partition, entry: Entry, target: Tensor, plane: str = "master") -> None:
        """One parameter's values into `target` (numel,): the fp32 plane, or weights where it is frozen."""
        if entry.index < 0:
            for piece, weights in self._storage.weights[partition.id]:
                if not piece.trainable:
                    for _, in_piece, in_entry in overlaps([entry], piece):
                        with self._weights(piece, weights) as values:
                            target[in_entry].copy_(values[in_piece])
            return
        for piece, state in self._storage.state[partition.id]:
            for _, in_piece, in_entry in overlaps([entry], piece):
                with self._state(state, piece) as record:
                    stored = plane_views(ADAM_PLANES, record, piece.numel)[plane][in_piece]
                    target[in_entry].copy_(torch.from_numpy(stored))

    def read_gradient(self, partition: Partition, entry: Entry, target: Tensor, dtype: torch.dtype) -> None:
        """One parameter's landed gradient (at home as `dtype`) into `target` (numel,)."""
        for piece, home in self._storage.gradients[partition.id]:
            for _, in_piece, in_entry in overlaps([entry], piece):
                num_bytes = piece.numel * dtype.itemsize
                with self._bytes(home, self._storage.land_ring, num_bytes, read=True, write=False) as place:
                    target[in_entry].copy_(typed(place[:num_bytes], dtype)[in_piece])

    def weights_of(self, partition: Partition, entry: Entry) -> Iterator[Tensor]:
        """One parameter's working weights, run by run, in order. A run is valid until the next is asked for."""
        for piece, weights in self._storage.weights[partition.id]:
            if piece.trainable == (entry.index >= 0):
                for _, in_piece, _ in overlaps([entry], piece):
                    with self._weights(piece, weights) as values:
                        yield values[in_piece]

    def write_master(self, partition: Partition, entry: Entry, values: Tensor) -> None:
        """New fp32 values (numel,) of one parameter into master and weights."""
        flat = values.detach().reshape(-1)
        states = self._storage.state[partition.id]
        for (piece, state), (_, weights) in zip(states, self._trainable_weights(partition.id), strict=True):
            for _, in_piece, in_entry in overlaps([entry], piece):
                with self._state(state, piece, keep=True, write=True) as record:
                    master = plane_views(ADAM_PLANES, record, piece.numel)["master"]
                    torch.from_numpy(master[in_piece]).copy_(flat[in_entry])
                    with self._weights(piece, weights, keep=True, write=True) as working:
                        master_copy.copy_weights(master[in_piece], bits(working[in_piece]), self._precision.value)

    def write_frozen(self, partition: Partition, entry: Entry, values: Tensor) -> None:
        """New values (numel,) of one frozen parameter into its weights."""
        flat = values.detach().reshape(-1)
        for piece, weights in self._storage.weights[partition.id]:
            if not piece.trainable:
                for _, in_piece, in_entry in overlaps([entry], piece):
                    with self._weights(piece, weights, keep=True, write=True) as working:
                        working[in_piece].copy_(flat[in_entry])

    # -------------------------------------------------------------------------------------------- places

    def _trainable_weights(self, pid: int) -> list[tuple[Piece, Home]]:
        return [(piece, home) for piece, home in self._storage.weights[pid] if piece.trainable]

    @contextmanager
    def _state(self, home: Home, piece: Piece, *, write: bool = False, keep: bool = False) -> Iterator[Tensor]:
        num_bytes = record_bytes(ADAM_PLANES, piece.numel)
        with self._bytes(home, self._storage.step_ring, num_bytes, read=keep or not write, write=write) as place:
            yield place[:num_bytes]

    @contextmanager
    def _weights(self, piece: Piece, home: Home, *, write: bool = False, keep: bool = False) -> Iterator[Tensor]:
        dtype = self._precision.dtype
        num_bytes = piece.numel * dtype.itemsize
        if home.tier is Tier.DEVICE:
            place = self._slots[piece.partition_id].range(piece.trainable, piece.start, piece.stop)
            on_host = place if self._device.is_host else place.cpu()
            yield typed(on_host, dtype)
            if write and not self._device.is_host:
                place.copy_(on_host)
            return
        read = keep or not write
        with self._bytes(home, self._storage.weight_ring, num_bytes, read=read, write=write) as place:
            yield typed(place[:num_bytes], dtype)

    @contextmanager
    def _bytes(self, home: Home, ring: SlabRing, num_bytes: int, *, read: bool, write: bool) -> Iterator[Tensor]:
        if home.bytes is not None:
            self._lanes.declare(reads=[home.bytes], writes=[home.bytes] if write else [])
            yield home.bytes
            return
        queue, extent = self._storage.queue, home.extent
        assert queue is not None
        assert extent is not None
        if home.written is not None:
            # Without this the read or write overtakes the last write of the same extent.
            self._lanes.wait(home.written, Reason.EXTENT_WRITTEN)
        lease = ring.lease(returned_by=self._lanes.kept("filling"))
        after: Promise[Any] | None = None
        try:
            place = lease.bytes[: extent.num_bytes]
            if read:
                self._lanes.wait(queue.read(extent, place, "reading"), Reason.READ)
            self._lanes.declare(reads=[place], writes=[place] if write else [])
            yield place
            if write:
                after = home.written = queue.write(extent, place, "filling")
        finally:
            lease.give_back(after)


def overlaps(entries: Sequence[Entry], piece: Piece) -> Iterator[tuple[Entry, slice, slice]]:
    """Entries that reach into a piece: the run relative to the piece, and relative to the entry."""
    for entry in entries:
        start, stop = max(entry.start, piece.start), min(entry.stop, piece.stop)
        if start < stop:
            yield entry, slice(start - piece.start, stop - piece.start), slice(start - entry.start, stop - entry.start)
