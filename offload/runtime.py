"""What all components of a session share.

Owns: the frozen context that every constructor takes: device, lanes, ledger, partitions, plan, ranks, configuration.
Does not: make components or end them (assembly.py).
Threads: immutable; each of its fields says for itself who may use it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from offload.concurrency.lanes import Lanes
from offload.concurrency.timeline import Timeline
from offload.config import Config, Precision, gradient_precision
from offload.device.protocol import Device
from offload.memory.ledger import Ledger
from offload.model.partitions import Partition
from offload.planning.plan import Plan
from offload.ranks.protocol import Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """Of one session."""

    config: Config
    device: Device
    lanes: Lanes
    ledger: Ledger
    partitions: Sequence[Partition]
    """In the order of the model's modules: `partitions[i].id == i`."""
    plan: Plan
    ranks: Ranks

    @property
    def precision(self) -> Precision:
        """Of working weights, and of gradients as backward makes them."""
        return self.config.precision

    @property
    def gradient_precision(self) -> Precision:
        """Of gradients in their homes."""
        return gradient_precision(self.config)

    @property
    def timeline(self) -> Timeline:
        """Spans, waits and counters of the lanes."""
        return self.lanes.timeline
