"""Whole training steps of a Llama on one accelerator: this library beside torch's, torchao's and DeepSpeed's.

    python -m benchmarks.gpu.compare --set 16k --disk DIR --json benchmarks/results/gpu_compare.json
    python -m benchmarks.gpu.compare --device cpu --params tiny --tokens 256 --set 16k --disk DIR --json out.json

Owns: the order of rows, one process each, the file that collects them over several calls, and the table.
Does not: train (row.py and its engines) or choose limits (rows.py).
Threads: the main thread.

A call ends in time: no row begins that `--minutes` leave no room for, and a row that takes longer than `--row-seconds`
is ended and says so. What ran before stays in the file; `--again` runs rows that are in it already.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.rows import ROWS, SETS, Row, order_for
from benchmarks.measure.chart import Bar, bar_chart
from benchmarks.measure.result import REPOSITORY, check_result_path, command_of, versions, write_result
from offload.errors import ConfigError, OffloadError
from offload.report.console import Console, format_table
from offload.report.results import machine_facts
from offload.units import GIB

HERE: Final = Path(__file__).resolve().parent
LEAST_SECONDS: Final = 90.0
"""Less than that is left of a call: no further row begins. One of 3 B needs about as much, and would only be ended."""
PEERS: Final = {"torchao": "torchao", "deepspeed": "deepspeed"}
"""Engines that need a distribution which may be absent."""
HEAD: Final = ("", "tokens", "tokens/s", "TFLOP/s", "s a step", "fwd/bwd/step s", "device GiB", "host GiB", "waited",
               "GB/s h2d/d2h", "of the link")  # fmt: skip


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--set", dest="sets", action="append", choices=SETS, help="rows of this set; again for more (default: all)")
    add("--row", dest="names", action="append", metavar="NAME", help="only this row; again for more")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--params", choices=["tiny", "1b", "3b", "7b"], help="instead of each row's own: a try on a small machine")
    add("--tokens", type=int, metavar="N", help="a step, instead of each row's own")
    add("--warm-up", type=int, default=2, metavar="N", help="steps before (default: %(default)s)")
    add("--steps", type=int, default=10, metavar="N", help="timed (default: %(default)s)")
    add("--seconds", type=float, default=25.0, metavar="S", help="no timed step begins later (default: %(default)s)")
    add("--row-seconds", type=float, default=150.0, metavar="S", help="a row's process at most (default: %(default)s)")
    add("--minutes", type=float, default=7.5, metavar="M", help="the whole call (default: %(default)s)")
    add("--deepspeed-python", type=Path, metavar="PATH")
    add("--torchao-python", type=Path, metavar="PATH")
    add("--disk", type=Path, required=True, metavar="DIR", help="for swap files of the rows that have some")
    add("--link", type=Path, metavar="PATH", help="result of link.py: the peaks that GB/s are compared with")
    add("--seed", type=int, default=0, metavar="N")
    add("--again", action="store_true", help="run rows that the file has already")
    add("--json", required=True, metavar="PATH", help="the file that collects the rows, and a chart beside it (.svg)")
    options = parser.parse_args()
    check_result_path(options.json)
    if not options.disk.is_dir():
        raise ConfigError(f"--disk {options.disk} is not a folder; name one for swap files.")
    return options


def chosen(options: argparse.Namespace) -> list[Row]:
    """The rows of this call, in order."""
    if options.names:
        known = {row.name: row for row in ROWS}
        unknown = [name for name in options.names if name not in known]
        if unknown:
            raise ConfigError(f"--row {unknown[0]!r} is no row; there are: {', '.join(known)}.")
        return [known[name] for name in options.names]
    return [row for row in ROWS if not options.sets or set(row.sets) & set(options.sets)]


def python_of(row: Row, options: argparse.Namespace) -> Path | str:
    """The interpreter for a row, or why there is none."""
    if row.engine not in PEERS:
        return Path(sys.executable)
    named = options.deepspeed_python if row.engine == "deepspeed" else options.torchao_python
    if named is not None:
        return Path(named) if named.is_file() else f"{named} is not a file"
    if importlib.util.find_spec(PEERS[row.engine]) is None:
        return f"not installed; pip install {PEERS[row.engine]}, or name --{row.engine}-python"
    return Path(sys.executable)


def run_row(row: Row, options: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """Figures, or why there are none."""
    python = python_of(row, options)
    order = order_for(row, device=options.device, params=options.params, tokens=options.tokens)
    told = {"words": row.words, "asked": order}
    if isinstance(python, str):
        return told | {"absent": python}
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    environment["PATH"] = os.pathsep.join([str(python.absolute().parent), environment.get("PATH", os.defpath)])
    if row.engine == "offload":
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), environment.get("PYTHONPATH", "")]))
    elif options.deepspeed_python is not None and row.engine == "deepspeed":
        environment.pop("PYTHONPATH", None)
    if options.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    with tempfile.TemporaryDirectory(prefix="compare-", dir=options.disk) as folder:
        answer = Path(folder) / "answer.json"
        order |= {"seed": options.seed, "warm_up": options.warm_up, "steps": options.steps,
                  "seconds": options.seconds, "disk": folder, "answer": str(answer)}  # fmt: skip
        command = [str(python), str(HERE / "row.py"), json.dumps(order)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=limit_s, env=environment
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return told | {"absent": f"did not end in {limit_s:.0f} s"}
        told["asked"] = {key: value for key, value in order.items() if key not in ("disk", "answer")}
        if not answer.is_file():
            return told | {"absent": f"ended with {done.returncode}: {last_words(done.stdout + done.stderr)}"}
        return told | json.loads(answer.read_text(encoding="utf-8"))


def last_words(log: str) -> str:
    """The last line that names an error, else the last line."""
    lines = [line.strip() for line in log.strip().splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.partition(":")[0] or "out of memory" in line]
    return (errors or lines or ["it said nothing"])[-1][:300]


# -------------------------------------------------------------------------------------------------------- figures


def rates(found: dict[str, Any], peaks: dict[str, float]) -> tuple[str, str]:
    """GB/s of both directions while they were busy, and as shares of what the link was measured to do."""
    engine = found.get("engine") or {}
    if "bytes_moved" not in engine:
        return "-", "-"
    both = {
        lane: engine["bytes_moved"][lane] / engine["busy_s"][lane] / 1e9
        for lane in ("h2d", "d2h")
        if engine["busy_s"].get(lane)
    }
    shares = [f"{rate / peaks[lane]:.0%}" if peaks.get(lane) else "-" for lane, rate in both.items()]
    return " / ".join(f"{rate:.1f}" for rate in both.values()) or "-", " / ".join(shares) or "-"


def waited_share(found: dict[str, Any]) -> str:
    """Of the timed seconds, how many compute stood still."""
    engine = found.get("engine") or {}
    if "waited_s" not in engine:
        return "-"
    return f"{engine['waited_s'] / (found['step_s'] * len(found['host_step_s'])):.1%}"


def cells(name: str, found: dict[str, Any], peaks: dict[str, float]) -> list[str]:
    """One line of the table."""
    if "absent" in found:
        return [f"{found['words']} ({name})", str(found["asked"]["tokens"]), *["-"] * (len(HEAD) - 2)]
    device = found.get("peak_device_reserved_bytes")
    phases = "/".join(f"{found['phases_s'][phase]:.2f}" for phase in ("forward", "backward", "step"))
    return [
        f"{found['words']} ({name})", str(found["asked"]["tokens"]), f"{found['tokens_per_s']:.0f}",
        f"{found['model_flops_per_s'] / 1e12:.1f}", f"{found['step_s']:.3f}", phases,
        f"{device / GIB:.1f}" if device else "-", f"{found['peak_host_bytes'] / GIB:.1f}", waited_share(found),
        *rates(found, peaks),
    ]  # fmt: skip


def chart(rows: dict[str, Any]) -> str:
    """Tokens per second as bars."""
    ran = {name: found for name, found in rows.items() if "absent" not in found}
    bars = [
        Bar(
            f"{found['words']}, {found['asked']['params']}, {found['asked']['tokens']} tokens",
            *[found["tokens_per_s"]] * 3,
            "offload" if found["asked"]["engine"] == "offload" else "others",
        )
        for found in ran.values()
    ]
    notes = [f"{found['words']} ({name}): {found['absent']}" for name, found in rows.items() if "absent" in found]
    return bar_chart("Training steps by tokens a second", bars, axis="tokens/s, higher is better", notes=notes)


def main() -> int:
    """Run rows, write after each, show the table."""
    options = parse()
    console = Console(sys.stdout)
    begin_s = time.monotonic()
    path = Path(options.json)
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"rows": {}, "commands": []}
    result |= {"benchmark": "gpu_compare", "machine": machine_facts(), "device": options.device,
               "versions": versions(("torch", "transformers", "numpy", "numba"))}  # fmt: skip
    command = command_of(sys.argv[1:]).removeprefix("offload")
    result["commands"].append(f"python -m benchmarks.gpu.compare{command}")
    if options.link is not None:
        result["link_gb_per_s"] = json.loads(options.link.read_text())["plain_gb_per_s"]
    skipped = []
    for row in chosen(options):
        if row.name in result["rows"] and "absent" not in result["rows"][row.name] and not options.again:
            continue
        left_s = options.minutes * 60 - (time.monotonic() - begin_s)
        if left_s < LEAST_SECONDS:
            skipped.append(row.name)
            continue
        found = run_row(row, options, min(options.row_seconds, left_s))
        result["rows"][row.name] = found
        console.line(f"{row.name}: {found.get('absent') or format(found['tokens_per_s'], '.0f') + ' tokens/s'}")
        write_result(options.json, result, chart(result["rows"]))
    peaks = result.get("link_gb_per_s", {})
    lines = [cells(name, found, peaks) for name, found in result["rows"].items()]
    console.line("\n" + format_table(list(HEAD), lines))
    if skipped:
        console.line(f"no time was left for: {', '.join(skipped)}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except OffloadError as error:
        Console(sys.stderr).line(f"{type(error).__name__}: {error}")
        raise SystemExit(2) from error
