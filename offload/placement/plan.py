"""The plan: homes of every piece and sizes of every ring, from sizes and budgets.

Owns: the decision, and the error when a budget cannot be kept.
Does not: allocate or look at the machine. Pure: the same arguments, the same plan.

Order of decisions. Device: rings at their wanted size where the budget allows, then weights at home by whole partition
(a slot is one storage) in forward order, then state with its gradient, piece by piece. Host: rings, then weights,
gradients and state by what a byte kept there saves on the disk: 3, 2 and 2 bytes a step. Disk: the rest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from offload.errors import BudgetError
from offload.units import BLOCK_NUMEL, DISK_ALIGN_BYTES, MAX_PIECE_NUMEL, Tier, format_bytes, round_up

KINDS: Final = ("weights", "gradients", "state")
RING_SHARE: Final = 4
"""Host rings take at most one part in this many of the host budget, if smaller pieces allow it."""
WANTED: Final = {"slots": 3, "gradient_slots": 2, "step": 3, "weight": 4, "land": 3}
"""Lookahead of two, and one more slab than a pipeline of read, work and write needs at once."""
SLOT_ALIGN_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class PartitionSizes:
    """What the plan knows of a partition. Element counts are of this rank's shards of padded flats."""

    id: int
    name: str
    trainable_numel: int
    frozen_numel: int
    held_with: tuple[int, ...] = ()
    build_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Encoding:
    """Bytes an element: working weights, gradients on the link and at home, planes of state."""

    weight_itemsize: int
    wire_itemsize: int
    gradient_itemsize: int
    planes: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Budgets:
    """Byte limits; None: unlimited. `disk_bytes` 0: no disk."""

    device_bytes: int | None
    host_bytes: int | None
    disk_bytes: int = 0


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


@dataclass(frozen=True, slots=True)
class _Rings:
    """How much of each ring one attempt at a plan takes."""

    piece_numel: int
    slots: int
    gradient_slots: int
    step: int
    weight: int
    land: int


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
    for rings in _attempts(minimum_rings, budgets.host_bytes is None):
        made = planner.attempt(rings)
        if made is not None:
            return made
    raise planner.too_small()


def _attempts(minimum_rings: bool, unlimited_host: bool) -> Iterator[_Rings]:
    """From the most comfortable rings to the smallest: device rings shrink last within a host setting."""
    smallest = _Rings(BLOCK_NUMEL, 1, 1, 1, 1, 1)
    if minimum_rings:
        yield smallest
        return
    sizes = []
    piece_numel = MAX_PIECE_NUMEL
    while piece_numel >= BLOCK_NUMEL:
        sizes.append(piece_numel)
        piece_numel //= 2
    for slots, gradient_slots in ((WANTED["slots"], WANTED["gradient_slots"]), (2, 2), (2, 1), (1, 1)):
        for numel in sizes:
            yield _Rings(numel, slots, gradient_slots, WANTED["step"], WANTED["weight"], WANTED["land"])
        yield replace(smallest, slots=slots, gradient_slots=gradient_slots, step=2, weight=2, land=2)
        yield replace(smallest, slots=slots, gradient_slots=gradient_slots)


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

    # --------------------------------------------------------------------------------------------- one attempt

    def attempt(self, rings: _Rings, device_budget: int | None = -1, host_budget: int | None = -1) -> Plan | None:
        """The plan with these rings, or None where they do not fit. Budgets of -1: those given."""
        device_bytes = self._budgets.device_bytes if device_budget == -1 else device_budget
        host_bytes = self._budgets.host_bytes if host_budget == -1 else host_budget
        device = self._device(rings, device_bytes)
        if device is None:
            return None
        on_device, slot_ring_bytes, gradient_slots, left = device
        homes = {kind: self._initial(kind, on_device, rings) for kind in KINDS}
        if self._device_state:
            self._fill_device_state(homes, on_device, left, rings)
        placed = self._host(homes, rings, host_bytes)
        if placed is None:
            return None
        made = self._finish(homes, on_device, slot_ring_bytes, gradient_slots, rings, placed)
        return made if made.disk_bytes <= self._budgets.disk_bytes else None

    def _device(self, rings: _Rings, budget: int | None) -> tuple[list[bool], int, int, float] | None:
        """Which partitions' weights are at home on the device, ring sizes, and the bytes left."""
        gradient_bytes = rings.gradient_slots * self._gradient_slot_bytes
        everything = [True] * len(self._partitions)
        limit = float("inf") if budget is None else float(budget)
        total = gradient_bytes + sum(self._slot_bytes)
        if total <= limit:
            return everything, 0, rings.gradient_slots, limit - total
        on_device = [False] * len(self._partitions)
        ring = self._slot_ring(on_device, rings.slots)
        if gradient_bytes + ring > limit:
            return None
        taken = gradient_bytes
        for index, num_bytes in enumerate(self._slot_bytes):
            on_device[index] = True
            taken += num_bytes
            if taken + self._slot_ring(on_device, rings.slots) > limit:
                on_device[index] = False
                taken -= num_bytes
                break
        ring = self._slot_ring(on_device, rings.slots)
        return on_device, ring, rings.gradient_slots, limit - taken - ring

    def _slot_ring(self, on_device: Sequence[bool], slots: int) -> int:
        """Bytes of the slot ring: the most that is held at once, and further slots of the largest partition."""
        streamed = [0 if home else size for home, size in zip(on_device, self._slot_bytes, strict=True)]
        if not any(streamed):
            return 0
        at_once = max(
            own + sum(streamed[other] for other in p.held_with)
            for p, own in zip(self._partitions, streamed, strict=True)
            if own
        )
        return min(at_once + (slots - 1) * max(streamed), sum(streamed))

    def _initial(self, kind: str, on_device: Sequence[bool], rings: _Rings) -> list[list[list[Tier | None]]]:
        """Homes by partition, flat and piece; None: not yet decided."""
        homes: list[list[list[Tier | None]]] = []
        for p, resident in zip(self._partitions, on_device, strict=True):
            numels = (p.trainable_numel, p.frozen_numel) if kind == "weights" else (p.trainable_numel,)
            first = Tier.DEVICE if kind == "weights" and resident else None
            homes.append([[first] * -(-numel // rings.piece_numel) for numel in numels])
        return homes

    def _fill_device_state(self, homes: dict[str, Any], on_device: Sequence[bool], left: float, rings: _Rings) -> None:
        for p, resident in zip(self._partitions, on_device, strict=True):
            if not resident:
                continue
            for index, numel in enumerate(self._piece_numels(p.trainable_numel, rings)):
                needed = self._bytes("state", numel) + self._bytes("gradients", numel)
                if needed > left:
                    return
                left -= needed
                homes["state"][p.id][0][index] = homes["gradients"][p.id][0][index] = Tier.DEVICE

    def _host(self, homes: dict[str, Any], rings: _Rings, budget: int | None) -> dict[str, tuple[int, int]] | None:
        """Decide what is still open; returns the host rings (count, slab bytes), or None where they do not fit."""
        open_bytes = sum(numel_bytes for _, _, _, _, numel_bytes in self._open(homes, rings))
        needs_disk = budget is not None and open_bytes + self._host_rings_bytes(homes, rings, False) > budget
        if needs_disk and not self._budgets.disk_bytes:
            return None
        sizes = self._host_rings(homes, rings, needs_disk)
        ring_bytes = sum(count * size for count, size in sizes.values()) + self._build_bytes
        if budget is not None:
            comfortable = rings.step == WANTED["step"] and rings.piece_numel > BLOCK_NUMEL
            if ring_bytes > budget or (comfortable and needs_disk and ring_bytes > budget // RING_SHARE):
                return None
        left = float("inf") if budget is None else budget - ring_bytes
        for kind, pid, flat, index, num_bytes in self._open(homes, rings):
            fits = num_bytes <= left and not (needs_disk and left < 0)
            homes[kind][pid][flat][index] = Tier.HOST if fits else Tier.DISK
            left = left - num_bytes if fits else 0.0
        return sizes

    def _open(self, homes: dict[str, Any], rings: _Rings) -> list[tuple[str, int, int, int, int]]:
        """Pieces without a home, in the order in which the host takes them: (kind, partition, flat, index, bytes)."""
        rows = []
        for kind in KINDS:
            for p in self._partitions:
                for flat, tiers in enumerate(homes[kind][p.id]):
                    numels = self._piece_numels((p.trainable_numel, p.frozen_numel)[flat], rings)
                    for index, (tier, numel) in enumerate(zip(tiers, numels, strict=True)):
                        if tier is None:
                            rows.append((kind, p.id, flat, index, self._bytes(kind, numel)))
        return rows

    def _host_rings_bytes(self, homes: dict[str, Any], rings: _Rings, on_disk: bool) -> int:
        return sum(c * s for c, s in self._host_rings(homes, rings, on_disk).values()) + self._build_bytes

    def _host_rings(self, homes: dict[str, Any], rings: _Rings, on_disk: bool) -> dict[str, tuple[int, int]]:
        """Counts and slab sizes of the host rings. `on_disk`: some open pieces will go to disk: any of them may."""
        largest = min(rings.piece_numel, max((p.trainable_numel for p in self._partitions), default=0))
        largest_weights = min(
            rings.piece_numel, max((max(p.trainable_numel, p.frozen_numel) for p in self._partitions), default=0)
        )
        open_kinds = {kind for kind, *_ in self._open(homes, rings)} if on_disk else set()
        weights_out = "weights" in open_kinds or any(
            tier is Tier.DEVICE and state is not Tier.DEVICE
            for p in self._partitions
            for tier, state in zip(homes["weights"][p.id][0], homes["state"][p.id][0], strict=True)
        )
        step = (
            (self._bytes("state", largest) if "state" in open_kinds else 0)
            + (self._bytes("gradients", largest) if "gradients" in open_kinds else 0)
            + (self._bytes("weights", largest) if weights_out else 0)
        )
        land = round_up(largest * self._encoding.wire_itemsize, DISK_ALIGN_BYTES)
        land += self._bytes("gradients", largest) if "gradients" in open_kinds else 0
        lands = any(tier is not Tier.DEVICE for p in self._partitions for tier in homes["gradients"][p.id][0])
        weight = self._bytes("weights", largest_weights) if "weights" in open_kinds else 0
        return {
            "step": (rings.step if step else 0, step),
            "weight": (rings.weight if weight else 0, weight),
            "land": (rings.land if lands and land else 0, land if lands else 0),
        }

    # ------------------------------------------------------------------------------------------------- totals

    def _finish(
        self, homes: dict[str, Any], on_device: Sequence[bool], slot_ring_bytes: int, gradient_slots: int,
        rings: _Rings, slabs: dict[str, tuple[int, int]],
    ) -> Plan:  # fmt: skip
        by_kind: dict[str, dict[Tier, int]] = {kind: dict.fromkeys(Tier, 0) for kind in KINDS}
        for kind in KINDS:
            for p in self._partitions:
                for flat, tiers in enumerate(homes[kind][p.id]):
                    numel_of = (p.trainable_numel, p.frozen_numel)[flat]
                    for tier, numel in zip(tiers, self._piece_numels(numel_of, rings), strict=True):
                        exact = tier is Tier.DEVICE and kind == "weights"
                        size = numel * self._encoding.weight_itemsize if exact else self._bytes(kind, numel)
                        by_kind[kind][tier] += size
        gradient_bytes = gradient_slots * self._gradient_slot_bytes
        ring_bytes = sum(count * size for count, size in slabs.values())
        return Plan(
            piece_numel=rings.piece_numel,
            homes=tuple(
                PartitionHomes(
                    weights_on_device=resident,
                    trainable_weights=tuple(homes["weights"][p.id][0]),
                    frozen_weights=tuple(homes["weights"][p.id][1]),
                    gradients=tuple(homes["gradients"][p.id][0]),
                    state=tuple(homes["state"][p.id][0]),
                )
                for p, resident in zip(self._partitions, on_device, strict=True)
            ),
            slot_ring_bytes=slot_ring_bytes,
            gradient_slots=gradient_slots,
            gradient_slot_bytes=self._gradient_slot_bytes,
            step_slabs=slabs["step"][0],
            step_slab_bytes=slabs["step"][1],
            weight_slabs=slabs["weight"][0],
            weight_slab_bytes=slabs["weight"][1],
            land_slabs=slabs["land"][0],
            land_slab_bytes=slabs["land"][1],
            build_bytes=self._build_bytes,
            device_bytes=slot_ring_bytes + gradient_bytes + sum(by_kind[kind][Tier.DEVICE] for kind in KINDS),
            host_bytes=ring_bytes + self._build_bytes + sum(by_kind[kind][Tier.HOST] for kind in KINDS),
            disk_bytes=sum(by_kind[kind][Tier.DISK] for kind in KINDS),
            bytes_by_kind_and_tier=by_kind,
        )

    def _bytes(self, kind: str, numel: int) -> int:
        """Bytes of one piece on host or disk, padded for direct I/O."""
        if kind == "state":
            return sum(round_up(numel * size, DISK_ALIGN_BYTES) for _, size in self._encoding.planes)
        itemsize = self._encoding.weight_itemsize if kind == "weights" else self._encoding.gradient_itemsize
        return round_up(numel * itemsize, DISK_ALIGN_BYTES)

    def _piece_numels(self, numel: int, rings: _Rings) -> list[int]:
        return [min(rings.piece_numel, numel - start) for start in range(0, numel, rings.piece_numel)]

    # -------------------------------------------------------------------------------------------------- error

    def too_small(self) -> BudgetError:
        """Names the budgets that would do."""
        smallest = _Rings(BLOCK_NUMEL, 1, 1, 1, 1, 1)
        nothing = [False] * len(self._partitions)
        device_bytes = self._gradient_slot_bytes + self._slot_ring(nothing, 1)
        given = self._budgets.device_bytes
        beside = given if given is None or given >= device_bytes else device_bytes
        unlimited = self.attempt(smallest, device_budget=beside, host_budget=None)
        if unlimited is None:
            smallest_host = None
        elif self._budgets.disk_bytes:
            homes = {kind: self._initial(kind, nothing, smallest) for kind in KINDS}
            smallest_host = self._host_rings_bytes(homes, smallest, on_disk=True)
        else:
            smallest_host = unlimited.host_bytes
        parts = [f"the smallest device_memory is {device_bytes} bytes ({format_bytes(device_bytes)})"]
        if smallest_host is not None:
            at = "it" if beside != given else f"the {format_bytes(given or 0)} given"
            parts.append(
                f"the smallest host_memory beside {at} is {smallest_host} bytes ({format_bytes(smallest_host)})"
            )
        found = ", ".join(
            f"{name}={'unlimited' if value is None else format_bytes(value)}"
            for name, value in (
                ("device_memory", given), ("host_memory", self._budgets.host_bytes), ("disk", self._budgets.disk_bytes)
            )
        )  # fmt: skip
        whole = sum(self._slot_bytes) + sum(
            self._bytes("state", p.trainable_numel) + self._bytes("gradients", p.trainable_numel)
            for p in self._partitions
        )
        return BudgetError(
            f"the model does not fit the budgets ({found}): {'; '.join(parts)}. Its weights, gradients and state take "
            f"{format_bytes(whole)} in all: raise a budget"
            + ("." if self._budgets.disk_bytes else ", or give disk= a folder.")
        )
