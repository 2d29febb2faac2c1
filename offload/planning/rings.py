"""Sizes of the rings that an attempt at a plan may take.

Owns: the wanted and the smallest rings, the order in which they are tried, and how staging buffers grow with what is on
disk.
Does not: decide homes (planner.py).
Threads: pure.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from offload.units import BLOCK_NUMEL, MAX_CHUNK_NUMEL

RING_SHARE: Final = 4
"""Host rings take at most one part in this many of the host budget, if smaller chunks allow it."""
WANTED: Final = {"slots": 3, "gradient_slots": 3, "step": 3, "weight": 4, "offload": 3}
"""Lookahead of two, and one more staging buffer than a pipeline of read, work and write needs at once. Of the
gradient slots one is filled and one sent; the third is for a link that is late."""

MOST_STEP_BUFFERS: Final = 4
"""Measured: nine of them made a step 10 % slower than four, and no disk busier."""


@dataclass(frozen=True, slots=True)
class Rings:
    """How much of each ring one attempt at a plan takes."""

    chunk_numel: int
    slots: int
    gradient_slots: int
    step: int
    weight: int
    offload: int


@dataclass(frozen=True, slots=True)
class Row:
    """Equal chunks of one kind and one flat parameter that are not resident on the device."""

    kind: str
    partition: int
    flat: int
    """0: the trainable flat parameter, 1: the frozen one."""
    start: int
    count: int
    num_bytes: int
    """Of one of them."""


class StagingSizes:
    """Staging buffer sizes of the host rings: the largest sum of what one chunk needs there."""

    def __init__(self, rings: Rings) -> None:
        self._counts = {"step": rings.step, "weight": rings.weight, "offload": rings.offload}
        self._needs: dict[tuple[str, tuple[int, int]], int] = {}
        self.sizes = {"step": 0, "weight": 0, "offload": 0}
        self.num_bytes = 0

    def add(self, ring: str, chunk: tuple[int, int], num_bytes: int) -> None:
        """`chunk` needs `num_bytes` more of a staging buffer of this ring."""
        needed = self._needs[ring, chunk] = self._needs.get((ring, chunk), 0) + num_bytes
        if needed > self.sizes[ring]:
            self.num_bytes += (needed - self.sizes[ring]) * self._counts[ring]
            self.sizes[ring] = needed

    def to_disk(self, row: Row) -> None:
        """Chunks of this row pass through staging buffers from now on. Its first stands for all."""
        chunk = (row.partition, row.start)
        if row.kind == "weights":
            self.sizes["weight"], before = max(self.sizes["weight"], row.num_bytes), self.sizes["weight"]
            self.num_bytes += (self.sizes["weight"] - before) * self._counts["weight"]
        if row.kind == "gradients":
            self.add("offload", chunk, row.num_bytes)
        if row.flat == 0:
            self.add("step", chunk, row.num_bytes)

    def counts(self) -> dict[str, int]:
        """Staging buffers of each ring; none where none is needed."""
        return {ring: self._counts[ring] if size else 0 for ring, size in self.sizes.items()}


SMALLEST: Final = Rings(BLOCK_NUMEL, 1, 1, 1, 1, 1)
DEVICE_RINGS: Final = ((WANTED["slots"], WANTED["gradient_slots"]), (3, 2), (2, 2), (2, 1), (1, 1))
"""Slots of the largest partition, and gradient slots: from the wanted lookahead to none."""


def attempts(
    all_on_device: Callable[[Rings], bool],
    *,
    smallest: int = BLOCK_NUMEL,
    largest: int = MAX_CHUNK_NUMEL,
) -> Iterator[Rings]:
    """From the most comfortable rings to the smallest: device rings shrink last within a host setting.

    Chunks have from `largest` elements to `smallest`.
    """
    minimum = replace(SMALLEST, chunk_numel=smallest)
    wanted = Rings(largest, **WANTED)
    for fewer in range(WANTED["gradient_slots"] - 1, 0, -1):
        rings = replace(wanted, gradient_slots=fewer)
        if all_on_device(rings) and not all_on_device(replace(rings, gradient_slots=fewer + 1)):
            yield rings  # nothing needs to stream: better than one more gradient slot
    sizes = []
    chunk_numel = largest
    while chunk_numel >= smallest:
        sizes.append(chunk_numel)
        chunk_numel //= 2
    for slots, gradient_slots in DEVICE_RINGS:
        for numel in sizes:
            yield Rings(numel, slots, gradient_slots, WANTED["step"], WANTED["weight"], WANTED["offload"])
        yield replace(minimum, slots=slots, gradient_slots=gradient_slots, step=2, weight=2, offload=2)
        yield replace(minimum, slots=slots, gradient_slots=gradient_slots)
