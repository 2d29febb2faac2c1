"""The plan: homes of every chunk and sizes of every ring, from sizes and budgets.

Owns: the decision, and the error when a budget cannot be kept.
Does not: allocate or look at the machine; choose for the device (on_device.py); count the bytes of a chunk (cost.py).
Threads: pure: the same arguments, the same plan.

Order of decisions. Device: rings at their wanted size where the budget allows, then resident weights by whole
partition (a slot is one storage) in forward order, then state with its gradient, chunk by chunk. Host: rings, then
weights, gradients and state by what a byte stored there saves on the disk: 3, 2 and 2 bytes a step. Disk: the rest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from offload.errors import BudgetError
from offload.planning.cost import Budgets, Encoding, PartitionSizes, chunk_numels, chunk_runs
from offload.planning.on_device import DeviceShare, DeviceSide
from offload.planning.plan import KINDS, PartitionHomes, Plan
from offload.planning.rings import (
    DEVICE_RINGS,
    MOST_STEP_BUFFERS,
    RING_SHARE,
    SMALLEST,
    WANTED,
    Rings,
    Row,
    StagingSizes,
    attempts,
)
from offload.units import BLOCK_NUMEL, DISK_ALIGN_BYTES, MAX_CHUNK_NUMEL, Tier, format_bytes, round_up

__all__ = ["KINDS", "Budgets", "Encoding", "PartitionHomes", "PartitionSizes", "Plan", "plan"]


@dataclass(frozen=True, slots=True)
class _Host:
    """How many first chunks of each row stay on the host, and the host rings."""

    counts: list[int]
    buffers: StagingSizes


class Planner:
    """One set of arguments; attempts with different rings."""

    device_rings: Sequence[tuple[int, int]] = DEVICE_RINGS
    """Weight slots and gradient slots of the attempts."""

    def __init__(
        self,
        partitions: Sequence[PartitionSizes],
        encoding: Encoding,
        budgets: Budgets,
        side: DeviceSide,
        *,
        world_size: int,
        in_flight_bytes: int,
    ) -> None:
        self._in_flight_bytes = in_flight_bytes
        self._partitions = partitions
        self._encoding = encoding
        self._budgets = budgets
        self._world_size = world_size
        self._side = side
        largest = max((p.trainable_numel for p in partitions), default=0) if encoding.whole_partitions else 0
        self._chunk_numel = round_up(max(largest, 1), BLOCK_NUMEL)
        """Elements of the smallest chunks."""
        self._build_bytes = max((p.build_bytes for p in partitions), default=0)

    def plan(self) -> Plan:
        """The first attempt that keeps the budgets; BudgetError names the smallest that would do."""
        if not self.hopeless():
            for rings in self.attempts():
                made = self.attempt(rings)
                if made is not None:
                    return made
        raise self.too_small()

    # ------------------------------------------------------------------------------------------- quick answers

    def attempts(self) -> Iterator[Rings]:
        """Rings to try in turn; where parameters are stepped whole, with chunks as large as the largest partition."""
        smallest, largest = self._chunk_numel, max(self._chunk_numel, MAX_CHUNK_NUMEL)
        for rings in attempts(self._side.all_resident, smallest=smallest, largest=largest):
            num_buffers = self._buffers_in_flight(rings)
            if rings.step == WANTED["step"] < num_buffers:
                yield replace(rings, step=num_buffers)
            yield rings

    def _buffers_in_flight(self, rings: Rings) -> int:
        """Step staging buffers that keep the disks busy: what is under way there, one in the kernel, one in between.

        At most MOST_STEP_BUFFERS: with more, records leave the CPU's cache between read, kernel and write.
        """
        largest = max((p.trainable_numel for p in self._partitions), default=0)
        buffer_bytes = self._encoding.record_bytes("state", min(rings.chunk_numel, largest))
        return min(MOST_STEP_BUFFERS, 2 + -(-self._in_flight_bytes // buffer_bytes)) if buffer_bytes else 0

    def hopeless(self) -> bool:
        """Whether even the bare bytes exceed all budgets together: spares large models dozens of attempts."""
        budgets = (self._budgets.device_bytes, self._budgets.host_bytes, self._budgets.disk_bytes)
        state_tensors_bytes = sum(
            size for _, size in self._encoding.state_tensors
        )  # never more than those of residents
        bare = sum(p.trainable_numel for p in self._partitions) * (
            self._encoding.gradient_itemsize + state_tensors_bytes
        )
        bare += sum(self._side.slot_bytes) // self._world_size
        return None not in budgets and bare > sum(budget or 0 for budget in budgets)

    # --------------------------------------------------------------------------------------------- one attempt

    def attempt(self, rings: Rings) -> Plan | None:
        """The plan with these rings, or None where they do not fit."""
        device = self._side.share(rings, self._budgets.device_bytes)
        if device is None:
            return None
        rows = self._rows(device, rings)
        host = self._host(rows, self._buffers(device, rings), rings)
        if host is None:
            return None
        made = self._finish(device, rows, host, rings)
        return made if made.disk_bytes <= self._budgets.disk_bytes else None

    def _rows(self, device: DeviceShare, rings: Rings) -> list[Row]:
        """Chunks that are not resident, in the order in which the host takes them."""
        rows = []
        for kind in KINDS:
            for index, p in enumerate(self._partitions):
                if kind == "weights" and index < device.num_partitions:
                    continue
                numels = (p.trainable_numel, p.frozen_numel) if kind == "weights" else (p.trainable_numel,)
                on_device = 0 if kind == "weights" else device.num_chunks[index]
                for flat, flat_numel in enumerate(numels):
                    for start, count, numel in chunk_runs(flat_numel, rings.chunk_numel, on_device):
                        resident = index < device.num_partitions
                        num_bytes = self._encoding.record_bytes(kind, numel, resident=resident)
                        rows.append(Row(kind, index, flat, start, count, num_bytes))
        return rows

    def _buffers(self, device: DeviceShare, rings: Rings) -> StagingSizes:
        """What the host rings need while nothing is on disk: for gradients, and for new weights of the device."""
        buffers = StagingSizes(rings)
        for index, p in enumerate(self._partitions):
            for start, _, numel in chunk_runs(p.trainable_numel, rings.chunk_numel, device.num_chunks[index]):
                buffers.add("offload", (index, start), round_up(numel * self._encoding.wire_itemsize, DISK_ALIGN_BYTES))
                if index < device.num_partitions:
                    buffers.add("step", (index, start), self._encoding.record_bytes("weights", numel))
        return buffers

    def _host(self, rows: list[Row], buffers: StagingSizes, rings: Rings) -> _Host | None:
        """How many chunks of each row stay on the host, and its rings; None where the rings do not fit.

        As much stays on the host as fits with the staging buffers that the rest then needs: the last of what is worth
        least goes to disk first, and staging buffers grow with the first chunk of a kind that does.
        """
        budget = self._budgets.host_bytes
        limit = float("inf") if budget is None else budget - self._build_bytes
        on_host, counts = sum(row.count * row.num_bytes for row in rows), [row.count for row in rows]
        for index in reversed(range(len(rows))):
            if on_host + buffers.num_bytes <= limit:
                break
            row = rows[index]
            if not row.num_bytes:  # an optimizer without state
                continue
            buffers.to_disk(row)
            excess = on_host + buffers.num_bytes - limit
            moved = min(row.count, int(-(-excess // row.num_bytes)))
            counts[index] -= moved
            on_host -= moved * row.num_bytes
        if on_host + buffers.num_bytes > limit:
            return None
        may_shrink = rings.step >= WANTED["step"] and rings.chunk_numel > self._chunk_numel
        uses_disk = any(count < row.count for count, row in zip(counts, rows, strict=True))
        if may_shrink and uses_disk and buffers.num_bytes * RING_SHARE > limit:
            return None
        return _Host(counts, buffers)

    # ------------------------------------------------------------------------------------------------- totals

    def _finish(self, device: DeviceShare, rows: list[Row], host: _Host, rings: Rings) -> Plan:
        by_kind: dict[str, dict[Tier, int]] = {kind: dict.fromkeys(Tier, 0) for kind in KINDS}
        tiers: dict[tuple[str, int, int], list[Tier]] = {}
        for kind in KINDS:
            for index, p in enumerate(self._partitions):
                for flat, numel in enumerate((p.trainable_numel, p.frozen_numel)):
                    whole = len(chunk_numels(numel, rings.chunk_numel)) if index < device.num_partitions else 0
                    on_device = whole if kind == "weights" else device.num_chunks[index]
                    tiers[kind, index, flat] = [Tier.DEVICE] * on_device
        for row, count in zip(rows, host.counts, strict=True):
            tiers[row.kind, row.partition, row.flat] += [Tier.HOST] * count + [Tier.DISK] * (row.count - count)
            by_kind[row.kind][Tier.HOST] += count * row.num_bytes
            by_kind[row.kind][Tier.DISK] += (row.count - count) * row.num_bytes
        by_kind["weights"][Tier.DEVICE] = sum(
            self._side.home_bytes(rings, index) for index in range(device.num_partitions)
        )
        for kind in ("gradients", "state"):
            by_kind[kind][Tier.DEVICE] = self._side.whole(kind, rings, device.num_partitions) - sum(
                by_kind[kind].values()
            )
        gradient_slots = rings.gradient_slots if self._side.gradient_slot_bytes else 0
        exchange_bytes = self._side.exchange_bytes
        gradient_bytes = gradient_slots * self._side.gradient_slot_bytes + exchange_bytes
        counts, sizes = host.buffers.counts(), host.buffers.sizes
        return Plan(
            chunk_numel=rings.chunk_numel,
            homes=tuple(
                PartitionHomes(
                    weights_on_device=index < device.num_partitions,
                    trainable_weights=tuple(tiers["weights", index, 0]),
                    frozen_weights=tuple(tiers["weights", index, 1]),
                    gradients=tuple(tiers["gradients", index, 0]),
                    state=tuple(tiers["state", index, 0]),
                )
                for index in range(len(self._partitions))
            ),
            slot_ring_bytes=device.slot_ring_bytes,
            spare_slot_bytes=device.spare_slot_bytes,
            gradient_slots=gradient_slots,
            gradient_slot_bytes=self._side.gradient_slot_bytes,
            step_buffers=counts["step"],
            step_buffer_bytes=sizes["step"],
            weight_buffers=counts["weight"],
            weight_buffer_bytes=sizes["weight"],
            offload_buffers=counts["offload"],
            offload_buffer_bytes=sizes["offload"],
            exchange_bytes=exchange_bytes,
            device_workspace_bytes=device.workspace_bytes,
            build_bytes=self._build_bytes,
            device_bytes=device.slot_ring_bytes
            + device.spare_slot_bytes
            + gradient_bytes
            + device.workspace_bytes
            + sum(by_kind[kind][Tier.DEVICE] for kind in KINDS),
            host_bytes=host.buffers.num_bytes + self._build_bytes + sum(by_kind[kind][Tier.HOST] for kind in KINDS),
            disk_bytes=sum(by_kind[kind][Tier.DISK] for kind in KINDS),
            bytes_by_kind_and_tier=by_kind,
        )

    # -------------------------------------------------------------------------------------------------- error

    def too_small(self) -> BudgetError:
        """Names the budgets that would do."""
        given, disk = self._budgets.device_bytes, self._budgets.disk_bytes
        device_bytes = self._side.gradient_slot_bytes + self._side.exchange_bytes + sum(self._side.slot_memory(0, 1))
        assumed = given if given is None or given >= device_bytes else device_bytes
        smallest_rings = replace(SMALLEST, chunk_numel=self._chunk_numel)
        tried = [
            replace(smallest_rings, slots=slots, gradient_slots=gradients) for slots, gradients in self.device_rings
        ]
        smallest = [self._smallest_host_and_disk(rings, assumed) for rings in tried]
        hosts, disks = [host for host, _ in smallest if host is not None], [disk for _, disk in smallest]
        parts = [f"the smallest device_memory is {device_bytes} bytes ({format_bytes(device_bytes)})"]
        if hosts:
            at = "it" if assumed != given else f"the {'unlimited one' if given is None else format_bytes(given)} given"
            parts.append(f"the smallest host_memory with {at} is {min(hosts)} bytes ({format_bytes(min(hosts))})")
        needed = min((num_bytes for num_bytes in disks if num_bytes is not None), default=0)
        if disk and needed > disk:
            parts.append(f"the smallest disk_space with both is {needed} bytes ({format_bytes(needed)})")
        found = ", ".join(
            f"{name}={'unlimited' if value is None else format_bytes(value)}"
            for name, value in (
                ("device_memory", given), ("host_memory", self._budgets.host_bytes), ("disk", disk)
            )
        )  # fmt: skip
        whole = format_bytes(sum(self._side.slot_bytes) + self._side.training_bytes(smallest_rings))
        return BudgetError(
            f"the model does not fit the budgets ({found}): {'; '.join(parts)}. Its weights, gradients and state take "
            f"{whole} in all: raise a budget" + ("." if disk else ", or give disk= a folder.")
        )

    def _smallest_host_and_disk(self, rings: Rings, device_budget: int | None) -> tuple[int | None, int | None]:
        """With these rings: the smallest host budget for the disk given, and disk space for the host given."""
        device = self._side.share(rings, device_budget)
        if device is None:
            return None, None
        rows, buffers = self._rows(device, rings), self._buffers(device, rings)
        host, disk = self._budgets.host_bytes, self._budgets.disk_bytes
        on_host, on_disk = sum(row.count * row.num_bytes for row in rows) + self._build_bytes, 0
        smallest_host = on_host + buffers.num_bytes
        smallest_disk = 0 if host is None or smallest_host <= host else None
        for row in reversed([row for row in rows if row.num_bytes]):
            buffers.to_disk(row)
            to_disk = min(row.count, (disk - on_disk) // row.num_bytes)
            if to_disk > 0:
                smallest_host = min(smallest_host, on_host + buffers.num_bytes - to_disk * row.num_bytes)
            if smallest_disk is None and host is not None:
                needed = -(-(on_host + buffers.num_bytes - host) // row.num_bytes)
                smallest_disk = on_disk + needed * row.num_bytes if needed <= row.count else None
            on_host, on_disk = on_host - row.count * row.num_bytes, on_disk + row.count * row.num_bytes
        return smallest_host, smallest_disk


def plan(
    partitions: Sequence[PartitionSizes],
    encoding: Encoding,
    budgets: Budgets,
    *,
    world_size: int = 1,
    is_sharded: bool = False,
    device_state: bool,
    spare_slot: bool = False,
    in_flight_bytes: int = 0,
    planner: type[Planner] = Planner,
) -> Plan:
    """Homes and rings for these partitions within these budgets; BudgetError names the smallest that would do.

    `world_size`: ranks that share the model. `is_sharded`: each plans for its own shards, and they are exchanged.
    `device_state`: state may be resident on the device (it can be stepped there). `spare_slot`: slots are cut from one
    block, and need room for one more to find their place in it. `in_flight_bytes`: what the disks want under way to
    reach their measured rate, 0 where nobody measured them.
    """
    side = DeviceSide(
        partitions, encoding, budgets.device_bytes, world_size=world_size, is_sharded=is_sharded,
        device_state=device_state, spare_slot=spare_slot,
    )  # fmt: skip
    return planner(
        partitions, encoding, budgets, side, world_size=world_size, in_flight_bytes=in_flight_bytes
    ).plan()  # fmt: skip
