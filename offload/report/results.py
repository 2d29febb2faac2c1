"""Files of results: JSON, and the chart beside it.

Owns: what every result says of the machine, the versions and the command; where its files lie.
Does not: measure, or know what a benchmark's own figures mean (cli/).
Threads: the main thread.

A result can be published: it names no host, no user and no path outside the repository.
"""

import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psutil

from offload.errors import ConfigError
from offload.planning.hardware import free_host_bytes, training_threads
from offload.report.console import Console

STANDARD_OUTPUT: Final = "-"
DISTRIBUTION: Final = "offload-runtime"
REPOSITORY: Final = Path(__file__).resolve().parents[2]

CPUINFO: Final = Path("/proc/cpuinfo")
HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NODES: Final = Path("/sys/devices/system/node")

VECTOR_FLAGS: Final = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "asimd", "asimdhp", "sve")
"""Of the many features of a CPU those that decide how kernels are compiled."""
ENVIRONMENT: Final = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "NUMBA_CPU_NAME", "MALLOC_CONF")
"""Variables that change how fast CPU threads and kernels are."""


def machine_facts() -> dict[str, Any]:
    """What the figures depend on: CPU, cores, memory, pages, kernel, load before the run."""
    return {
        "cpu": cpu_name(_text(CPUINFO)) or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "vector_features": vector_features(_text(CPUINFO)),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "training_threads": training_threads(),
        "numa_nodes": len(list(NODES.glob("node[0-9]*"))),
        "memory_bytes": int(psutil.virtual_memory().total),
        "free_memory_bytes": free_host_bytes(),
        "huge_pages": _text(HUGE_PAGES).strip(),
        "system": f"{platform.system()} {platform.release()}",
        "load_average_1m": os.getloadavg()[0],
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def cpu_name(cpuinfo: str) -> str:
    """The name of the first CPU of /proc/cpuinfo, with family and model where it has them; empty where it has none."""
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", cpuinfo.partition("\n\n")[0], re.MULTILINE))
    numbers = ", ".join(f"{key.removeprefix('cpu ')} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    name = fields.get("model name", "")
    return f"{name} ({numbers})" if name and numbers else name


def vector_features(cpuinfo: str) -> list[str]:
    """Those of `VECTOR_FLAGS` that the first CPU of /proc/cpuinfo has."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = set(match.group(1).split()) if match else set()
    return [flag for flag in VECTOR_FLAGS if flag in flags]


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of Python, of this package and of the distributions named; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in (DISTRIBUTION, *distributions):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # this package run from a checkout, or an optional one
    return found


def command_of(arguments: Sequence[str], repository: Path = REPOSITORY) -> str:
    """The command line with paths relative to the repository; of paths outside it the last part alone."""
    return " ".join(["offload", *(_shown(argument, repository) for argument in arguments)])


def check_result_path(path: str | None) -> None:
    """A path that cannot be written is told before any work. Raises ConfigError."""
    if path is None or path == STANDARD_OUTPUT:
        return
    file = Path(path)
    if file.is_dir() or not file.parent.is_dir():
        raise ConfigError(f"--json {path} cannot be written; name a file in a folder that exists, or -.")
    if file.suffix == ".svg":
        raise ConfigError(f"--json {path}: the chart is written there; name a file that ends in .json.")


def write_result(path: str, result: Mapping[str, Any], svg: str | None = None) -> list[Path]:
    """Write the JSON, and a chart of the same name beside it; returns the files. `-` is standard output, no chart."""
    text = json.dumps(result, indent=2)
    if path == STANDARD_OUTPUT:
        Console(sys.stdout).line(text)
        return []
    file = Path(path)
    file.write_text(f"{text}\n", encoding="utf-8")
    if svg is None:
        return [file]
    chart = file.with_suffix(".svg")
    chart.write_text(svg, encoding="utf-8")
    return [file, chart]


def _shown(argument: str, repository: Path) -> str:
    option, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(os.path.normpath(value))  # not resolved: the interpreter of an environment is a link out of it
    if not path.is_absolute():
        return argument
    inside = path.is_relative_to(repository)
    return f"{option}{equals}{path.relative_to(repository) if inside else f'.../{path.name}'}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
