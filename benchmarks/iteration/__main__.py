"""Whole training iterations beside plain torch, in blocks in turn; how costs grow with a model's blocks; first steps.

    python -m benchmarks.iteration --disk DIR --json benchmarks/results/iteration.json

Owns: what is measured and in which order, and the file of the result.
Does not: measure (each measurement is a process of worker.py) or compare (rows.py). A peer that is not installed, or
does not work, is a row that says so.
Threads: the main thread.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import offload
from benchmarks.commands.peers import Unavailable, find_deepspeed, worker_environment
from benchmarks.iteration.layouts import DEVICE, DISK_STATE, HOST, HOST_STATE, LAYOUTS
from benchmarks.iteration.rows import (
    CONTENDERS,
    Case,
    chart_of,
    compared,
    comparison_table,
    grown,
    growth_met,
    growth_table,
)
from benchmarks.iteration.subjects import subjects
from benchmarks.iteration.worker import DEEPSPEED, FSDP2, OURS
from benchmarks.measure.options import checked_threads
from benchmarks.measure.result import REPOSITORY, check_result_path, command_of, versions, write_result
from offload.cli.numbers import at_least_one, not_negative
from offload.config import Precision
from offload.errors import ConfigError, OffloadError
from offload.report.console import Console
from offload.report.results import STANDARD_OUTPUT, machine_facts

COUNTS: Final = (10, 100, 1000, 5000)
QUICK_COUNTS: Final = (3, 10)
TINY_NUMEL: Final = 12 * 64
"""Elements of a growing model's block: so few that no time goes into their bytes."""
FULL_NUMEL: Final = 12 * 2048
"""Of a block that is fetched by itself."""
BLOCK_S: Final = 0.7
QUICK_BLOCK_S: Final = 0.01
TIMEOUT_S: Final = 600.0
"""Of one process, which measures several layouts or numbers of blocks."""
PARTS: Final = ("compare", "grow", "first")
PEER_LAYOUTS: Final = {FSDP2: (HOST,), DEEPSPEED: (DEVICE, HOST_STATE, DISK_STATE)}


@dataclass(frozen=True)
class Bench:
    """One invocation: starts the processes."""

    options: argparse.Namespace
    deepspeed: Path | Unavailable
    console: Console

    def ask(self, kind: str, *, contender: str = OURS, kernels: str | None = None, **order: Any) -> "Answers":
        """All that one process answers. `kernels`: folder of compiled kernels."""
        python = Path(sys.executable)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.options.threads)}
        if contender == DEEPSPEED:
            if isinstance(self.deepspeed, Unavailable):
                return Answers([], self.deepspeed.reason)
            python, environment = self.deepspeed, worker_environment(self.deepspeed, self.options.threads)
            environment.pop("PYTHONSAFEPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
        environment |= {"OMP_WAIT_POLICY": "passive"} | ({"NUMBA_CACHE_DIR": kernels} if kernels else {})
        with tempfile.TemporaryDirectory(prefix="iteration-", dir=self.options.disk) as folder:
            answers = Path(folder) / "answers.jsonl"
            whole = order | {
                "kind": kind, "contender": contender, "disk": folder, "answers": str(answers),
                "seed": self.options.seed, "rounds": self.options.rounds, "threads": self.options.threads,
                "quick": self.options.quick, "block_s": QUICK_BLOCK_S if self.options.quick else BLOCK_S,
                "started_s": time.time(),
            }  # fmt: skip
            ended = run_to_end([str(python), "-m", "benchmarks.iteration.worker", json.dumps(whole)], environment)
            lines = answers.read_text(encoding="utf-8").splitlines() if answers.is_file() else []
            return Answers([json.loads(line) for line in lines], ended)


@dataclass(frozen=True, slots=True)
class Answers:
    """What a process measured, and why it measured no more."""

    found: list[dict[str, Any]]
    ended: str

    def get(self, key: str, value: Any) -> dict[str, Any]:
        """The measurement of this value; {"absent": why} where there is none."""
        fitting = [one for one in self.found if one[key] == value]
        return fitting[0] if fitting else {"absent": self.ended or "did not run"}


def run_to_end(command: Sequence[str], environment: dict[str, str]) -> str:
    """Runs it; in words why it ended where it failed."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, env=environment, cwd=REPOSITORY
        )
    except subprocess.TimeoutExpired:
        return f"no result in {TIMEOUT_S:.0f} s"
    if done.returncode:
        return f"ended with {done.returncode}: {last_words(done.stdout + done.stderr)}"
    return ""


def last_words(log: str) -> str:
    """The last line that names an error, else the last line."""
    lines = [line.strip() for line in log.strip().splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.partition(":")[0]]
    return (errors or lines or ["it said nothing"])[-1]


# --------------------------------------------------------------------------------------------------------- parts


def compare_all(bench: Bench) -> list[dict[str, Any]]:
    """Every model, precision, contender and layout; a table of each model and precision."""
    options = bench.options
    rows: list[dict[str, Any]] = []
    for subject in options.subjects:
        for precision in options.precisions:
            some = []
            for contender in options.contenders:
                layouts = [layout for layout in PEER_LAYOUTS.get(contender, LAYOUTS) if layout in options.layouts]
                answers = bench.ask(
                    "compare", contender=contender, subject=subject, precision=precision, layouts=layouts
                )
                for layout in layouts:
                    some.append(compared(Case(subject, precision, contender, layout), answers.get("layout", layout)))
            words = subjects(quick=options.quick)[subject].words
            bench.console.line(f"\n{words}, {precision}\n{comparison_table(some, 'train')}")
            bench.console.line(f"\nforward alone\n{comparison_table(some, 'forward')}")
            rows += some
    return rows


def grow_all(bench: Bench) -> list[dict[str, Any]]:
    """Every number of blocks, of nearly no elements and of enough to be fetched each by itself."""
    rows, counts = [], QUICK_COUNTS if bench.options.quick else COUNTS
    for layout in (DEVICE, HOST_STATE):
        for numel in (TINY_NUMEL, FULL_NUMEL):
            answers = bench.ask("grow", counts=counts, numel=numel, layout=layout, precision="fp32")
            rows += [grown(count, numel, layout, answers.get("count", count)) for count in counts]
    bench.console.line(f"\n{growth_table(rows)}")
    return rows


def first_steps(bench: Bench) -> dict[str, Any]:
    """Two processes with one folder of compiled kernels, empty for the first."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="kernels-", dir=bench.options.disk) as kernels:
        for name in ("cold", "warm"):
            precision = bench.options.precisions[-1]
            answers = bench.ask("first", kernels=kernels, subject="readme", precision=precision, layout=DISK_STATE)
            answer = found[name] = answers.get("layout", DISK_STATE)
            words = answer.get("absent") or "; ".join(f"{key} {answer[key]}" for key in answer if key.endswith("_s"))
            bench.console.line(f"first step, {name}: {words}")
    return found


# ---------------------------------------------------------------------------------------------------------- main


def default_precision() -> str:
    """What `enable` takes where nobody names one."""
    return str(inspect.signature(offload.enable).parameters["precision"].default)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add, names = parser.add_argument, list(subjects(quick=True))
    precisions = list(dict.fromkeys(["fp32", default_precision()]))
    add("--disk", type=Path, required=True, metavar="DIR", help="folder for swap files")
    add("--deepspeed-python", type=Path, metavar="PATH", help="Python with deepspeed and what this repository needs")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--subjects", nargs="+", choices=names, default=names, help="models (default: all)")
    add("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), help="default: all")
    add("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), help="homes (default: all)")
    add("--precisions", nargs="+", choices=list(map(str, Precision)), default=precisions, help="default: %(default)s")
    add("--rounds", type=at_least_one, default=5, metavar="N", help="of each comparison (default: %(default)s)")
    add("--quick", action="store_true", help="small models and short blocks: proves that all of it runs")
    add("--threads", type=at_least_one, metavar="N", help="of torch (default: all cores)")
    add("--seed", type=not_negative, default=0, metavar="N", help="of weights and batches (default: %(default)s)")
    add("--json", metavar="PATH", help="write the figures there, and a chart beside it (.svg)")
    options = parser.parse_args()
    options.threads = checked_threads(options.threads)
    if not options.disk.is_dir():
        raise ConfigError(f"--disk {options.disk} is not a folder; name one on the disk that shall hold the state.")
    check_result_path(options.json)
    return options


def main() -> int:
    """Run all, print tables, write the result."""
    options = parse()
    console = Console(sys.stderr if options.json == STANDARD_OUTPUT else sys.stdout)
    bench = Bench(options, find_deepspeed(options.deepspeed_python), console)
    result: dict[str, Any] = {
        "benchmark": "iteration",
        "command": f"python -m benchmarks.iteration{command_of(sys.argv[1:]).removeprefix('offload')}",
        "machine": machine_facts(),
        "versions": versions(("torch", "transformers", "numpy", "numba")),
        "default_precision": default_precision(),
        "seed": options.seed,
        "threads": options.threads,
        "rounds": options.rounds,
        "quick": options.quick,
    }
    rows = result["rows"] = compare_all(bench) if "compare" in options.parts else []
    if "grow" in options.parts:
        result["growth"] = grow_all(bench)
        result["growth_met"] = growth_met(result["growth"])
    if "first" in options.parts:
        result["first_step"] = first_steps(bench)
    if options.json is not None:
        title = f"Iterations beside plain torch on the CPU, {options.threads} threads"
        for file in write_result(options.json, result, chart_of(rows, title) if rows else None):
            console.line(f"wrote {file}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except OffloadError as error:
        Console(sys.stderr).line(f"{type(error).__name__}: {error}")
        raise SystemExit(2) from error
