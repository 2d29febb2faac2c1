"""A model's values into the homes and out of them: at the start, at the end, and whenever somebody reads weights.

Owns: the way from a model's parameters to weights, masters and moments in their homes, and back.
Does not: train, or open homes (walk.py). Every function needs idle lanes.
Threads: the training thread.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from offload.memory.region import typed
from offload.model.partitions import Entry, Partition
from offload.runtime import Runtime
from offload.storage.state_tensors import MASTER, WEIGHTS
from offload.storage.walk import Access, Part, Walk, parts_of


class HomeValues:
    """Reads and writes the values of parameters, wherever they are stored."""

    def __init__(self, runtime: Runtime, walk: Walk) -> None:
        self._ranks = runtime.ranks
        self._precision = runtime.precision
        self._gradient_precision = runtime.gradient_precision
        self._walk = walk

    # ----------------------------------------------------------------------------------------------- in

    def fill(
        self, partition: Partition, state_of: Callable[[Entry], Mapping[str, Any]], moments: Sequence[str]
    ) -> None:
        """Values of the partition's parameters, and moments the optimizer already has, into their homes.

        With ranks: values of the first rank, and on each rank the shards of its own.
        """
        for entry in partition.entries():
            self._ranks.broadcast(entry.parameter.data)
        with self._walk.open(Access.OVERWRITE) as opened:
            for home in self._walk.storage.weights[partition.id]:
                chunk = opened.at(home.chunk)  # one that holds padding alone is written, too
                for part in parts_of(home.chunk, partition.flat_parameters[0 if home.chunk.trainable else 1].entries):
                    state = state_of(part.entry) if home.chunk.trainable else {}
                    found = {name: state[name] for name in moments if isinstance(state.get(name), Tensor)}
                    for name, values in ({MASTER.name: part.entry.parameter} | found).items():
                        chunk.put(name, part.in_chunk, values.detach().reshape(-1)[part.in_entry])

    def write(self, partition: Partition, entry: Entry, values: Tensor) -> None:
        """New values (of any shape) of one parameter: into master and weights, or into the weights of a frozen one."""
        values = values.detach().reshape(-1)
        with self._walk.open(Access.UPDATE) as opened:
            for part in self._walk.parts(partition, entry):
                opened.at(part.chunk).put(MASTER.name, part.in_chunk, values[part.in_entry])

    # ---------------------------------------------------------------------------------------------- out

    def read_into(self, partition: Partition, entry: Entry, target: Tensor, name: str = MASTER.name) -> None:
        """One parameter's values into `target` (numel,): master or moment, or weights where it is frozen.

        With ranks all must call it: each gets the whole.
        """
        with self._united(target), self._walk.open(Access.READ) as opened:
            for part in self._walk.parts(partition, entry):
                target[part.in_entry].copy_(opened.at(part.chunk).get(name, part.in_chunk))

    def read_gradient(self, partition: Partition, entry: Entry, target: Tensor) -> None:
        """One parameter's offloaded gradient into `target` (numel,). With ranks all must call it."""
        with self._united(target):
            for part in self._walk.parts(partition, entry):
                with self._walk.gradient(self._walk.storage.gradients[partition.id][part.chunk.index]) as gradient:
                    values = typed(gradient, self._gradient_precision.dtype)
                    target[part.in_entry].copy_(values[part.in_chunk])

    def weights_of(self, partition: Partition, entry: Entry) -> Iterator[Tensor]:
        """One parameter's working weights, run by run, in order. A run is valid until the next is asked for.

        With ranks all must call it, and there is one run.
        """
        if not self._ranks.is_sharded:
            yield from (values for values, _ in self._weights_here(partition, entry))
            return
        whole = torch.empty(entry.numel, dtype=self._precision.dtype)
        with self._united(whole):
            for values, part in self._weights_here(partition, entry):
                whole[part.in_entry].copy_(values)
        yield whole

    def _weights_here(self, partition: Partition, entry: Entry) -> Iterator[tuple[Tensor, Part]]:
        with self._walk.open(Access.READ_WEIGHTS) as opened:
            for part in self._walk.parts(partition, entry):
                yield opened.at(part.chunk).entries(WEIGHTS, part.in_chunk.start, part.in_chunk.stop), part

    @contextmanager
    def _united(self, target: Tensor) -> Iterator[None]:
        """What the block reads into `target` of this rank's shards is put together with that of the others."""
        if self._ranks.is_sharded:
            target.view(torch.uint8).zero_()
        yield
        self._ranks.fill_in(target)
