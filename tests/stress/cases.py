"""Random runs: what is trained, under which budgets, and in which order its lanes run; drawn from a seed.

Owns: which combinations there are, and smaller ones for a case that fails.
Does not: run them (program.py).

A seed gives the same case everywhere. Numeric settings (precision, moments, clipping, accumulation) belong to the
expected bits; everything else (homes, rings, overlap, lanes, device) must not change them.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from tests.stress.models import KINDS, OPTIMIZERS, ROUTES

Operation = tuple[str, Any]
"""A name of Program's methods, and its argument."""

ORDERS: Final = ("threads", "threads", "late", "shuffled", "shuffled", "slow stream", "slow step", "slow write")


@dataclass(frozen=True)
class Case:
    """One run. Defaults are what a failing case is made smaller towards."""

    seed: int
    operations: tuple[Operation, ...]
    kinds: tuple[str, ...] = ("linear",)
    width: int = 16
    tied: bool = False
    optimizer: str = "AdamW"
    num_groups: int = 1
    precision: str = "fp32"
    state_dtype: str = "fp32"
    max_grad_norm: float | None = None
    accumulate: int | None = None
    overlap: str = "forward"
    order: str = "threads"
    device: str = "product"
    """See tests/races/scenarios.py; `stream` computes and copies on lanes."""
    device_share: float = 0.0
    """Of what lies between the smallest device budget and all the bytes there are."""
    host_share: float = 0.0
    smallest_rings: bool = True
    buffers: int = 0
    """More staging buffers in every host ring than the plan chose."""
    slots: float = 1.0
    """Factor on the bytes for slots."""


def draw(seed: int) -> Case:
    """The case of this seed."""
    rng = random.Random(seed)
    overlap = rng.choice(("forward", "forward", "backward", "off"))
    precision = rng.choice(("fp32", "bf16", "bf16", "fp16"))
    if overlap == "backward" and precision == "fp16":
        precision = "bf16"
    accumulate = rng.choice((1, 2, 3) if overlap == "backward" else (None, 1, 2))
    clips = overlap != "backward" and rng.random() < 0.5
    optimizer = rng.choice(OPTIMIZERS)
    kinds = tuple(rng.choice(KINDS) for _ in range(rng.randint(2, 6)))
    order = rng.choice(ORDERS)
    device = rng.choice(("product", "host", "stream"))
    if device == "stream":  # torch's random state is the training thread's, which runs ahead of the stream
        kinds = tuple("linear" if kind == "dropout" else kind for kind in kinds)
    case = Case(
        seed=seed,
        operations=(),
        kinds=kinds,
        width=rng.choice((8, 16, 24)),
        tied=rng.random() < 0.4,
        optimizer=optimizer,
        num_groups=rng.randint(1, 3),
        precision=precision,
        state_dtype=rng.choice(("fp32", "fp32", "bf16", "8bit")) if optimizer == "AdamW" else "fp32",
        max_grad_norm=rng.choice((0.05, 1.0)) if clips else None,
        accumulate=accumulate,
        overlap=overlap,
        order=order,
        device=device,
        device_share=rng.choice((0.0, 0.0, rng.random(), 1.0)),
        host_share=rng.choice((0.0, 0.0, rng.random(), 1.0)),
        smallest_rings=rng.random() < 0.5,
        buffers=rng.choice((0, 0, 1, 3)),
        slots=rng.choice((1.0, 1.0, 1.5, 3.0)),
    )
    return replace(case, operations=tuple(_operations(rng, case)))


def _operations(rng: random.Random, case: Case) -> Iterator[Operation]:
    """Three to six steps, and what a loop may do between."""
    may_drop = case.overlap != "backward"  # there, what a step has begun cannot be taken back
    for number in range(rng.randint(3, 6)):
        num_rounds = (case.accumulate or 1) if case.overlap == "backward" else rng.randint(1, 3)
        for _ in range(num_rounds):
            if rng.random() < 0.2:
                yield rng.choice((("evaluate", _route(rng, case)), ("generate", rng.randint(1, 4))))
            yield "train", (rng.randrange(1 << 16), _route(rng, case))
            if may_drop and rng.random() < 0.1:
                yield rng.choice((("zero_grad", True), ("zero_grad", False), ("read_gradients", None)))
        if rng.random() < 0.15 and may_drop:  # there, backward has stepped the weights already
            yield "evaluate", _route(rng, case)
        yield "step", None
        if rng.random() < 0.85:
            yield "zero_grad", rng.random() < 0.8
        elif not may_drop:
            yield "zero_grad", True
        if rng.random() < 0.15:
            yield rng.choice((("read_weights", None), ("state_dict", None), ("edit", number), ("change_rate", 0.5)))
        if may_drop and rng.random() < 0.1:
            # A second step, of gradients that were kept or of none; fp16 refuses one without a scaled loss before it.
            again = ("fail_forward", _route(rng, case)) if case.precision == "fp16" else ("step", None)
            yield rng.choice((("fail_forward", _route(rng, case)), again))


def _route(rng: random.Random, case: Case) -> tuple[str, ...]:
    usual = rng.random() < 0.6
    ways = [rng.choice(("run", "run", "checkpoint") if usual else ROUTES) for _ in case.kinds]
    if case.overlap == "backward":  # it refuses reentrant checkpoints
        ways = ["checkpoint" if way == "reentrant" else way for way in ways]
    return tuple(ways)


def smaller(case: Case) -> Iterator[Case]:
    """Cases with one thing less, those that leave out most first."""
    length = len(case.operations)
    for size in (length // 2, length // 4, 1):
        for start in range(0, length, size) if size else ():
            yield replace(case, operations=case.operations[:start] + case.operations[start + size :])
    for index in range(len(case.kinds)):
        if len(case.kinds) > 1:
            yield replace(
                case,
                kinds=case.kinds[:index] + case.kinds[index + 1 :],
                operations=tuple(_without(operation, index) for operation in case.operations),
            )
    for field in fields(Case):
        if field.name not in ("seed", "operations", "kinds") and getattr(case, field.name) != field.default:
            yield replace(case, **{field.name: field.default})


def _without(operation: Operation, index: int) -> Operation:
    """The same with one block less in its route."""
    name, argument = operation
    if name in ("evaluate", "fail_forward"):
        return name, argument[:index] + argument[index + 1 :]
    if name == "train":
        return name, (argument[0], argument[1][:index] + argument[1][index + 1 :])
    return operation
