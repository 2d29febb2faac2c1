"""What a session tells of itself: bytes and seconds by lane, peaks against budgets, homes.

Owns: the names and units of these numbers, and their short form as text.
Does not: measure (timeline.py, memory/ledger.py).
Threads: any; numbers of lanes at work may be a moment old.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from offload.concurrency.lanes import COMPUTE_STREAM, TRAINING_LANE
from offload.concurrency.timeline import Timeline
from offload.memory.ledger import Ledger
from offload.planning.planner import Plan
from offload.report.lane_shares import shares
from offload.units import Tier, format_bytes

MOVING_LANES: Final = ("h2d", "d2h", "read", "write", "collective")


def collect(
    timeline: Timeline, ledger: Ledger, plan: Plan, *, unplanned_fetches: Sequence[int], disk_mode: str | None
) -> dict[str, Any]:
    """Numbers since training began. Bytes; seconds; unplanned fetches by step."""
    totals = timeline.totals()
    return {
        "budget_bytes": {str(tier): ledger.budget(tier) for tier in Tier},
        "peak_bytes": {str(tier): ledger.peak(tier) for tier in Tier},
        "homes": {
            kind: {str(tier): int(n) for tier, n in by_tier.items()}
            for kind, by_tier in plan.bytes_by_kind_and_tier.items()
        },
        "bytes_moved": {lane: totals[lane].num_bytes if lane in totals else 0 for lane in MOVING_LANES},
        "wait_s": {lane: t.wait_s for lane, t in sorted(totals.items())},
        "busy_s": {lane: t.busy_s for lane, t in sorted(totals.items())},
        "unplanned_fetches": list(unplanned_fetches),
        "disk_mode": disk_mode,
    }


def as_text(metrics: Mapping[str, Any], timeline: Timeline) -> str:
    """Bytes, rates and waits by lane, and peaks against budgets.

    Exposed: compute stood still for this lane, as far back as spans are kept.
    """
    compute = COMPUTE_STREAM if COMPUTE_STREAM in timeline.totals() else TRAINING_LANE
    exposed = shares(timeline.spans(), compute)
    lines = [f"{'lane':<14}{'moved':>14}{'GB/s':>9}{'busy s':>9}{'waited s':>10}{'exposed s':>11}"]
    for lane, totals in sorted(timeline.totals().items()):
        rate = totals.num_bytes / totals.busy_s / 1e9 if totals.busy_s else 0.0
        lines.append(
            f"{lane:<14}{format_bytes(totals.num_bytes):>14}{rate:>9.2f}{totals.busy_s:>9.2f}{totals.wait_s:>10.2f}"
            f"{exposed[lane].exposed_s if lane in exposed else 0.0:>11.2f}"
        )
    lines.append("")
    lines.append(f"{'tier':<14}{'peak':>14}{'budget':>14}")
    for tier in Tier:
        budget = metrics["budget_bytes"][tier]
        shown = format_bytes(budget) if budget is not None else "none"
        lines.append(f"{tier:<14}{format_bytes(metrics['peak_bytes'][tier]):>14}{shown:>14}")
    return "\n".join(lines)
