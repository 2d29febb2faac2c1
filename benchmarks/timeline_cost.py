"""What the timeline costs: the same training steps with one that records and with one that does not.

    python -m benchmarks.timeline_cost --disk DIR --json benchmarks/results/timeline_cost.json

Owns: both sessions, the turns they take, and the ratio. There is no option of the library that switches the timeline
off: `Silent` stands in for it here alone.
Does not: time single spans: a step is what users wait for.
Threads: the main thread, and the sessions'.

A run is STEPS_PER_RUN steps; before the next contender's turn it waits, untimed, until nothing is under way. Runs are
compared round by round, and the median of these ratios is reported (measure/rounds.py, Note [Ratios]). A third
contender, a second session that records, says what no difference at all looks like. All state is at home on the host:
a disk's own noise is ten times what is measured.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.measure.options import add_round_options
from benchmarks.measure.progress import make_round_progress
from benchmarks.measure.result import check_result_path, command_of, versions, write_result
from benchmarks.measure.rounds import Contender, quartiles_of, run_rounds
from offload.cli.gpt import GPT, config_for
from offload.concurrency.lanes import Lanes
from offload.concurrency.timeline import Timeline
from offload.config import make_config
from offload.enable import start
from offload.report.console import Console
from offload.report.results import machine_facts
from offload.session import Session

PARAMS: Final = 5_000_000
SEQ: Final = 64
BATCH: Final = 4
DEVICE_MEMORY: Final = "4MiB"
HOST_MEMORY: Final = "256MiB"
LIMIT: Final = 0.01
"""Of a step: what the timeline may cost."""
WARM_UP_ROUNDS: Final = 3
STEPS_PER_RUN: Final = 10
RECORDS, AGAIN, SILENT = "records", "records, too", "silent"


class Silent(Timeline):
    """Keeps nothing."""

    def add_work(self, lane: str, name: str, start_s: float, stop_s: float, num_bytes: int = 0) -> None:
        """Not kept."""

    def add_wait(self, lane: str, reason: str, start_s: float, stop_s: float) -> None:
        """Not kept."""

    @contextmanager
    def work(self, lane: str, name: str, num_bytes: int = 0) -> Iterator[None]:
        """The body alone."""
        yield

    def count(self, name: str, amount: int = 1) -> None:
        """Not kept."""


def begin(timeline: Timeline, folder: Path, seed: int) -> tuple[Session, Callable[[], float]]:
    """A session with weights on the host and state on disk, and one run of it: seconds of a step."""
    torch.manual_seed(seed)
    model = GPT(config_for(PARAMS, seq=SEQ))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    config = make_config(
        device_memory=DEVICE_MEMORY, host_memory=HOST_MEMORY, disk=folder, disk_space=None, precision="bf16",
        max_grad_norm=1.0, accumulate=1, wait_timeout_s=600.0,
    )  # fmt: skip
    session = start(model, optimizer, config, "cpu", lanes=Lanes(timeline, wait_timeout_s=600.0))
    text = torch.randint(0, 256, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(seed))

    def steps() -> float:
        start_s = time.perf_counter()
        for _ in range(STEPS_PER_RUN):
            model(text[:, :-1], text[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - start_s
        session.metrics()  # waits until nothing is under way; goes over all spans, which only a report needs
        return seconds / STEPS_PER_RUN

    return session, steps


def compare(samples: dict[str, list[float]], name: str) -> dict[str, Any]:
    """The ratio of this contender to the silent one, round by round."""
    ratios = [ours / silent for ours, silent in zip(samples[name], samples[SILENT], strict=True)]
    quartiles = quartiles_of(ratios)
    return {"median": statistics.median(ratios), "lower": quartiles.lower, "upper": quartiles.upper}


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description="Training steps with and without a timeline.")
    parser.add_argument("--disk", type=Path, required=True, help="folder for swap files")
    add_round_options(parser)
    options = parser.parse_args()
    check_result_path(options.json)
    facts = machine_facts()
    console = Console(sys.stderr if options.json == "-" else sys.stdout)
    timelines = {RECORDS: Timeline(), SILENT: Silent(), AGAIN: Timeline()}
    with ExitStack() as open_sessions:
        contenders = []
        for name, timeline in timelines.items():
            session, steps = begin(timeline, options.disk, options.seed)
            open_sessions.enter_context(session)
            contenders.append(Contender(name, name, steps))
        progress = open_sessions.enter_context(
            make_round_progress(console, WARM_UP_ROUNDS, options.rounds, len(contenders))
        )
        samples = run_rounds(contenders, options.rounds, progress, warm_up_rounds=WARM_UP_ROUNDS)
    ratios = {name: compare(samples, name) for name in (RECORDS, AGAIN)}
    medians = {name: statistics.median(seconds) for name, seconds in samples.items()}
    kept = ratios[RECORDS]["median"] - 1 <= LIMIT
    console.line(
        f"a step of {PARAMS / 1e6:.0f} M parameters: {medians[SILENT]:.4f} s without a timeline; with one "
        + ", again ".join(f"{100 * (ratio['median'] - 1):+.2f} %" for ratio in ratios.values())
        + f" (limit {100 * LIMIT:.0f} %: {'kept' if kept else 'not kept'})"
    )
    if options.json is not None:
        result = {
            "benchmark": "timeline cost",
            "command": f"python -m benchmarks.timeline_cost{command_of(sys.argv[1:]).removeprefix('offload')}",
            "machine": facts, "versions": versions(["torch", "numpy", "numba"]), "seed": options.seed, "params": PARAMS,
            "limit": LIMIT, "kept": kept, "ratio_to_silent": ratios, "median_s": medians, "samples_s": samples,
        }  # fmt: skip
        write_result(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
