"""Files of results: JSON.

Owns: what a result says of the machine; how its numbers are laid out.
Does not: measure, or know what the figures mean (cli/).
Threads: the main thread.

A result can be published: it names no host and no user.
"""

import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import psutil

from offload.errors import ConfigError
from offload.planning.hardware import free_host_bytes, training_threads
from offload.report.console import Console

STANDARD_OUTPUT: Final = "-"
LINE_CHARACTERS: Final = 160
"""Of JSON on one line, without its name and a comma."""

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


def check_result_path(path: str | None) -> None:
    """A path that cannot be written is told before any work. Raises ConfigError."""
    if path is None or path == STANDARD_OUTPUT:
        return
    file = Path(path)
    if file.is_dir() or not file.parent.is_dir():
        raise ConfigError(f"--json {path} cannot be written; name a file in a folder that exists, or -.")


def write_result(path: str, result: Mapping[str, Any]) -> list[Path]:
    """Write the JSON; returns the files. `-` is standard output."""
    text = as_json(json.loads(json.dumps(result)))
    if path == STANDARD_OUTPUT:
        Console(sys.stdout).line(text)
        return []
    file = Path(path)
    file.write_text(f"{text}\n", encoding="utf-8")
    return [file]


def as_json(value: Any, indent: str = "") -> str:
    """The text of what JSON has read: a list of numbers is one line, and so is whatever else fits one."""
    one_line = json.dumps(value)
    is_row = isinstance(value, list) and all(isinstance(entry, int | float) for entry in value)
    if not isinstance(value, dict | list) or is_row or len(indent) + len(one_line) <= LINE_CHARACTERS:
        return one_line
    inner = indent + "  "
    names = [f"{json.dumps(name)}: " for name in value] if isinstance(value, dict) else [""] * len(value)
    entries = value.values() if isinstance(value, dict) else value
    lines = ",\n".join(f"{inner}{name}{as_json(entry, inner)}" for name, entry in zip(names, entries, strict=True))
    return f"{one_line[0]}\n{lines}\n{indent}{one_line[-1]}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
