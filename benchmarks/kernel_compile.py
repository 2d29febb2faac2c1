"""How long each kernel takes to compile, and to load once it is cached.

    python -m benchmarks.kernel_compile --json benchmarks/results/kernel_compile.json

Owns: the list of kernels, a process of its own for each round, and the table.
Does not: run kernels. What numba and LLVM need once in a process is paid by a kernel that does not count.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, Final

from benchmarks.measure.chart import Bar, bar_chart
from benchmarks.measure.result import REPOSITORY, check_result_path, versions, write_result
from offload.kernels import adagrad, adam, cast, checksum, lion, master_copy, mean, moments, reduce, sgd, split
from offload.report.console import Console, format_table
from offload.report.results import machine_facts

LIMIT_S: Final = 2.0
ROUNDS: Final = 3


def kernels() -> dict[str, Callable[[], Any]]:
    """Factories by name: one of each kind, and all forms of the Adam step that a bf16 run may use."""
    named: dict[str, Callable[[], Any]] = {
        "adam fp32": lambda: adam.step_kernel("fp32", "fp32"),
        "adam bf16": lambda: adam.step_kernel("bf16", "bf16"),
        "adam fp16": lambda: adam.step_kernel("fp16", "fp16"),
        "adam bf16, split master": lambda: adam.step_kernel("bf16", "bf16", master="split"),
        "adam bf16, fp32 gradient": lambda: adam.step_kernel("fp32", "bf16"),
        "adam amsgrad": lambda: adam.step_kernel("bf16", "bf16", amsgrad=True),
        "adam bf16 state": lambda: adam.step_kernel("bf16", "bf16", state="bf16"),
        "adam 8-bit state": lambda: adam.step_kernel("bf16", "bf16", state="8bit"),
        "adam 8-bit state, split master": lambda: adam.step_kernel("bf16", "bf16", master="split", state="8bit"),
        "lion": lambda: lion.step_kernel("bf16", "bf16"),
        "sgd": lambda: sgd.step_kernel("bf16", "bf16"),
        "adagrad": lambda: adagrad.step_kernel("bf16", "bf16"),
        "store": lambda: reduce.store_kernel("bf16", "fp32", False),
        "store, adding": lambda: reduce.store_kernel("bf16", "fp32", True),
        "square sums": lambda: reduce.square_sums_kernel("bf16"),
        "cast": lambda: cast.cast_kernel("fp32", "bf16"),
        "copy of masters": lambda: master_copy.copy_kernel("bf16"),
        "split": split.split_kernel,
        "join": split.join_kernel,
        "8-bit encode": lambda: moments.encode_kernel("signed"),
        "8-bit decode": lambda: moments.decode_kernel("signed"),
        "mean over ranks": lambda: mean.mean_of_shards_kernel("bf16"),
        "checksum": checksum.checksum_kernel,
    }
    return named


def measure() -> dict[str, float]:
    """Seconds for each, in this process."""
    cast.cast_kernel("fp16", "fp32")
    seconds = {}
    for name, make in kernels().items():
        start_s = time.perf_counter()
        make()
        seconds[name] = time.perf_counter() - start_s
    return seconds


def main() -> int:
    """Rounds of a first and a second process with one empty cache; 1 where a kernel takes longer than the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", default=None)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    console = Console(sys.stdout)
    if options.measure:
        console.line(json.dumps(measure()))
        return 0
    check_result_path(options.json)
    samples: dict[str, list[dict[str, float]]] = {"compile_s": [], "load_s": []}
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            for kind in samples:
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.kernel_compile", "--measure"], cwd=REPOSITORY, check=True,
                    capture_output=True, text=True, env=os.environ | {"NUMBA_CACHE_DIR": folder},
                )  # fmt: skip
                samples[kind].append(json.loads(done.stdout))
    medians = {
        kind: {name: statistics.median(one[name] for one in runs) for name in runs[0]} for kind, runs in samples.items()
    }
    compile_s, load_s = medians["compile_s"], medians["load_s"]
    rows = [[name, f"{compile_s[name]:.2f}", f"{load_s[name]:.3f}"] for name in compile_s]
    console.line(format_table(["kernel", "compile s", "load s"], rows))
    longest = max(compile_s, key=lambda name: compile_s[name])
    console.line(f"\nlongest: {longest}, {compile_s[longest]:.2f} s (limit {LIMIT_S:g} s)")
    if options.json:
        result = {
            "machine": machine_facts(),
            "versions": versions(("numpy", "numba")),
            "command": "python -m benchmarks.kernel_compile --json benchmarks/results/kernel_compile.json",
            "rounds": ROUNDS,
            "limit_s": LIMIT_S,
            "longest_s": compile_s[longest],
            **medians,
            "samples": samples,
        }
        spread = {name: [run[name] for run in samples["compile_s"]] for name in compile_s}
        bars = [Bar(name, compile_s[name], min(all_s), max(all_s), "first") for name, all_s in spread.items()]
        write_result(options.json, result, bar_chart("First compile of each kernel", bars, axis="seconds"))
    return 0 if compile_s[longest] <= LIMIT_S else 1


if __name__ == "__main__":
    raise SystemExit(main())
