"""Whole training iterations of one Llama: this library against DeepSpeed ZeRO-3 with its optimizer on disk.

    python -m benchmarks.step_vs_deepspeed --disk DIR --json benchmarks/results/step_vs_deepspeed.json
    python -m benchmarks.step_vs_deepspeed --disk DIR --precision fp32 --json PATH

Owns: the order of runs, DeepSpeed's settings that are tried, our budgets, and the file of the result.
Does not: train (each run is a fresh process of deepspeed_train_worker.py or offload_train_worker.py), or compare
(iteration_figures.py). A DeepSpeed that is not installed, or does not work, is a row that says so.
Threads: the main thread.

Note [Same memory]: the second row's budgets are DeepSpeed's peak while iterations were timed (lower than that of its
start), less what our first row held then beyond its own budgets: activations, and what torch keeps. Peaks:
iteration_figures.py, Note [Memory].
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.commands.peers import Unavailable, find_deepspeed, worker_environment
from benchmarks.iteration_figures import (
    DEEPSPEED,
    DISK,
    TARGETS,
    WORDS,
    Rows,
    chart_of,
    compared,
    figures_of,
    net_peak,
    table,
)
from benchmarks.measure.chart import format_value
from benchmarks.measure.options import checked_threads
from benchmarks.measure.result import REPOSITORY, check_result_path, command_of, versions, write_result
from benchmarks.measure.rounds import rotated
from offload.cli.numbers import at_least_one, not_negative
from offload.errors import ConfigError, OffloadError
from offload.planning.record import load_record
from offload.report.console import Console
from offload.report.results import STANDARD_OUTPUT, machine_facts
from offload.units import MIB, format_bytes

HERE: Final = Path(__file__).resolve().parent
RUN_TIMEOUT_S: Final = 900.0
"""DeepSpeed compiles its engines on first use: minutes on a busy machine."""

LAYERS: Final = 12
"""219.7 million parameters."""
TOKENS: Final = 16

ITEM_BYTES: Final = {"bf16": 2, "fp32": 4}
"""Of weights and gradients, by precision."""
DEVICE_BYTES: Final = {"bf16": 400 * MIB, "fp32": 800 * MIB}
"""Of the first row: three slots for weights, and three for gradients."""
HOST_BYTES: Final = {"bf16": 915 * MIB, "fp32": 1830 * MIB}
"""Of the first row: the weights, most gradients and the buffers that state streams through; no state fits."""
STATE_BYTES_PER_PARAMETER: Final = 12
"""fp32 master and moments."""
GRADIENT_SLOTS_BYTES: Final = 128 * MIB
"""In bf16, where all is resident on the device: what is left next to the homes."""
LEAST_HOST_BYTES: Final = 64 * MIB

# Its pipeline in both directions takes 12 buffers at least: three tiles, each of three state tensors and a gradient.
BUFFERS: Final = {
    "buffer_count": 12,
    "reduce_bucket_size": 33_000_000,
    "prefetch_bucket_size": 13_000_000,
}
SETTINGS: Final = (
    {"sub_group_size": 33_000_000, "block_size": MIB, "queue_depth": 32, "intra_op_parallelism": 1, **BUFFERS},
    {"sub_group_size": 33_000_000, "block_size": 8 * MIB, "queue_depth": 32, "intra_op_parallelism": 1, **BUFFERS},
    {"sub_group_size": 33_000_000, "block_size": 8 * MIB, "queue_depth": 32, "intra_op_parallelism": 4, **BUFFERS},
)
"""DeepSpeed's: from its own tuning range. Smaller sub-groups save no memory (its buffers have the size of the largest
parameter, 32.8 million elements), larger ones took more of it and longer."""
GRID_ITERATIONS: Final = 2
AS_QUICK: Final = 1.05
"""Two iterations do not tell settings apart that are nearer than this."""


class RunFailed(OffloadError):
    """A process ended with an error, or not in time."""


@dataclass(frozen=True)
class Bench:
    """One invocation: starts the processes."""

    options: argparse.Namespace
    deepspeed: Path | Unavailable
    console: Console

    def deepspeed_run(self, setting: dict[str, int], iterations: int) -> dict[str, Any]:
        """A process of DeepSpeed."""
        assert isinstance(self.deepspeed, Path)
        environment = worker_environment(self.deepspeed, self.options.threads)
        for name in ("PYTHONSAFEPATH", "PYTHONPATH"):  # it imports llama_loop from its own folder, nothing of ours
            environment.pop(name, None)
        return self._run(self.deepspeed, "deepspeed_train_worker.py", environment, iterations, {"setting": setting})

    def our_run(self, device_bytes: int, host_bytes: int) -> dict[str, Any]:
        """A process of ours."""
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.options.threads), "PYTHONPATH": path}
        budgets = {"device_bytes": device_bytes, "host_bytes": host_bytes}
        python = Path(sys.executable)
        return self._run(python, "offload_train_worker.py", environment, self.options.iterations, budgets)

    def _run(
        self, python: Path, script: str, environment: dict[str, str], iterations: int, more: dict[str, Any]
    ) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="step-vs-", dir=self.options.disk) as folder:
            answer = Path(folder) / "answer.json"
            order = {
                "threads": self.options.threads, "layers": LAYERS, "tokens": TOKENS, "seed": self.options.seed,
                "warm_up": self.options.warm_up, "iterations": iterations, "disk": folder, "answer": str(answer),
                "precision": self.options.precision,
            }  # fmt: skip
            try:
                done = subprocess.run(
                    [str(python), str(HERE / script), json.dumps(order | more)], capture_output=True, text=True,
                    check=False, timeout=RUN_TIMEOUT_S, env=environment | {"OMP_WAIT_POLICY": "passive"},
                )  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise RunFailed(f"{script} did not end in {RUN_TIMEOUT_S:.0f} s") from error
            if done.returncode != 0 or not answer.is_file():
                raise RunFailed(f"{script} ended with {done.returncode}: {last_words(done.stdout + done.stderr)}")
            found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return found

    def ran(self, name: str, run: dict[str, Any], words: str = "") -> None:
        """Tell of one run."""
        seconds, peak = statistics.fmean(run["iteration_s"]), net_peak(run, "peak_rss_bytes")
        self.console.line(f"{WORDS[name]:<32}{seconds:8.3f} s an iteration, peak {format_bytes(peak)}  {words}")


def last_words(log: str) -> str:
    """The last line that names an error, else the last line."""
    lines = [line.strip() for line in log.strip().splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.partition(":")[0]]
    return (errors or lines or ["it said nothing"])[-1]


# --------------------------------------------------------------------------------------------------------- runs


def try_settings(bench: Bench, settings: Sequence[dict[str, int]]) -> list[dict[str, Any]]:
    """Each of DeepSpeed's settings in a short run; one that fails says why."""
    tried = []
    for setting in settings:
        one: dict[str, Any] = {"setting": setting}
        try:
            run = bench.deepspeed_run(setting, GRID_ITERATIONS)
        except RunFailed as error:
            one["failed"] = str(error)
            bench.console.line(f"DeepSpeed with {setting}: {error}")
        else:
            one |= {
                "iteration_s": run["iteration_s"],
                "median_s": statistics.median(run["iteration_s"]),
                "peak_bytes": net_peak(run, "peak_rss_bytes"),
                "training_peak_bytes": net_peak(run, "training_peak_rss_bytes"),
            }
            words = ("sub_group_size", "block_size", "queue_depth", "intra_op_parallelism")
            bench.ran(DEEPSPEED, run, "tried: " + ", ".join(f"{word} {setting[word]:,}" for word in words))
        tried.append(one)
    return tried


def run_rounds(bench: Bench, setting: dict[str, int] | None, rows: Rows) -> None:
    """Each round runs each contender once; the first in an order in which each knows what it needs of the others."""
    for number in range(bench.options.rounds):
        for name in rotated(list(WORDS), number):
            if name in rows.absent:
                continue
            if name == DEEPSPEED and setting is not None:
                try:
                    run = bench.deepspeed_run(setting, bench.options.iterations)
                except RunFailed as error:
                    rows.lose_peer(f"installed, but it does not work: {error}")
                    continue
            elif name == DISK:
                precision = bench.options.precision
                run = bench.our_run(DEVICE_BYTES[precision], HOST_BYTES[precision])
                check_state_on_disk(run)
            else:
                run = bench.our_run(*same_memory(rows, bench.options.precision))
            rows.runs[name].append(run)
            bench.ran(name, run)


def check_state_on_disk(run: dict[str, Any]) -> None:
    """The first row is what it says. Raises ConfigError."""
    state = run["session"]["homes"]["state"]
    if state["host"] or state["device"]:
        raise ConfigError(f"the homes of the state are {state}, expected all of it on disk; lower HOST_BYTES.")


def same_memory(rows: Rows, precision: str) -> tuple[int, int]:
    """Device and host budgets; see Note [Same memory]."""
    theirs, ours = rows.runs[DEEPSPEED][0], rows.runs[DISK][0]
    held = sum(ours["session"]["peak_bytes"][tier] for tier in ("device", "host"))
    beyond = max(0, net_peak(ours, "training_peak_rss_bytes") - held)
    allowed = net_peak(theirs, "training_peak_rss_bytes") - beyond
    gradient_slots = GRADIENT_SLOTS_BYTES * ITEM_BYTES[precision] // 2
    whole = ours["parameters"] * (2 * ITEM_BYTES[precision] + STATE_BYTES_PER_PARAMETER)
    if whole + gradient_slots <= allowed - LEAST_HOST_BYTES:
        return allowed - LEAST_HOST_BYTES, LEAST_HOST_BYTES
    return DEVICE_BYTES[precision], allowed - DEVICE_BYTES[precision]


# --------------------------------------------------------------------------------------------------------- main


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--disk", type=Path, required=True, metavar="DIR", help="folder for the swap files of both")
    add("--deepspeed-python", type=Path, metavar="PATH", help="Python of an environment with deepspeed, transformers")
    add("--precision", choices=list(ITEM_BYTES), default="bf16", help="of both (default: %(default)s)")
    add("--rounds", type=at_least_one, default=3, metavar="N", help="processes of each (default: %(default)s)")
    add("--iterations", type=at_least_one, default=5, metavar="N", help="timed in each process (default: %(default)s)")
    add("--warm-up", type=at_least_one, default=2, metavar="N", help="iterations before (default: %(default)s)")
    add("--settings", type=at_least_one, default=len(SETTINGS), metavar="N", help="of DeepSpeed's that are tried")
    add("--threads", type=at_least_one, metavar="N", help="of torch in both (default: all cores)")
    add("--seed", type=not_negative, default=0, metavar="N", help="of weights and tokens (default: %(default)s)")
    add("--json", metavar="PATH", help="write the figures there, and a chart beside it (.svg)")
    options = parser.parse_args()
    options.threads = checked_threads(options.threads)
    if not options.disk.is_dir():
        raise ConfigError(f"--disk {options.disk} is not a folder; name one on the disk that shall hold the state.")
    check_result_path(options.json)
    return options


def best_of(worked: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The quickest setting; of those as quick as it, the one with the lowest peak, which is to their advantage."""
    limit_s = min(one["median_s"] for one in worked) * AS_QUICK
    quick = [one for one in worked if one["median_s"] <= limit_s]
    setting: dict[str, int] = min(quick, key=lambda one: one["peak_bytes"])["setting"]
    return setting


def find_setting(bench: Bench, rows: Rows) -> tuple[dict[str, int] | None, list[dict[str, Any]]]:
    """DeepSpeed's best setting and all that were tried; none where it cannot take part."""
    if isinstance(bench.deepspeed, Unavailable):
        rows.lose_peer(bench.deepspeed.reason)
        return None, []
    tried = try_settings(bench, SETTINGS[: bench.options.settings])
    worked = [one for one in tried if "median_s" in one]
    if worked:
        return best_of(worked), tried
    rows.lose_peer(f"installed, but it does not work: {tried[0]['failed']}")
    return None, tried


def main() -> int:
    """Run all, write the result, say which targets hold."""
    options = parse()
    console = Console(sys.stderr if options.json == STANDARD_OUTPUT else sys.stdout)
    bench, rows = Bench(options, find_deepspeed(options.deepspeed_python), console), Rows()
    record = load_record(options.disk)
    facts = {
        "benchmark": "step_vs_deepspeed",
        "command": f"python -m benchmarks.step_vs_deepspeed{command_of(sys.argv[1:]).removeprefix('offload')}",
        "machine": machine_facts(),
        "disk_record": asdict(record) if record is not None else None,
        "versions": versions(("torch", "transformers", "numpy", "numba")),
        "seeds": {"weights": options.seed, "tokens": options.seed},
        "model": {
            "kind": "LlamaForCausalLM",
            "layers": LAYERS,
            "batch": 1,
            "tokens": TOKENS,
            "dtype": options.precision,
        },
        "threads": options.threads,
        "warm_up_iterations": options.warm_up,
        "iterations": options.iterations,
        "rounds": options.rounds,
    }
    setting, tried = find_setting(bench, rows)
    run_rounds(bench, setting, rows)
    figures = figures_of(rows)
    result = compared(rows, figures)
    facts["model"]["parameters"] = rows.runs[DISK][0]["parameters"]
    facts["versions"] |= {f"{DEEPSPEED}_{k}": v for run in rows.runs[DEEPSPEED][:1] for k, v in run["versions"].items()}
    millions = facts["model"]["parameters"] / 1e6
    title = f"Llama of {millions:.0f} m parameters, {options.precision}, {TOKENS} tokens, on the CPU"
    console.line(f"\n{table(figures)}\n")
    for name in (*TARGETS, "peak_memory_share", "training_memory_share"):
        value = result[name]
        console.line(f"{name}: {'-' if value is None else format_value(value)}")
    console.line(f"losses: {result['losses']}")
    if options.json is not None:
        whole = facts | result | {"rows": figures, "deepspeed_setting": setting, "deepspeed_settings_tried": tried}
        for file in write_result(options.json, whole, chart_of(figures, title)):
            console.line(f"wrote {file}")
    sane = result["losses"]["finite"] and result["losses"]["falling"]
    return 0 if sane and all(good is not False for good in result["met"].values()) else 1


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except OffloadError as error:
        Console(sys.stderr).line(f"{type(error).__name__}: {error}")
        raise SystemExit(2) from error
