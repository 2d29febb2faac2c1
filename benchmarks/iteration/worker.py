"""One process of iteration.py: measures what its order says, and answers in a file.

Owns: blocks of iterations in turn, growth over numbers of partitions, the first step of a process.
Does not: choose what is measured (__main__.py) or compare (rows.py).
Threads: the main thread, and those of each engine.

Note [Blocks]: a block is so many iterations that the plain loop takes `block_s` for them. It begins and ends when
nothing is under way, and its clock covers both ends: what an engine leaves to the background counts in full.
"""

import gc
import importlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from benchmarks.commands.timed_model import make_model
from benchmarks.iteration.layouts import plan_for
from benchmarks.iteration.loops import DEVICE_MEMORY, Fsdp2Loop, Loop, OffloadLoop, PlainLoop, make_adamw
from benchmarks.iteration.subjects import Subject, subjects
from benchmarks.measure.rounds import Contender, run_rounds
from offload.config import Precision, make_config
from offload.enable import start

PLAIN: Final = "plain"
FUSED: Final = "fused"
OURS: Final = "offload"
FSDP2: Final = "fsdp2"
DEEPSPEED: Final = "deepspeed"

WARM_UP_ROUNDS: Final = 1
LEAST_ITERATIONS: Final = 2
MOST_ITERATIONS: Final = 200
PHASES: Final = ("forward", "backward", "step")
TIMES: Final = tuple(f"{phase}{kind}" for phase in PHASES for kind in ("", "_cpu"))


class NoProgress:
    """A process in the background shows nothing."""

    def __enter__(self) -> "NoProgress":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def ran(self, words: str, seconds: float) -> None:
        """Not shown."""


# ------------------------------------------------------------------------------------------------------- in turn


def contender_of(order: dict[str, Any], subject: Subject, layout: str) -> Loop:
    """The engine that is compared with the plain loops."""
    dtype, seed = Precision(order["precision"]).dtype, order["seed"]
    if order["contender"] == OURS:
        return OffloadLoop(subject, seed, order["precision"], layout=layout, folder=order["disk"])
    if order["contender"] == FSDP2:
        return Fsdp2Loop(subject, seed, dtype)
    module = importlib.import_module("benchmarks.iteration.deepspeed_loop")
    made: Loop = module.DeepSpeedLoop(subject, seed, dtype, layout=layout, folder=order["disk"])
    return made


def block(loop: Loop, work: Callable[[], Any], iterations: int) -> Callable[[], float]:
    """A contender's run: seconds of one iteration. Note [Blocks]."""

    def run() -> float:
        loop.settle()
        start_s = time.perf_counter()
        for _ in range(iterations):
            work()
        loop.settle()
        return (time.perf_counter() - start_s) / iterations

    return run


def iterations_for(once_s: float, block_s: float) -> int:
    """Of a block."""
    return min(MOST_ITERATIONS, max(LEAST_ITERATIONS, math.ceil(block_s / once_s)))


def compare(order: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of each layout: steps of the plain loops and of the contender in turn, then passes forward alone in turn."""
    subject = subjects(quick=order["quick"])[order["subject"]]
    dtype, seed = Precision(order["precision"]).dtype, order["seed"]
    for layout in order["layouts"]:
        try:
            contender = contender_of(order, subject, layout)
            loops: dict[str, Loop] = {
                PLAIN: PlainLoop(subject, seed, dtype, fused=False),
                FUSED: PlainLoop(subject, seed, dtype, fused=True),
                order["contender"]: contender,
            }
            found = in_turn(loops, order)
        except Exception as error:  # a peer's may be of any kind: the row says which
            yield {"layout": layout, "absent": f"{type(error).__name__}: {error}"}
            continue
        if isinstance(contender, OffloadLoop):
            found |= contender.facts()
        contender.close()
        yield found | {"layout": layout, "tokens": subject.tokens}


def in_turn(loops: dict[str, Loop], order: dict[str, Any]) -> dict[str, Any]:
    """Samples of training and of passes forward; the losses at both ends, after as many steps of each."""
    found: dict[str, Any] = {"first_losses": {name: float(loop.step()) for name, loop in loops.items()}}
    for kind in ("train", "forward"):
        works = {name: loop.step if kind == "train" else loop.evaluate for name, loop in loops.items()}
        once_s = {name: block(loop, works[name], 1)() for name, loop in loops.items()}
        iterations = iterations_for(once_s[PLAIN], order["block_s"])
        contenders = [Contender(name, name, block(loop, works[name], iterations)) for name, loop in loops.items()]
        samples = run_rounds(contenders, order["rounds"], NoProgress(), warm_up_rounds=WARM_UP_ROUNDS)
        found[kind] = {"iterations": iterations, "samples_s": samples}
    return found | {"last_losses": {name: float(loop.step()) for name, loop in loops.items()}}


# -------------------------------------------------------------------------------------------------------- growth


def grow(order: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of each number of blocks: a model with a session and one without in turn."""
    for count in order["counts"]:
        yield {"count": count} | grow_to(count, order)


def grow_to(count: int, order: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each phase, of `enable` and of closing."""
    numel, precision = order["numel"], Precision(order["precision"])
    plain, inside = make_model(count, numel).to(precision.dtype), make_model(count, numel)
    fused = make_adamw(plain.parameters(), fused=True)
    optimizer = make_adamw(inside.parameters())
    config = make_config(
        device_memory=DEVICE_MEMORY, host_memory=None, disk=order["disk"], disk_space=None, precision=str(precision),
        max_grad_norm=1.0, accumulate=1, wait_timeout_s=600.0,
    )  # fmt: skip
    start_s = time.perf_counter()
    session = start(inside, optimizer, config, "cpu", plan_of=plan_for(order["layout"]))
    enable_s = time.perf_counter() - start_s
    samples: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in TIMES} for name in (PLAIN, OURS)}
    for number in range(-WARM_UP_ROUNDS, order["rounds"]):
        runs = {
            PLAIN: phases_of(plain, fused, precision.dtype, lambda: None),
            OURS: phases_of(inside, optimizer, precision.dtype, session.metrics),
        }
        for name, run in runs.items() if number >= 0 else ():
            for phase, seconds in run.items():
                samples[name][phase].append(seconds)
    partitions = len(session.plan.homes)
    start_s = time.perf_counter()
    session.close()
    close_s = time.perf_counter() - start_s
    return {"partitions": partitions, "enable_s": enable_s, "close_s": close_s, "samples_s": samples}


def phases_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype, settle: Callable[[], Any]
) -> dict[str, float]:
    """Seconds of forward and backward while nothing else is under way, and of the step until all of it is done.

    `…_cpu`: the same without what the thread waited for others, on a lane or for a core.
    """
    x = torch.zeros(8, dtype=dtype)
    loss = torch.zeros(())

    def forward() -> None:
        nonlocal loss
        loss = model(x).sum()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()
        settle()

    found: dict[str, float] = {}
    for phase, work in (("forward", forward), ("backward", lambda: loss.backward()), ("step", step)):
        settle()
        start_s, start_cpu_s = time.perf_counter(), time.thread_time()
        work()
        found[phase] = time.perf_counter() - start_s
        found[f"{phase}_cpu"] = time.thread_time() - start_cpu_s
    return found


# -------------------------------------------------------------------------------------------------------- first


def first(order: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Seconds from the start of this process: imports, model, `enable`, the first three steps."""
    found = {"layout": order["layout"], "import_s": time.time() - order["started_s"]}
    subject = subjects(quick=order["quick"])[order["subject"]]
    times = [time.perf_counter()]
    loop = OffloadLoop(subject, order["seed"], order["precision"], layout=order["layout"], folder=order["disk"])
    times.append(time.perf_counter())
    for _ in range(3):
        loop.step()
        loop.settle()
        times.append(time.perf_counter())
    spans = [stop - start for start, stop in itertools.pairwise(times)]
    loop.close()
    yield found | {"enable_s": spans[0], "step_s": spans[1:]}  # enable_s: with the model


KINDS: Final = {"compare": compare, "grow": grow, "first": first}


def main() -> None:
    """Carry out the order, which is the only argument: a line of JSON for each measurement as soon as it is there."""
    order: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    with Path(order["answers"]).open("a", encoding="utf-8") as answers:
        for found in KINDS[order["kind"]](order):
            answers.write(json.dumps(found | {"load_average_1m": os.getloadavg()[0]}) + "\n")
            answers.flush()
            gc.collect()


if __name__ == "__main__":
    main()
