"""What things cost in bytes: partitions, their encoding, and the padding of chunks.

Owns: the inputs of the plan and the byte rules that it shares with whoever allocates.
Does not: decide (plan.py).
Threads: pure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from offload.units import DISK_ALIGN_BYTES, round_up


@dataclass(frozen=True, slots=True)
class PartitionSizes:
    """What the plan knows of a partition. Element counts are of this rank's shards of padded flat parameters.

    `id` is its place in forward order. `held_with`: partitions acquired at the same time, as their modules enclose it.
    """

    id: int
    name: str
    trainable_numel: int
    frozen_numel: int
    held_with: tuple[int, ...] = ()
    build_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Encoding:
    """Bytes an element: working weights, gradients on the link and in their homes, state tensors."""

    weight_itemsize: int
    wire_itemsize: int
    gradient_itemsize: int
    state_tensors: tuple[tuple[str, float], ...]
    """Name and bytes an element; a fraction for a state tensor with one entry for many elements, as of scales."""
    resident_state_tensors: tuple[tuple[str, float], ...] | None = None
    """The same for partitions whose weights are resident on the device, where they cannot be part of the state."""
    whole_partitions: bool = False
    """Parameters are stepped whole, so a chunk is a whole partition."""
    device_workspace_itemsize: int = 0
    """Of gradient offload and stepping there, for each element of the largest chunk, where state is resident."""

    def record_bytes(self, kind: str, numel: int, *, resident: bool = False) -> int:
        """Bytes of one chunk of weights, gradients or state on host or disk; each array padded for direct I/O."""
        state_tensors = (
            self.resident_state_tensors if resident and self.resident_state_tensors is not None else self.state_tensors
        )
        sizes: Sequence[float] = [size for _, size in state_tensors]
        if kind != "state":
            sizes = [self.weight_itemsize if kind == "weights" else self.gradient_itemsize]
        return sum(round_up(math.ceil(numel * size), DISK_ALIGN_BYTES) for size in sizes)


@dataclass(frozen=True, slots=True)
class Budgets:
    """Byte limits; None: unlimited. `disk_bytes` 0: no disk."""

    device_bytes: int | None
    host_bytes: int | None
    disk_bytes: int = 0


def chunk_numels(numel: int, chunk_numel: int) -> list[int]:
    """Elements of each chunk of a flat parameter: all of the same size but the last."""
    whole, rest = divmod(numel, chunk_numel)
    return [chunk_numel] * whole + ([rest] if rest else [])


def chunk_runs(numel: int, chunk_numel: int, first: int = 0) -> list[tuple[int, int, int]]:
    """Chunks of a flat parameter from number `first` on, as runs (number of the first, how many, elements of each).

    At most two: a plan of a large model decides over runs, not over its million chunks.
    """
    whole, rest = divmod(numel, chunk_numel)
    runs = [(first, whole - first, chunk_numel)] if first < whole else []
    return runs + ([(whole, 1, rest)] if rest and first <= whole else [])


def slot_ring_needs(slot_bytes: Sequence[int], held_with: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """For each number n of first partitions whose weights are resident: what the others need of the slot ring.

    (most bytes held at once, bytes of the largest partition, bytes of all) of the partitions from n on.
    """
    num = len(slot_bytes)
    nested = [index for index in range(num) if held_with[index]]
    needs = [(0, 0, 0)]
    for first in range(num - 1, -1, -1):
        _, largest, in_all = needs[-1]
        largest, in_all = max(largest, slot_bytes[first]), in_all + slot_bytes[first]
        at_once = max(
            (
                slot_bytes[index] + sum(slot_bytes[other] for other in held_with[index] if other >= first)
                for index in nested
                if index >= first
            ),
            default=0,
        )
        needs.append((max(at_once, largest), largest, in_all))
    return needs[::-1]
