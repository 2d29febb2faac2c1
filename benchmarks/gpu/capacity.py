"""The largest Llama that trains under a cap of device memory: ours by its plan, peers by their bytes per parameter.

    python -m benchmarks.gpu.capacity --json benchmarks/results/gpu_capacity.json

Owns: the family of models, the search, the bytes per parameter of peers and where they come from.
Does not: train: everything here is arithmetic, on any machine, and its result says so.
Threads: the main thread.

Note [Family]: width h, h / 128 blocks with heads of 128, an MLP of 2.75 h, a vocabulary of 32,000 that is not shared
with the head: 6.8 billion parameters at h = 4096. One sequence of 4,096 tokens; every block is recomputed in backward,
and the loss is taken over chunks, so that its logits do not decide.

Note [Peers]: bytes that each must hold for a parameter, without buffers, caches or fragmentation: they get the benefit
of the doubt. Device bytes per block: what is gathered at once, two blocks where it looks one ahead.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from benchmarks.measure.chart import Bar, bar_chart
from benchmarks.measure.result import check_result_path, command_of, versions, write_result
from offload.config import Precision
from offload.errors import BudgetError
from offload.optimizer.kinds import kind_of, splits
from offload.planning.cost import Budgets, Encoding, PartitionSizes
from offload.planning.planner import Planner, plan
from offload.planning.rings import Rings
from offload.report.console import Console, format_table
from offload.units import BLOCK_NUMEL, GIB, format_bytes, parse_bytes, round_up

CAPS: Final = tuple(gib * GIB for gib in (8, 16, 24, 80))
VOCABULARY: Final = 32_000
TOKENS: Final = 4096
LOSS_CHUNK: Final = 1024
HEAD_WIDTH: Final = 128
WIDTHS: Final = range(512, 65_536 + 1, 128)
LABEL: Final = "computed from byte counts on any machine; nothing was trained, on a GPU or elsewhere"


@dataclass(frozen=True, slots=True)
class Llama:
    """See Note [Family]."""

    width: int

    @property
    def layers(self) -> int:
        """Blocks."""
        return self.width // HEAD_WIDTH

    @property
    def inner(self) -> int:
        """Width of the MLP."""
        return int(2.75 * self.width)

    @property
    def block_numel(self) -> int:
        """Parameters of one block."""
        return 4 * self.width**2 + 3 * self.width * self.inner + 2 * self.width

    @property
    def embedding_numel(self) -> int:
        """Of the embedding, and of the head."""
        return VOCABULARY * self.width

    @property
    def numel(self) -> int:
        """All parameters."""
        return self.layers * self.block_numel + 2 * self.embedding_numel + self.width

    def partitions(self) -> list[PartitionSizes]:
        """Embedding, blocks, norm, head: as a model is cut."""
        numels = [self.embedding_numel, *[self.block_numel] * self.layers, self.width, self.embedding_numel]
        names = ["embedding", *(f"block {i}" for i in range(self.layers)), "norm", "head"]
        return [
            PartitionSizes(index, name, round_up(numel, BLOCK_NUMEL), 0)
            for index, (name, numel) in enumerate(zip(names, numels, strict=True))
        ]

    def activation_bytes(self) -> int:
        """What checkpointing keeps, one block recomputed with its gradients, one chunk of the loss. 16 bit."""
        kept = 2 * TOKENS * self.width * self.layers
        block = 2 * TOKENS * (12 * self.width + 5 * self.inner)
        return kept + block + 10 * LOSS_CHUNK * VOCABULARY


@dataclass(frozen=True, slots=True)
class Machine:
    """Budgets beside the device's cap."""

    host_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Largest:
    """What fits, and what the next larger model lacks."""

    numel: int
    width: int
    bound: str


# --------------------------------------------------------------------------------------------------------- ours


def encoding(state_dtype: str) -> Encoding:
    """Of a bf16 run with AdamW; gradients in 16 bit."""
    kind = kind_of(None) if state_dtype == "none" else _adam(state_dtype)
    at_home, on_device = (
        tuple(
            (p.name, p.bytes_per_element)
            for p in kind.state_tensors(split=splits(Precision.BF16, weights_on_device=there))
        )
        for there in (False, True)
    )
    return Encoding(2, 2, 2, at_home, on_device)


def _adam(state_dtype: str) -> Any:
    parameter = torch.nn.Parameter(torch.zeros(1))
    return kind_of(torch.optim.AdamW([parameter]), state_dtype)


class SmallestRings(Planner):
    """Tries the last of all attempts alone: what fits at all fits with the smallest rings."""

    device_rings = ((1, 1),)

    def attempts(self) -> Iterator[Rings]:
        *_, smallest = super().attempts()
        yield smallest


def our_bound(model: Llama, cap_bytes: int, machine: Machine, state_dtype: str) -> str:
    """Empty where it fits; else which budget is too small: the one that, without a limit, would let it fit."""
    device_bytes = cap_bytes - model.activation_bytes()
    if device_bytes <= 0:
        return "device: activations"
    given = encoding(state_dtype)

    def fits(device: int | None, host: int | None, disk: int) -> bool:
        budgets = Budgets(device, host, disk)
        try:
            plan(model.partitions(), given, budgets, device_state=False, planner=SmallestRings)
        except BudgetError:
            return False
        return True

    unlimited = 1 << 60
    if fits(device_bytes, machine.host_bytes, machine.disk_bytes):
        return ""
    if fits(unlimited, machine.host_bytes, machine.disk_bytes):
        return "device: slots"
    if fits(device_bytes, unlimited, machine.disk_bytes):
        return "host"
    return "disk" if fits(device_bytes, machine.host_bytes, unlimited) else "host and disk"


# -------------------------------------------------------------------------------------------------------- peers


@dataclass(frozen=True, slots=True)
class Peer:
    """Bytes a parameter by tier, and of blocks gathered at once on the device. See Note [Peers]."""

    words: str
    device: float = 0.0
    host: float = 0.0
    disk: float = 0.0
    gathered: float = 0.0
    """Bytes for each parameter of one block."""
    source: str = ""


PEERS: Final = (
    Peer("nothing offloaded", device=16, source="weights 2, gradients 2, fp32 master and moments 12"),
    Peer(
        "torchao CPUOffloadOptimizer", device=2, host=8, gathered=2,
        source="bf16 throughout: weights on the device; weights, gradients and moments on the host; no master",
    ),
    Peer(
        "FSDP2 CPUOffloadPolicy", host=16, gathered=2 * (2 + 4) + 2,
        source="fp32 weights, gradients and moments on the host; two blocks gathered from fp32 to bf16, one gradient",
    ),
    Peer(
        "DeepSpeed ZeRO-3, host", host=18, gathered=2 * 2 + 2,
        source="its documentation: 18 on the host with offload_param; two blocks gathered, one gradient",
    ),
    Peer(
        "DeepSpeed ZeRO-3, disk", host=2, disk=20, gathered=2 * 2 + 2,
        source="ZeRO-Infinity: 16 of state with fp32 gradients and 2 + 2 in 16 bit on disk; 2 of gradients buffered",
    ),
)  # fmt: skip


def peer_bound(peer: Peer, model: Llama, cap_bytes: int, machine: Machine) -> str:
    """Empty where it fits; else what is too small."""
    largest = max(model.block_numel, model.embedding_numel)
    if model.activation_bytes() > cap_bytes:
        return "device: activations"
    if peer.device * model.numel + peer.gathered * largest + model.activation_bytes() > cap_bytes:
        return "device: held there" if peer.device else "device: gathered blocks"
    if peer.host * model.numel > machine.host_bytes:
        return "host"
    return "disk" if peer.disk * model.numel > machine.disk_bytes else ""


# -------------------------------------------------------------------------------------------------------- search


def largest(bound_of: Callable[[Llama], str]) -> Largest:
    """The widest model without a bound, by halving; what is too small for the next one."""
    low, high = -1, len(WIDTHS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if not bound_of(Llama(WIDTHS[middle])) else (low, middle)
    if high == len(WIDTHS):
        return Largest(Llama(WIDTHS[-1]).numel, WIDTHS[-1], "nothing in this family")
    bound = bound_of(Llama(WIDTHS[high]))
    return Largest(Llama(WIDTHS[low]).numel, WIDTHS[low], bound) if low >= 0 else Largest(0, 0, bound)


def table_of(machine: Machine) -> dict[str, dict[int, Largest]]:
    """By contender and cap."""
    ours = {
        "offload, host": ("fp32", Machine(machine.host_bytes, 0)),
        "offload, host, 8-bit moments": ("8bit", Machine(machine.host_bytes, 0)),
        "offload, disk": ("fp32", machine),
        "offload, disk, 8-bit moments": ("8bit", machine),
    }
    found = {}
    for name, (state_dtype, place) in ours.items():
        found[name] = {
            cap: largest(lambda model, c=cap, p=place, s=state_dtype: our_bound(model, c, p, s)) for cap in CAPS
        }
    for peer in PEERS:
        found[peer.words] = {
            cap: largest(lambda model, c=cap, p=peer: peer_bound(p, model, c, machine)) for cap in CAPS
        }
    return found


def main() -> int:
    """Compute, show, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--host-memory", default="120GiB", help="for everybody (default: %(default)s)")
    parser.add_argument("--disk-space", default="2TiB", help="for those who use a disk (default: %(default)s)")
    parser.add_argument("--json", required=True, metavar="PATH", help="a chart is written beside it (.svg)")
    options = parser.parse_args()
    check_result_path(options.json)
    machine = Machine(
        parse_bytes(options.host_memory, name="--host-memory"), parse_bytes(options.disk_space, name="--disk-space")
    )
    found = table_of(machine)
    head = ["billions of parameters", *(format_bytes(cap) for cap in CAPS)]
    rows = [
        [name, *(f"{one.numel / 1e9:.1f} ({one.bound})" for one in by_cap.values())] for name, by_cap in found.items()
    ]
    console = Console(sys.stdout)
    console.line(f"{LABEL}\nhost {format_bytes(machine.host_bytes)}, disk {format_bytes(machine.disk_bytes)}")
    console.line("in brackets: what is too small for the next larger model\n")
    console.line(format_table(head, rows))
    result = {
        "benchmark": "gpu_capacity",
        "label": LABEL,
        "command": f"python -m benchmarks.gpu.capacity{command_of(sys.argv[1:]).removeprefix('offload')}",
        "versions": versions(("torch",)),
        "host_bytes": machine.host_bytes,
        "disk_bytes": machine.disk_bytes,
        "tokens": TOKENS,
        "peers": [asdict(peer) for peer in PEERS],
        "largest": {name: {str(cap): asdict(one) for cap, one in by_cap.items()} for name, by_cap in found.items()},
    }
    bars = [
        Bar(f"{name}, {format_bytes(cap)}", *[one.numel / 1e9] * 3, "offload" if "offload," in name else "others")
        for cap in CAPS
        for name, by_cap in found.items()
        for one in [by_cap[cap]]
    ]
    notes = [LABEL, f"host {format_bytes(machine.host_bytes)}, disk {format_bytes(machine.disk_bytes)}, 4,096 tokens"]
    svg = bar_chart("Largest Llama by device memory", bars, axis="billions of parameters", notes=notes)
    for file in write_result(options.json, result, svg):
        console.line(f"wrote {file.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
