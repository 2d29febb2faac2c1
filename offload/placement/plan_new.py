"""The plan: homes of every piece and sizes of every ring, from sizes and budgets.

Owns: the decision, and the error when a budget cannot be kept.
Does not: allocate or look at the machine; count the bytes of one piece (cost.py).
Threads: pure: the same arguments, the same plan.

Order of decisions. Device: rings at their wanted size where the budget allows, then weights at home by whole partition
(a slot is one storage) in forward order, then state with its gradient, piece by piece. Host: rings, then weights,
gradients and state by what a byte kept there saves on the disk: 3, 2 and 2 bytes a step. Disk: the rest.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from offload.errors import BudgetError
from offload.placement.cost import Budgets, Encoding, PartitionSizes, piece_numels, slot_ring_needs
from offload.placement.rings import DEVICE_RINGS, RING_SHARE, SMALLEST, WANTED, Rings, Row, Slabs, attempts
from offload.units import BLOCK_NUMEL, DISK_ALIGN_BYTES, Tier, format_bytes, round_up

__all__ = ["KINDS", "Budgets", "Encoding", "PartitionHomes", "PartitionSizes", "Plan", "plan"]

KINDS: Final = ("weights", "gradients", "state")
SLOT_ALIGN_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class PartitionHomes:
    """Homes of one partition, by piece."""

    weights_on_device: bool
    trainable_weights: tuple[Tier, ...]
    frozen_weights: tuple[Tier, ...]
    gradients: tuple[Tier, ...]
    state: tuple[Tier, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Homes, ring sizes and totals. A session allocates exactly this."""

    piece_numel: int
    homes: tuple[PartitionHomes, ...]
    slot_ring_bytes: int
    gradient_slots: int
    gradient_slot_bytes: int
    step_slabs: int
    step_slab_bytes: int
    weight_slabs: int
    weight_slab_bytes: int
    land_slabs: int
    land_slab_bytes: int
    build_bytes: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    bytes_by_kind_and_tier: dict[str, dict[Tier, int]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def table(self) -> str:
        """Homes by kind and tier, and the rings, as text."""
        lines = [f"{'home of':<12}{'device':>14}{'host':>14}{'disk':>14}"]
        for kind in KINDS:
            by_tier = self.bytes_by_kind_and_tier[kind]
            lines.append(f"{kind:<12}" + "".join(f"{format_bytes(by_tier[tier]):>14}" for tier in Tier))
        rings = {
            "weight slots": (1, self.slot_ring_bytes),
            "gradient slots": (self.gradient_slots, self.gradient_slot_bytes),
            "step slabs": (self.step_slabs, self.step_slab_bytes),
            "weight slabs": (self.weight_slabs, self.weight_slab_bytes),
            "landing slabs": (self.land_slabs, self.land_slab_bytes),
        }
        lines += [f"{name}: {count} x {format_bytes(size)}" for name, (count, size) in rings.items() if count * size]
        lines.append(f"pieces of {self.piece_numel:,} elements")
        return "\n".join(lines)


_Homes = dict[str, list[list[list[Tier | None]]]]
"""By kind, partition, flat and piece; None: not yet decided."""


def plan(
    partitions: Sequence[PartitionSizes],
    encoding: Encoding,
    budgets: Budgets,
    *,
    world_size: int = 1,
    device_state: bool,
    minimum_rings: bool = False,
) -> Plan:
    """Homes and rings for these partitions within these budgets; BudgetError names the smallest that would do.

    `device_state`: state may be at home on the device (the step kernel can reach it).
    """
    planner = _Planner(partitions, encoding, budgets, world_size, device_state)
    if not planner.hopeless():
        for rings in attempts(minimum_rings, planner.all_on_device):
            made = planner.attempt(rings)
            if made is not None:
                return made
    raise planner.too_small(minimum_rings)


class _Planner:
    """One set of arguments; attempts with different rings."""

    def __init__(
        self,
        partitions: Sequence[PartitionSizes],
        encoding: Encoding,
        budgets: Budgets,
        world_size: int,
        device_state: bool,
    ) -> None:
        self._partitions = partitions
        self._encoding = encoding
        self._budgets = budgets
        self._world_size = world_size
        self._device_state = device_state
        self._slot_bytes = [
            (p.trainable_numel + p.frozen_numel) * world_size * encoding.weight_itemsize for p in partitions
        ]
        self._gradient_slot_bytes = max(
            (round_up(p.trainable_numel * world_size * encoding.wire_itemsize, SLOT_ALIGN_BYTES) for p in partitions),
            default=0,
        )
        self._build_bytes = max((p.build_bytes for p in partitions), default=0)
        self._ring_needs = slot_ring_needs(self._slot_bytes, [p.held_with for p in partitions])

    # ------------------------------------------------------------------------------------------- quick answers

    def all_on_device(self, rings: Rings) -> bool:
        """Whether weights, gradients and state all fit the device, beside these gradient slots."""
        budget = self._budgets.device_bytes
        if not self._device_state or budget is None:
            return self._device_state
        gradient_bytes = rings.gradient_slots * self._gradient_slot_bytes
        return gradient_bytes + sum(self._slot_bytes) + self._training_bytes(rings) <= budget

    def hopeless(self) -> bool:
        """Whether even the bare bytes exceed all budgets together: spares large models dozens of attempts."""
        budgets = (self._budgets.device_bytes, self._budgets.host_bytes, self._budgets.disk_bytes)
        planes_bytes = sum(size for _, size in self._encoding.planes)
        bare = sum(p.trainable_numel for p in self._partitions) * (self._encoding.gradient_itemsize + planes_bytes)
        bare += sum(self._slot_bytes) // self._world_size
        return None not in budgets and bare > sum(budget or 0 for budget in budgets)

    def _training_bytes(self, rings: Rings) -> int:
        """Gradients and state of everything, in records."""
        return sum(
            self._encoding.record_bytes("gradients", numel) + self._encoding.record_bytes("state", numel)
            for p in self._partitions
            for numel in piece_numels(p.trainable_numel, rings.piece_numel)
        )

    # --------------------------------------------------------------------------------------------- one attempt

    def attempt(self, rings: Rings) -> Plan | None:
        """The plan with these rings, or None where they do not fit."""
        on_device = self._device(rings, self._budgets.device_bytes)
        if on_device is None:
            return None
        first, slot_ring_bytes, left = on_device
        homes = self._initial(first, left, rings)
        placed = self._host(homes, rings, self._budgets.host_bytes)
        if placed is None:
            return None
        made = self._finish(homes, first, slot_ring_bytes, rings, placed)
        return made if made.disk_bytes <= self._budgets.disk_bytes else None

    def _device(self, rings: Rings, budget: int | None) -> tuple[int, int, float] | None:
        """How many partitions' weights are at home on the device, bytes of the slot ring, and the bytes left."""
        limit = float("inf") if budget is None else float(budget)
        limit -= rings.gradient_slots * self._gradient_slot_bytes
        if sum(self._slot_bytes) <= limit:
            return len(self._slot_bytes), 0, limit - sum(self._slot_bytes)
        if self._slot_ring(0, rings.slots) > limit:
            return None
        first, taken = 0, 0
        while taken + self._slot_bytes[first] + self._slot_ring(first + 1, rings.slots) <= limit:
            taken += self._slot_bytes[first]
            first += 1
        ring = self._slot_ring(first, rings.slots)
        return first, ring, limit - taken - ring

    def _slot_ring(self, first: int, slots: int) -> int:
        """Bytes of the ring for partitions from `first` on: the most held at once, and further slots of the largest."""
        at_once, largest, in_all = self._ring_needs[first]
        return min(at_once + (slots - 1) * largest, in_all)

    def _initial(self, first: int, left: float, rings: Rings) -> _Homes:
        """Homes with those on the device decided."""
        homes: _Homes = {kind: [] for kind in KINDS}
        for index, p in enumerate(self._partitions):
            at = Tier.DEVICE if index < first else None
            numels = piece_numels(p.trainable_numel, rings.piece_numel)
            homes["weights"].append([[at] * len(numels), [at] * len(piece_numels(p.frozen_numel, rings.piece_numel))])
            training: list[Tier | None] = [None] * len(numels)
            for piece, numel in enumerate(numels if at and self._device_state else ()):
                needed = self._encoding.record_bytes("state", numel) + self._encoding.record_bytes("gradients", numel)
                if needed > left:
                    left = 0.0  # one border between device and host, not a patchwork
                    break
                left -= needed
                training[piece] = Tier.DEVICE
            homes["state"].append([list(training)])
            homes["gradients"].append([training])
        return homes

    def _host(self, homes: _Homes, rings: Rings, budget: int | None) -> Slabs | None:
        """Decide what is still open; returns the host rings, or None where they do not fit.

        As much stays on the host as fits beside the slabs that the rest then needs: the last of what is worth least
        goes to disk first, and slabs grow with the first piece of a kind that does.
        """
        rows, slabs = self._open(homes, rings), self._slabs(homes, rings)
        limit = float("inf") if budget is None else float(budget - self._build_bytes)
        on_host, num_on_host = sum(row.num_bytes for row in rows), len(rows)
        while on_host + slabs.num_bytes > limit and num_on_host:
            num_on_host -= 1
            on_host -= rows[num_on_host].num_bytes
            slabs.to_disk(rows[num_on_host])
        if on_host + slabs.num_bytes > limit:
            return None
        may_shrink = rings.step == WANTED["step"] and rings.piece_numel > BLOCK_NUMEL
        if may_shrink and num_on_host < len(rows) and slabs.num_bytes * RING_SHARE > limit:
            return None
        for index, row in enumerate(rows):
            homes[row.kind][row.partition][row.flat][row.piece] = Tier.HOST if index < num_on_host else Tier.DISK
        return slabs

    def _open(self, homes: _Homes, rings: Rings) -> list[Row]:
        """Pieces without a home, in the order in which the host takes them."""
        rows = []
        for kind in KINDS:
            for index, p in enumerate(self._partitions):
                for flat, tiers in enumerate(homes[kind][index]):
                    numels = piece_numels((p.trainable_numel, p.frozen_numel)[flat], rings.piece_numel)
                    for piece, (tier, numel) in enumerate(zip(tiers, numels, strict=True)):
                        if tier is None:
                            rows.append(Row(kind, index, flat, piece, self._encoding.record_bytes(kind, numel)))
        return rows

    def _slabs(self, homes: _Homes, rings: Rings) -> Slabs:
        """What the host rings need while nothing is on disk: slabs to land in, and weights on their way to a device."""
        slabs = Slabs(rings)
        for index, p in enumerate(self._partitions):
            for piece, numel in enumerate(piece_numels(p.trainable_numel, rings.piece_numel)):
                if homes["gradients"][index][0][piece] is not Tier.DEVICE:
                    wire_bytes = round_up(numel * self._encoding.wire_itemsize, DISK_ALIGN_BYTES)
                    slabs.add("land", (index, piece), wire_bytes)
                    if homes["weights"][index][0][piece] is Tier.DEVICE:
                        slabs.add("step", (index, piece), self._encoding.record_bytes("weights", numel))
        return slabs

    # ------------------------------------------------------------------------------------------------- totals

    def _finish(self, homes: _Homes, first: int, slot_ring_bytes: int, rings: Rings, slabs: Slabs) -> Plan:
        by_kind: dict[str, dict[Tier, int]] = {kind: dict.fromkeys(Tier, 0) for kind in KINDS}
        for kind in KINDS:
            for p, flats in zip(self._partitions, homes[kind], strict=True):
                for numel_of, tiers in zip((p.trainable_numel, p.frozen_numel), flats, strict=False):
                    for tier, numel in zip(tiers, piece_numels(numel_of, rings.piece_numel), strict=True):
                        if tier is not None and (kind != "weights" or tier is not Tier.DEVICE):
                            by_kind[kind][tier] += self._encoding.record_bytes(kind, numel)
        by_kind["weights"][Tier.DEVICE] = sum(self._slot_bytes[:first])
        gradient_bytes = rings.gradient_slots * self._gradient_slot_bytes
        counts, sizes = slabs.counts(), slabs.sizes
        return Plan(
            piece_numel=rings.piece_numel,
            homes=tuple(
                PartitionHomes(
                    weights_on_device=index < first,
                    trainable_weights=_decided(homes["weights"][index][0]),
                    frozen_weights=_decided(homes["weights"][index][1]),
                    gradients=_decided(homes["gradients"][index][0]),
                    state=_decided(homes["state"][index][0]),
                )
                for index in range(len(self._partitions))
            ),
            slot_ring_bytes=slot_ring_bytes,
            gradient_slots=rings.gradient_slots if self._gradient_slot_bytes else 0,
            gradient_slot_bytes=self._gradient_slot_bytes,
            step_slabs=counts["step"],
            step_slab_bytes=sizes["step"],
            weight_slabs=counts["weight"],
            weight_slab_bytes=sizes["weight"],
            land_slabs=counts["land"],
            land_slab_bytes=sizes["land"],
            build_bytes=self._build_bytes,
            device_bytes=slot_ring_bytes + gradient_bytes + sum(by_kind[kind][Tier.DEVICE] for kind in KINDS),
            host_bytes=slabs.num_bytes + self._build_bytes + sum(by_kind[kind][Tier.HOST] for kind in KINDS),
            disk_bytes=sum(by_kind[kind][Tier.DISK] for kind in KINDS),
            bytes_by_kind_and_tier=by_kind,
        )

    # -------------------------------------------------------------------------------------------------- error

    def too_small(self, minimum_rings: bool) -> BudgetError:
        """Names the budgets that would do."""
        given, disk = self._budgets.device_bytes, self._budgets.disk_bytes
        device_bytes = self._gradient_slot_bytes + self._slot_ring(0, 1)
        beside = given if given is None or given >= device_bytes else device_bytes
        levels = [(1, 1)] if minimum_rings else DEVICE_RINGS
        tried = [replace(SMALLEST, slots=slots, gradient_slots=gradients) for slots, gradients in levels]
        smallest = [self._smallest_host_and_disk(rings, beside) for rings in tried]
        hosts, disks = [host for host, _ in smallest if host is not None], [disk for _, disk in smallest]
        parts = [f"the smallest device_memory is {device_bytes} bytes ({format_bytes(device_bytes)})"]
        if hosts:
            at = "it" if beside != given else f"the {'unlimited one' if given is None else format_bytes(given)} given"
            parts.append(f"the smallest host_memory beside {at} is {min(hosts)} bytes ({format_bytes(min(hosts))})")
        needed = min((num_bytes for num_bytes in disks if num_bytes is not None), default=0)
        if disk and needed > disk:
            parts.append(f"the smallest disk_space beside both is {needed} bytes ({format_bytes(needed)})")
        found = ", ".join(
            f"{name}={'unlimited' if value is None else format_bytes(value)}"
            for name, value in (
                ("device_memory", given), ("host_memory", self._budgets.host_bytes), ("disk", disk)
            )
        )  # fmt: skip
        whole = format_bytes(sum(self._slot_bytes) + self._training_bytes(SMALLEST))
        return BudgetError(
            f"the model does not fit the budgets ({found}): {'; '.join(parts)}. Its weights, gradients and state take "
            f"{whole} in all: raise a budget" + ("." if disk else ", or give disk= a folder.")
        )

    def _smallest_host_and_disk(self, rings: Rings, device_budget: int | None) -> tuple[int | None, int | None]:
        """With these rings: the smallest host budget beside the disk given, and disk space beside the host given."""
        on_device = self._device(rings, device_budget)
        if on_device is None:
            return None, None
        homes = self._initial(on_device[0], on_device[2], rings)
        slabs, on_disk = self._slabs(homes, rings), 0
        on_host = sum(row.num_bytes for row in self._open(homes, rings)) + self._build_bytes
        smallest_host, host = on_host + slabs.num_bytes, self._budgets.host_bytes
        smallest_disk = 0 if host is None or smallest_host <= host else None
        for row in reversed(self._open(homes, rings)):
            slabs.to_disk(row)
            on_host, on_disk = on_host - row.num_bytes, on_disk + row.num_bytes
            if on_disk <= self._budgets.disk_bytes:
                smallest_host = min(smallest_host, on_host + slabs.num_bytes)
            if smallest_disk is None and host is not None and on_host + slabs.num_bytes <= host:
                smallest_disk = on_disk
        return smallest_host, smallest_disk


def _decided(tiers: Sequence[Tier | None]) -> tuple[Tier, ...]:
    return tuple(tier for tier in tiers if tier is not None)
