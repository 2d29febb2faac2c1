"""What is resident on the device: rings first, then weights by whole partition, then state with its gradient.

Owns: that choice within a device budget, and the bytes of everything on the device.
Does not: choose between host and disk (planner.py) or count the bytes of one chunk (cost.py).
Threads: pure.

Note [Slack]: what is resident on the device is chosen by slack per byte.
Which kind: a byte of weights there saves two on the link a step (fetched by forward and by backward). A byte of state
with its gradient saves a quarter (16 an element, for its gradient down and its weights up, 2 and 2), and a stepping
host 28 bytes of its memory. So weights come first, and state only where weights are: elsewhere they would go up anyway.
Which partitions: the slack of a partition is the time from its last gradient to its next use. Of n equal ones, number i
in forward order has i / n of a backward and as much of the next forward, and the first has none: its gradient comes
last, and what forward needs first has not begun to be stepped. All take the same bytes, so the first in forward order
stay, and one border divides them from the host's: a patchwork would have the forward wait at every seam.
In numbers (computed, not measured: 8e9 parameters, 16,384 tokens at 450 TFLOP/s, so forward takes 73 ps a parameter; a
host that steps 3.5e9 parameters a second, 286 ps each; both run at once): with all state on the host the next forward
ends 2.29 s after the norm. With that of a quarter of the parameters on the device 1.72 s where those are the first,
1.86 s where they are the last, whose forward begins only when the host is through. The head is worth more still: a
first partition of 1e8 parameters on the host keeps forward waiting for 33 ms (step and link), on the device for 2 ms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from offload.planning.cost import Encoding, PartitionSizes, chunk_runs, slot_ring_needs
from offload.planning.rings import Rings
from offload.units import round_up

SLOT_ALIGN_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """What is resident: so many first partitions' weights, and of each so many first chunks of state."""

    num_partitions: int
    slot_ring_bytes: int
    spare_slot_bytes: int
    num_chunks: list[int]
    workspace_bytes: int


class DeviceSide:
    """One set of arguments of `plan`, as far as the device goes; asked for different rings."""

    def __init__(
        self,
        partitions: Sequence[PartitionSizes],
        encoding: Encoding,
        budget: int | None,
        *,
        world_size: int,
        is_sharded: bool,
        device_state: bool,
        spare_slot: bool,
    ) -> None:
        self._partitions = partitions
        self._encoding = encoding
        self._budget = budget
        self._is_sharded = is_sharded
        self._device_state = device_state
        self._spare_slot = spare_slot
        self.slot_bytes = [
            (p.trainable_numel + p.frozen_numel) * world_size * encoding.weight_itemsize for p in partitions
        ]
        """Of each partition, whole."""
        self.gradient_slot_bytes = max(
            (round_up(p.trainable_numel * world_size * encoding.wire_itemsize, SLOT_ALIGN_BYTES) for p in partitions),
            default=0,
        )
        self.exchange_bytes = self.gradient_slot_bytes if self._is_sharded else 0
        """Where the parts of other ranks arrive."""
        self._ring_needs = slot_ring_needs(self.slot_bytes, [p.held_with for p in partitions])

    def share(self, rings: Rings, budget: int | None) -> DeviceShare | None:
        """Rings, then weights by whole partition, then state with its gradient; None: the rings do not fit."""
        limit = float("inf") if budget is None else budget
        limit -= self.gradient_bytes(rings)
        first, taken, in_all = 0, 0, len(self._partitions)
        home_bytes = [self.home_bytes(rings, index) for index in range(in_all)]
        if sum(home_bytes) + sum(self.slot_memory(in_all, rings.slots)) <= limit:
            first, taken = in_all, sum(home_bytes)
        elif sum(self.slot_memory(0, rings.slots)) > limit:
            return None
        else:
            while first < in_all and taken + home_bytes[first] + sum(self.slot_memory(first + 1, rings.slots)) <= limit:
                taken += home_bytes[first]
                first += 1
        ring_bytes, spare_bytes = self.slot_memory(first, rings.slots)
        workspace_bytes = self._workspace_bytes(rings)
        num_chunks = self._device_chunks(first, limit - taken - ring_bytes - spare_bytes - workspace_bytes, rings)
        return DeviceShare(first, ring_bytes, spare_bytes, num_chunks, workspace_bytes if any(num_chunks) else 0)

    def slot_memory(self, first: int, slots: int) -> tuple[int, int]:
        """Bytes of the ring for partitions from `first` on, and of the slot that its memory needs in addition.

        The ring: the most held at once, and further slots of the largest. Sharded partitions all pass it: what
        is resident is a shard.
        """
        at_once, largest, in_all = self._ring_needs[0 if self._is_sharded else first]
        return min(at_once + (slots - 1) * largest, in_all), largest if self._spare_slot else 0

    def _device_chunks(self, first: int, left: float, rings: Rings) -> list[int]:
        """How many first chunks of each partition have resident state and gradients: Note [Slack]."""
        num_chunks = [0] * len(self._partitions)
        for index, p in enumerate(self._partitions[:first] if self._device_state else ()):
            for _, count, numel in chunk_runs(p.trainable_numel, rings.chunk_numel):
                needed = self._encoding.record_bytes("state", numel, resident=True)
                needed += self._encoding.record_bytes("gradients", numel)
                fitting = count if count * needed <= left else max(0, int(left // needed))
                num_chunks[index] += fitting
                left -= fitting * needed
                if fitting < count:
                    return num_chunks  # one border between device and host, not a patchwork
        return num_chunks

    def all_resident(self, rings: Rings) -> bool:
        """Whether weights, gradients and state all fit the device with these gradient slots."""
        if not self._device_state or self._budget is None:
            return self._device_state
        home_bytes = sum(self.home_bytes(rings, index) for index in range(len(self._partitions)))
        if self._is_sharded:
            home_bytes += sum(self.slot_memory(0, rings.slots))
        home_bytes += self.training_bytes(rings) + self._workspace_bytes(rings)
        return self.gradient_bytes(rings) + home_bytes <= self._budget

    def home_bytes(self, rings: Rings, index: int) -> int:
        """What the resident weights of a partition take: their slot, or their shards."""
        if not self._is_sharded:
            return self.slot_bytes[index]
        partition = self._partitions[index]
        return sum(
            count * self._encoding.record_bytes("weights", numel)
            for flat_numel in (partition.trainable_numel, partition.frozen_numel)
            for _, count, numel in chunk_runs(flat_numel, rings.chunk_numel)
        )

    def gradient_bytes(self, rings: Rings) -> int:
        """Gradient slots, and where the parts of other ranks arrive."""
        return rings.gradient_slots * self.gradient_slot_bytes + self.exchange_bytes

    def _workspace_bytes(self, rings: Rings) -> int:
        """For one chunk at a time."""
        largest = max((p.trainable_numel for p in self._partitions), default=0)
        return min(rings.chunk_numel, largest) * self._encoding.device_workspace_itemsize

    def training_bytes(self, rings: Rings) -> int:
        """Gradients and state of everything, in records, with all weights resident."""
        return sum(self.whole(kind, rings, len(self._partitions)) for kind in ("gradients", "state"))

    def whole(self, kind: str, rings: Rings, num_resident: int) -> int:
        """Gradients or state of everything, in records, with the weights of so many first partitions resident."""
        return sum(
            count * self._encoding.record_bytes(kind, numel, resident=index < num_resident)
            for index, p in enumerate(self._partitions)
            for _, count, numel in chunk_runs(p.trainable_numel, rings.chunk_numel)
        )
