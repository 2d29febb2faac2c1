"""Values into the homes and out of them: at the start, at the end, and whenever somebody reads weights.

Owns: the way from a model's parameters to weights, masters and moments at home, and back.
Does not: train. Every function needs idle lanes.
Threads: the training thread.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload.concurrency.lanes import Reason
from offload.memory.region import typed
from offload.memory.ring import Ring
from offload.model.partitions import Entry, Partition
from offload.runtime import Runtime
from offload.storage.allocation import Storage
from offload.storage.chunk_state import ChunkState
from offload.storage.homes import Chunk, DiskHome, Home
from offload.storage.state_tensors import is_split, record_bytes
from offload.units import Tier


class Filler:
    """Reads and writes homes chunk by chunk, through a staging buffer where they are on disk."""

    def __init__(self, runtime: Runtime, storage: Storage) -> None:
        self._ranks = runtime.ranks
        self._storage = storage
        self._precision = runtime.precision
        self._device = runtime.device
        self._lanes = runtime.lanes

    # ----------------------------------------------------------------------------------------------- in

    def fill(
        self, partition: Partition, state_of: Callable[[Entry], Mapping[str, Any]], moments: Sequence[str]
    ) -> None:
        """Values of the partition's parameters, and moments the optimizer already has, into their homes.

        With ranks: values of the first rank, and on each rank the shards of its own.
        """
        for entry in partition.entries():
            self._ranks.broadcast(entry.parameter.data)
        state_tensors = self._storage.state_tensors[partition.id]
        for number, chunk in enumerate(self._trainable_chunks(partition.id)):
            parts = [
                (entry, {n: state[n] for n in moments if isinstance(state.get(n), Tensor)}, in_chunk, in_entry)
                for entry, in_chunk, in_entry in overlaps(partition.trainable.entries, chunk)
                for state in (state_of(entry),)
            ]
            zeros_from = None
            if len(state_tensors) > 1 and not any(sources for _, sources, _, _ in parts):
                zeros_from = record_bytes(state_tensors[:1], chunk.numel)
            with self.stored(partition.id, number, read=False, write=True, zeros_from=zeros_from) as stored:
                for array in (*stored.arrays.values(), stored.weights):
                    array.fill(0)
                for entry, sources, in_chunk, in_entry in parts:
                    for name, source in ({"master": entry.parameter} | sources).items():
                        values = source.detach().reshape(-1)[in_entry].to("cpu", torch.float32).contiguous()
                        stored.write(name, in_chunk.start, in_chunk.stop, values.numpy())
        for weights in self._storage.weights[partition.id]:
            if not weights.chunk.trainable:
                with self.weights(weights, write=True) as values:
                    for entry, in_chunk, in_entry in overlaps(partition.frozen.entries, weights.chunk):
                        values[in_chunk].copy_(entry.parameter.detach().reshape(-1)[in_entry])

    # ---------------------------------------------------------------------------------------------- out

    def read_into(self, partition: Partition, entry: Entry, target: Tensor, state_tensor: str = "master") -> None:
        """One parameter's values into `target` (numel,): master or moment, or weights where it is frozen.

        With ranks all must call it: each gets the whole.
        """
        with self._united(target):
            self._read_own(partition, entry, target, state_tensor)

    def _read_own(self, partition: Partition, entry: Entry, target: Tensor, state_tensor: str) -> None:
        if entry.index < 0:
            for weights in self._storage.weights[partition.id]:
                if not weights.chunk.trainable:
                    for _, in_chunk, in_entry in overlaps([entry], weights.chunk):
                        with self.weights(weights) as values:
                            target[in_entry].copy_(values[in_chunk])
            return
        for number, chunk in enumerate(self._trainable_chunks(partition.id)):
            for _, in_chunk, in_entry in overlaps([entry], chunk):
                with self.stored(partition.id, number) as stored:
                    run = np.empty(in_chunk.stop - in_chunk.start, np.float32)
                    stored.read(state_tensor, in_chunk.start, in_chunk.stop, run)
                    target[in_entry].copy_(torch.from_numpy(run))

    @contextmanager
    def _united(self, target: Tensor) -> Iterator[None]:
        """What the block reads into `target` of this rank's shards is put together with that of the others."""
        if self._ranks.is_sharded:
            target.view(torch.uint8).zero_()
        yield
        self._ranks.fill_in(target)

    def read_gradient(self, partition: Partition, entry: Entry, target: Tensor, dtype: torch.dtype) -> None:
        """One parameter's offloaded gradient (at home as `dtype`) into `target` (numel,). With ranks all must call it."""
        with self._united(target):
            for home in self._storage.gradients[partition.id]:
                for _, in_chunk, in_entry in overlaps([entry], home.chunk):
                    num_bytes = home.chunk.numel * dtype.itemsize
                    with self._bytes(home, self._storage.offload_ring, num_bytes, read=True, write=False) as place:
                        target[in_entry].copy_(typed(place[:num_bytes], dtype)[in_chunk])

    def weights_of(self, partition: Partition, entry: Entry) -> Iterator[Tensor]:
        """One parameter's working weights, run by run, in order. A run is valid until the next is asked for.

        With ranks all must call it, and there is one run.
        """
        if not self._ranks.is_sharded:
            yield from (values for values, _ in self._own_weights(partition, entry))
            return
        whole = torch.empty(entry.numel, dtype=self._precision.dtype)
        with self._united(whole):
            for values, in_entry in self._own_weights(partition, entry):
                whole[in_entry].copy_(values)
        yield whole

    def _own_weights(self, partition: Partition, entry: Entry) -> Iterator[tuple[Tensor, slice]]:
        for weights in self._storage.weights[partition.id]:
            if weights.chunk.trainable == (entry.index >= 0):
                for _, in_chunk, in_entry in overlaps([entry], weights.chunk):
                    with self.weights(weights) as values:
                        yield values[in_chunk], in_entry

    def write_master(self, partition: Partition, entry: Entry, values: Tensor) -> None:
        """New fp32 values (numel,) of one parameter into master and weights."""
        flat = values.detach().reshape(-1)
        for number, chunk in enumerate(self._trainable_chunks(partition.id)):
            for _, in_chunk, in_entry in overlaps([entry], chunk):
                with self.stored(partition.id, number, write=True) as stored:
                    new = flat[in_entry].to("cpu", torch.float32).contiguous()
                    stored.write("master", in_chunk.start, in_chunk.stop, new.numpy())

    def write_frozen(self, partition: Partition, entry: Entry, values: Tensor) -> None:
        """New values (numel,) of one frozen parameter into its weights."""
        flat = values.detach().reshape(-1)
        for weights in self._storage.weights[partition.id]:
            if not weights.chunk.trainable:
                for _, in_chunk, in_entry in overlaps([entry], weights.chunk):
                    with self.weights(weights, keep=True, write=True) as working:
                        working[in_chunk].copy_(flat[in_entry])

    # -------------------------------------------------------------------------------------------- places

    def _trainable_chunks(self, pid: int) -> list[Chunk]:
        return [home.chunk for home in self._storage.state[pid]]

    @contextmanager
    def stored(
        self, pid: int, number: int, *, read: bool = True, write: bool = False, zeros_from: int | None = None
    ) -> Iterator[ChunkState]:
        """State and weights of one trainable chunk, read from its homes and written back as asked.

        A plain master alone is read without its weights. `zeros_from`: see DiskHome.write, of a chunk not read before.
        """
        state = self._storage.state[pid][number]
        chunk = state.chunk
        weights = [home for home in self._storage.weights[pid] if home.chunk.trainable][number]
        state_tensors = self._storage.state_tensors[pid]
        num_bytes = record_bytes(state_tensors, chunk.numel)
        with ExitStack() as stack:
            ring = self._storage.step_ring
            opened = self._bytes(state, ring, num_bytes, read=read, write=write, zeros_from=zeros_from)
            place = stack.enter_context(opened)
            at_hand = None
            if write or is_split(state_tensors):
                at_hand = stack.enter_context(self.weights(weights, write=write, keep=read)).view(torch.uint8)
            yield ChunkState(state_tensors, place[:num_bytes], at_hand, numel=chunk.numel, precision=self._precision)

    @contextmanager
    def weights(self, home: Home, *, write: bool = False, keep: bool = False) -> Iterator[Tensor]:
        """Working weights of one chunk, read from their home unless all are written (`keep`: not all)."""
        dtype = self._precision.dtype
        num_bytes = home.chunk.numel * dtype.itemsize
        if home.tier is Tier.DEVICE:
            place = home.bytes[:num_bytes]
            on_host = place if self._device.is_host else place.cpu()
            yield typed(on_host, dtype)
            if write and not self._device.is_host:
                place.copy_(on_host)
            return
        read = keep or not write
        with self._bytes(home, self._storage.weight_ring, num_bytes, read=read, write=write) as place:
            yield typed(place[:num_bytes], dtype)

    @contextmanager
    def _bytes(
        self, home: Home, ring: Ring, num_bytes: int, *, read: bool, write: bool, zeros_from: int | None = None
    ) -> Iterator[Tensor]:
        if not isinstance(home, DiskHome):
            self._lanes.declare(reads=[home.bytes], writes=[home.bytes] if write else [])
            if home.tier is Tier.DEVICE and not self._device.is_host:
                on_host = home.bytes.cpu() if read else torch.empty(home.bytes.numel(), dtype=torch.uint8)
                yield on_host
                if write:
                    home.bytes.copy_(on_host)
                return
            yield home.bytes
            return
        lease = ring.acquire(released_by=self._lanes.resolved("filling"))
        written = None
        try:
            place = lease.bytes[:num_bytes]
            if read:
                # Without this the reader sees what the buffer held before.
                self._lanes.wait(home.read(lease.bytes, "reading"), Reason.READ)
                zeros_from = home.zeros_from
            self._lanes.declare(reads=[place], writes=[place] if write else [])
            yield place
            if write:
                written = home.write(lease.bytes, "filling", zeros_from=zeros_from)
        finally:
            lease.release(written)


def overlaps(entries: Sequence[Entry], chunk: Chunk) -> Iterator[tuple[Entry, slice, slice]]:
    """Entries that reach into a chunk: the run relative to the chunk, and relative to the entry."""
    for entry in entries:
        start, stop = max(entry.start, chunk.start), min(entry.stop, chunk.stop)
        if start < stop:
            yield entry, slice(start - chunk.start, stop - chunk.start), slice(start - entry.start, stop - entry.start)
