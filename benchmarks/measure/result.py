"""Files of a benchmark's results: JSON, and the chart beside it.

Owns: what a result says of versions and of the command; where its files lie.
Does not: measure, or know what a benchmark's own figures mean.
Threads: the main thread.

A result can be published: it names no host, no user and no path outside the repository.
"""

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from offload.errors import ConfigError
from offload.report import results
from offload.report.results import STANDARD_OUTPUT

DISTRIBUTION: Final = "offload-runtime"
REPOSITORY: Final = Path(__file__).resolve().parents[2]


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
    results.check_result_path(path)
    if path is not None and Path(path).suffix == ".svg":
        raise ConfigError(f"--json {path}: the chart is written there; name a file that ends in .json.")


def write_result(path: str, result: Mapping[str, Any], svg: str | None = None) -> list[Path]:
    """Write the JSON, and a chart of the same name beside it; returns the files. `-` is standard output, no chart."""
    files = results.write_result(path, result)
    if svg is None or path == STANDARD_OUTPUT:
        return files
    chart = Path(path).with_suffix(".svg")
    chart.write_text(svg, encoding="utf-8")
    return [*files, chart]


def _shown(argument: str, repository: Path) -> str:
    option, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(os.path.normpath(value))  # not resolved: the interpreter of an environment is a link out of it
    if not path.is_absolute():
        return argument
    inside = path.is_relative_to(repository)
    return f"{option}{equals}{path.relative_to(repository) if inside else f'.../{path.name}'}"
