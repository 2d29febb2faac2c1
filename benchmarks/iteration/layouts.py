"""Where a session keeps its bytes while it is compared: budgets that lead the planner there.

Owns: the layouts, and the search for the budgets of each.
Does not: plan (offload/planning) or train (loops.py).
Threads: pure, but for the planner's own arguments.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Final

from offload.config import Config
from offload.device.protocol import Device
from offload.enable import PlanOf, make_plan
from offload.errors import BudgetError
from offload.model.partitions import Partition
from offload.optimizer.kinds import OptimizerKind
from offload.planning.disk_settings import DiskSettings
from offload.planning.planner import KINDS, Plan
from offload.ranks.protocol import Ranks
from offload.units import Tier

DEVICE: Final = "device"
HOST_STATE: Final = "host state"
DISK_STATE: Final = "disk state"
HOST: Final = "host"
DISK: Final = "disk"
LAYOUTS: Final = {
    DEVICE: "all on the device",
    HOST_STATE: "state on the host",
    DISK_STATE: "state on disk",
    HOST: "all on the host",
    DISK: "all on disk",
}

UNLIMITED: Final = 1 << 60
GRAIN_BYTES: Final = 4096
"""The search for a budget ends there."""

Planned = Callable[[int, int], Plan]
"""The plan within a device and a host budget; raises BudgetError."""


def plan_for(layout: str) -> PlanOf:
    """`plan_of` of a session that keeps its bytes as `layout` says."""

    def plan_of(
        partitions: Sequence[Partition],
        config: Config,
        device: Device,
        kind: OptimizerKind,
        disk: DiskSettings,
        ranks: Ranks,
    ) -> Plan:
        def planned(device_bytes: int, host_bytes: int) -> Plan:
            budgets = replace(config, device_bytes=device_bytes, host_bytes=host_bytes, disk_bytes=UNLIMITED)
            return make_plan(partitions, budgets, device, kind, disk, ranks)

        return planned_as(layout, planned)

    return plan_of


def planned_as(layout: str, planned: Planned) -> Plan:
    """The plan with the largest budgets under which nothing is nearer to the device than `layout` says."""
    everything = planned(UNLIMITED, UNLIMITED)
    if layout == DEVICE:
        return everything
    # With weights on the device its budget ends below the first chunk of state, else below the first weights.
    off_device = ("gradients", "state") if layout in (HOST_STATE, DISK_STATE) else KINDS
    device_bytes = largest_without(off_device, Tier.DEVICE, everything.device_bytes, lambda b: planned(b, UNLIMITED))
    on_host = planned(device_bytes, UNLIMITED)
    device_bytes = on_host.device_bytes  # to the byte: else a smaller chunk, made for another host budget, would fit
    if layout in (HOST_STATE, HOST):
        return on_host
    off_host = ("state",) if layout == DISK_STATE else KINDS
    host_bytes = largest_without(off_host, Tier.HOST, on_host.host_bytes, lambda b: planned(device_bytes, b))
    return planned(device_bytes, host_bytes)


def largest_without(kinds: Iterable[str], tier: Tier, limit: int, planned: Callable[[int], Plan]) -> int:
    """The largest budget of `tier` up to `limit` under which none of `kinds` is there.

    Raises BudgetError where every budget that holds a plan at all has some of them there.
    """
    kinds = tuple(kinds)
    low, high = 0, limit + GRAIN_BYTES
    found = -1
    while high - low > GRAIN_BYTES:
        middle = (low + high) // 2
        try:
            made = planned(middle)
        except BudgetError:
            low = middle
            continue
        if any(made.bytes_by_kind_and_tier[kind][tier] for kind in kinds):
            high = middle
        else:
            low = found = middle
    if found < 0:
        raise BudgetError(
            f"no {tier} budget keeps {', '.join(kinds)} off the {tier}: the smallest rings are as large as the model. "
            "Compare a larger model."
        )
    return found
