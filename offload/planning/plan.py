"""What a plan says: the home of every chunk and the size of every ring.

Owns: the words of a plan, its form for JSON and its table.
Does not: choose (planner.py) or allocate (storage/allocation.py).
Threads: immutable.
"""

from dataclasses import dataclass
from typing import Final

from offload.units import Tier, format_bytes

KINDS: Final = ("weights", "gradients", "state")


@dataclass(frozen=True, slots=True)
class PartitionHomes:
    """Homes of one partition, by chunk."""

    weights_on_device: bool
    trainable_weights: tuple[Tier, ...]
    frozen_weights: tuple[Tier, ...]
    gradients: tuple[Tier, ...]
    state: tuple[Tier, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Homes, ring sizes and totals. A session allocates exactly this."""

    chunk_numel: int
    homes: tuple[PartitionHomes, ...]
    slot_ring_bytes: int
    spare_slot_bytes: int
    """Room in the memory of slots, in addition to the ring, that they need to find their place."""
    gradient_slots: int
    gradient_slot_bytes: int
    step_buffers: int
    step_buffer_bytes: int
    weight_buffers: int
    weight_buffer_bytes: int
    offload_buffers: int
    offload_buffer_bytes: int
    exchange_bytes: int
    """Where the parts of a gradient that come from other ranks arrive."""
    device_workspace_bytes: int
    """What gradient offload and stepping on an accelerator need in addition to the homes there."""
    build_bytes: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    bytes_by_kind_and_tier: dict[str, dict[Tier, int]]

    def table(self) -> str:
        """Homes by kind and tier, and the rings, as text."""
        lines = [f"{'home of':<12}{'device':>14}{'host':>14}{'disk':>14}"]
        for kind in KINDS:
            by_tier = self.bytes_by_kind_and_tier[kind]
            lines.append(f"{kind:<12}" + "".join(f"{format_bytes(by_tier[tier]):>14}" for tier in Tier))
        rings = {
            "weight slots": (1, self.slot_ring_bytes),
            "spare slot": (1, self.spare_slot_bytes),
            "gradient slots": (self.gradient_slots, self.gradient_slot_bytes),
            "step staging": (self.step_buffers, self.step_buffer_bytes),
            "weight staging": (self.weight_buffers, self.weight_buffer_bytes),
            "gradient staging": (self.offload_buffers, self.offload_buffer_bytes),
            "parts of other ranks": (1, self.exchange_bytes),
            "device workspace": (1, self.device_workspace_bytes),
        }
        lines += [f"{name}: {count} x {format_bytes(size)}" for name, (count, size) in rings.items() if count * size]
        lines.append(f"chunks of {self.chunk_numel:,} elements")
        return "\n".join(lines)
