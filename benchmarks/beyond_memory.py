"""Train a model whose weights, gradients and state exceed this machine's physical memory.

    python -m benchmarks.beyond_memory --disk DIR --json benchmarks/results/beyond_memory.json

Owns: the size that is beyond this machine, the check of the disk, the share of the disk's rate in the result.
Does not: train: `offload train` does, in a process of its own whose progress is shown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Final, TextIO

import psutil

from benchmarks.measure.chart import Bar, bar_chart
from benchmarks.measure.result import check_result_path, command_of, versions, write_result
from offload.cli.disk_file import UNIT_BYTES, DiskFile, Setting
from offload.cli.gpt import config_for, parse_count
from offload.errors import ConfigError, DiskFullError
from offload.planning.hardware import free_disk_bytes
from offload.report.console import Console
from offload.report.results import machine_facts
from offload.units import GIB, MIB, format_bytes, round_up

BYTES_PER_PARAMETER: Final = 2 + 2 + 10
"""bf16 weights and gradients; the rest of a split master and two fp32 moments."""
BEYOND: Final = 1.05
"""By how much the model exceeds the memory of a machine for which 2 billion parameters are too few."""
SMALLEST: Final = 2_000_000_000
SEQ: Final = 128
LR: Final = "1e-5"
"""Small: there is no warm-up in three steps."""
SPARE_DISK_BYTES: Final = 4 * GIB
DISK_RUNS: Final = 5
SETTING: Final = Setting(8 * MIB, 8)
LANES: Final = ("read", "write", "h2d", "d2h")


def size_beyond(total_bytes: int) -> int:
    """Parameters whose bytes exceed `total_bytes` of memory."""
    return max(SMALLEST, int(BEYOND * total_bytes / BYTES_PER_PARAMETER))


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Raises DiskFullError, or ConfigError for what is no folder."""
    if not folder.is_dir():
        raise ConfigError(
            f"--disk {folder} is not a folder; name one on a disk with {format_bytes(needed_bytes)} free."
        )
    free = free_disk_bytes([folder])
    if free < needed_bytes:
        raise DiskFullError(
            f"{folder}: the swap files need {format_bytes(needed_bytes)}, free are {format_bytes(free)}; free some, "
            "name another --disk, or give fewer --params (then the model may fit this machine's memory)."
        )


def mixed_rates(folder: Path, console: Console) -> list[float]:
    """Bytes a second of reads and writes one to one, run by run, through the product's queue."""
    num_bytes = round_up(1 * GIB, UNIT_BYTES)
    with DiskFile(folder, num_bytes, SETTING, 0) as disk:
        disk.run("write", SETTING, num_bytes)
        rates = [num_bytes / disk.run("mixed", SETTING, num_bytes) for _ in range(DISK_RUNS)]
    console.line(f"the disk moves {statistics.median(rates) / 1e9:.2f} GB/s of reads and writes, one to one")
    return rates


def train(options: argparse.Namespace, num_parameters: int, console: Console) -> dict[str, Any]:
    """The run, in a process of its own in the background; its progress is passed on. Returns its figures."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        command = [
            sys.executable, "-m", "offload", "train", "--params", str(num_parameters), "--precision", "bf16",
            "--batch", "1", "--seq", str(SEQ), "--steps", str(options.steps), "--device-memory", options.device_memory,
            "--host-memory", options.host_memory, "--disk", str(options.disk), "--json", str(out),
            "--lr", LR,
        ]  # fmt: skip
        if options.text is not None:
            command += ["--text", str(options.text)]
        environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )  # fmt: skip
        if process.stdout is None:
            raise SystemExit("the output of the training process is no pipe; please report it")
        reader = threading.Thread(target=_pass_on, args=(process.stdout, console))
        reader.start()
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            reader.join()
        if code:
            raise SystemExit(f"training ended with exit code {code}")
        figures: dict[str, Any] = json.loads(out.read_text())
        return figures


def _pass_on(lines: TextIO, console: Console) -> None:
    for line in lines:
        console.line(line.rstrip())


def summary(figures: dict[str, Any], rates: list[float], steps: int) -> dict[str, Any]:
    """Bytes by lane, seconds of a step, and the share of the disk's rate that training reached."""
    moved = {lane: figures["bytes_moved"][lane] for lane in LANES}
    step_s = figures["seconds_per_step"]
    on_disk = (moved["read"] + moved["write"]) / steps
    rate = on_disk / statistics.median(step_s)
    return {
        "step_s": step_s,
        "bytes_by_lane": moved,
        "bytes_on_disk_per_step": on_disk,
        "disk_rate_while_training": rate,
        "disk_rate_mixed": rates,
        "share_of_disk_rate": rate / statistics.median(rates),
    }


def main() -> int:
    """Check, measure the disk, train, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--disk", type=Path, required=True, metavar="DIR")
    add("--params", help="default: as many as exceed this machine's memory, 2b or more")
    add("--steps", type=int, default=3)
    add("--host-memory", default="6GiB")
    add("--device-memory", default="1GiB", help="of the CPU, which computes: slots for weights and gradients in use")
    add("--text", type=Path, help="file or folder (default: Python's standard library)")
    add("--json", required=True, metavar="PATH")
    options = parser.parse_args()
    check_result_path(options.json)
    console = Console(sys.stdout)
    total = int(psutil.virtual_memory().total)
    asked = parse_count(options.params) if options.params else size_beyond(total)
    num_parameters = config_for(asked, seq=SEQ).num_parameters
    needed = num_parameters * BYTES_PER_PARAMETER
    check_disk(options.disk, needed + SPARE_DISK_BYTES)
    console.line(
        f"{num_parameters:,} parameters: {format_bytes(needed)} of weights, gradients and state; this machine has "
        f"{format_bytes(total)} of memory, of which {options.host_memory} + {options.device_memory} may be used"
    )
    result = {
        "machine": machine_facts(),
        "versions": versions(("torch", "numpy", "numba")),
        "command": command_of(sys.argv[1:]).replace("offload ", "python -m benchmarks.beyond_memory ", 1),
        "bytes_of_model": needed,
        "memory_bytes": total,
        "exceeds_memory": needed > total,
    }
    rates = mixed_rates(options.disk, console)
    figures = train(options, asked, console)
    result |= {"run": figures} | summary(figures, rates, options.steps)
    bars = [Bar(lane, moved / 1e9, moved / 1e9, moved / 1e9, "bytes moved") for lane, moved in
            result["bytes_by_lane"].items()]  # fmt: skip
    title = f"{num_parameters:,} parameters on {format_bytes(total)} of memory, {options.steps} steps"
    write_result(options.json, result, bar_chart(title, bars, axis="GB by lane, over all steps"))
    share = result["share_of_disk_rate"]
    console.line(f"{statistics.median(result['step_s']):.1f} s a step; the disk at {share:.0%} of its rate")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (ConfigError, DiskFullError) as error:
        raise SystemExit(f"beyond_memory: {error}") from error
