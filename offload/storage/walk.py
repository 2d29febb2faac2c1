"""One walk over stored values: chunks, their parameters and state tensors, with one chunk open at a time.

Owns: which elements of which parameter lie in which chunk, the way of a chunk from its homes into memory and back.
Does not: know values outside homes (values.py, checkpoint/) or the forms in which they are stored (chunk_state.py).
Threads: the training thread, with idle lanes.

Note [One chunk open]: the chunk that was asked for last stays open, with its staging buffers, until another one is
asked for. So the state tensors of a chunk that is stored on disk cost one read or one write of its record, and memory
is one staging buffer of state and one of weights, whatever the size of the model.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Self

import torch
from torch import Tensor

from offload.concurrency.lanes import Reason
from offload.memory.ring import Ring
from offload.model.partitions import Entry, Partition
from offload.runtime import Runtime
from offload.storage.allocation import Storage
from offload.storage.chunk_state import ChunkState
from offload.storage.homes import Chunk, Home, MemoryHome
from offload.storage.state_tensors import StateTensors, is_split, weights_tensor
from offload.units import Tier


class Access(Enum):
    """What an open chunk is for."""

    READ = "read"
    """State and, where they are a part of it, weights."""
    READ_WEIGHTS = "read weights"
    """Weights alone."""
    UPDATE = "update"
    """State and weights are read, and written when the chunk is closed."""
    OVERWRITE = "overwrite"
    """State and weights begin with zeros, and are written when the chunk is closed."""

    @property
    def reads(self) -> bool:
        """What the homes hold is wanted."""
        return self is not Access.OVERWRITE

    @property
    def writes(self) -> bool:
        """The homes hold something else afterwards."""
        return self in (Access.UPDATE, Access.OVERWRITE)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The elements of one parameter that lie in one chunk."""

    chunk: Chunk
    entry: Entry
    in_chunk: slice
    in_entry: slice


def parts_of(chunk: Chunk, entries: Sequence[Entry]) -> Iterator[Part]:
    """Of these parameters, those that reach into a chunk."""
    for entry in entries:
        start, stop = max(entry.start, chunk.start), min(entry.stop, chunk.stop)
        if start < stop:
            in_entry = slice(start - entry.start, stop - entry.start)
            yield Part(chunk, entry, slice(start - chunk.start, stop - chunk.start), in_entry)


class Walk:
    """Over the values of one session."""

    def __init__(self, runtime: Runtime, storage: Storage) -> None:
        self._runtime = runtime
        self.storage = storage

    def parts(self, partition: Partition, entry: Entry | None = None) -> Iterator[Part]:
        """Of all parameters of a partition, or of one of them: chunk by chunk, the trainable ones first."""
        for home in self.storage.weights[partition.id]:
            if entry is None:
                yield from parts_of(home.chunk, partition.flat_parameters[0 if home.chunk.trainable else 1].entries)
            elif home.chunk.trainable == (entry.index >= 0):
                yield from parts_of(home.chunk, [entry])

    def state_tensors(self, partition: Partition, entry: Entry) -> StateTensors:
        """All that is stored of a parameter; its weights where they are not made from a plain master."""
        weights = weights_tensor(self._runtime.precision.dtype)
        if entry.index < 0:
            return (weights,)
        state_tensors = self.storage.state_tensors[partition.id]
        return (weights, *state_tensors) if is_split(state_tensors) else state_tensors

    def open(self, access: Access) -> "OpenChunk":
        """Nothing yet: see OpenChunk.at."""
        return OpenChunk(self._runtime, self.storage, access)

    @contextmanager
    def gradient(self, home: Home) -> Iterator[Tensor]:
        """The bytes of one chunk's offloaded gradient."""
        num_bytes = home.chunk.numel * self._runtime.gradient_precision.dtype.itemsize
        with _opened(self._runtime, home, self.storage.offload_ring, Access.READ) as place:
            yield place.memory[:num_bytes]


class OpenChunk:
    """See Note [One chunk open]. A context manager: an exception inside it leaves the homes of the open chunk alone."""

    def __init__(self, runtime: Runtime, storage: Storage, access: Access) -> None:
        self._runtime = runtime
        self._storage = storage
        self._access = access
        self._stack = ExitStack()
        self._chunk: Chunk | None = None
        self._state: ChunkState | None = None

    def at(self, chunk: Chunk) -> ChunkState:
        """Its state and weights: valid until another chunk is asked for, or the end."""
        if chunk is self._chunk and self._state is not None:
            return self._state
        self.close()
        self._chunk, self._state = chunk, self._stack.enter_context(self._opened(chunk))
        return self._state

    def close(self) -> None:
        """Write back, where that was asked for, and release the staging buffers. Idempotent."""
        self._chunk = self._state = None
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._chunk = self._state = None
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    @contextmanager
    def _opened(self, chunk: Chunk) -> Iterator[ChunkState]:
        state_tensors: StateTensors = ()
        record = _Place(torch.empty(0, dtype=torch.uint8))
        weights: Tensor | None = None
        has_state = chunk.trainable and self._access is not Access.READ_WEIGHTS
        with ExitStack() as stack:
            if has_state:
                state_tensors = self._storage.state_tensors[chunk.partition_id]
                home, ring = self._storage.state_of(chunk), self._storage.step_ring
                record = stack.enter_context(_opened(self._runtime, home, ring, self._access))
            if not has_state or self._access.writes or is_split(state_tensors):
                home, ring = self._storage.weights_of(chunk), self._storage.weight_ring
                weights = stack.enter_context(_opened(self._runtime, home, ring, self._access)).memory
            state = ChunkState(
                state_tensors, record.memory, weights, numel=chunk.numel, precision=self._runtime.precision
            )
            if self._access is Access.OVERWRITE:
                state.clear()  # between parameters there is padding, and every staging buffer has held something else
            yield state
            if self._access is Access.OVERWRITE:
                record.zeros_from = state.zeros_from


@dataclass(slots=True, eq=False)
class _Place:
    """Memory that holds what a home holds."""

    memory: Tensor
    zeros_from: int | None = None
    """As in DiskHome.write."""


@contextmanager
def _opened(runtime: Runtime, home: Home, ring: Ring, access: Access) -> Iterator[_Place]:
    """The bytes of a home in memory of the host, read and written back as asked."""
    if isinstance(home, MemoryHome):
        yield from _in_memory(runtime, home, access)
        return
    lanes = runtime.lanes
    lease = ring.acquire(released_by=lanes.resolved("chunk closed"))
    written = None
    try:
        place = _Place(lease.bytes[: home.num_bytes])
        if access.reads:
            # Without this the reader sees what the staging buffer held before.
            lanes.wait(home.read(place.memory, "reading"), Reason.READ)
            place.zeros_from = home.zeros_from
        lanes.declare(reads=[place.memory], writes=[place.memory] if access.writes else [])
        yield place
        if access.writes:
            written = home.write(place.memory, "filling", zeros_from=place.zeros_from)
    finally:
        lease.release(written)


def _in_memory(runtime: Runtime, home: MemoryHome, access: Access) -> Iterator[_Place]:
    runtime.lanes.declare(reads=[home.bytes], writes=[home.bytes] if access.writes else [])
    if home.tier is Tier.HOST or runtime.device.is_host:
        yield _Place(home.bytes)
        return
    on_host = home.bytes.cpu() if access.reads else torch.empty(home.bytes.numel(), dtype=torch.uint8)
    yield _Place(on_host)
    if access.writes:
        home.bytes.copy_(on_host)
