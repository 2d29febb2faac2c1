"""What a benchmark says of its samples: figures for the JSON, a table for people, a chart.

Owns: the rows, one for each contender, also for one that could not take part; the parts that all results have.
Does not: measure (rounds.py), know what is measured (commands/ and the programs) or write files (result.py).
Threads: the main thread.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.measure.chart import Bar, bar_chart, format_value
from benchmarks.measure.result import command_of, versions
from benchmarks.measure.rounds import WARM_UP_ROUNDS, Quartiles, Ratio, Samples, quartiles_of
from offload.report.console import format_table
from offload.report.results import machine_facts

GB: Final = 1e9


@dataclass(frozen=True, slots=True)
class Row:
    """One contender as it is shown."""

    name: str
    words: str
    group: str
    """Those that belong together have one colour."""
    num_bytes: float | None = None
    """Moved by one run."""
    absent: str = ""
    """Why it did not take part, where it did not."""


def describe_run(
    name: str, arguments: Sequence[str], seeds: Mapping[str, int], distributions: Iterable[str]
) -> dict[str, Any]:
    """The part of a result that is known before anything runs; the load of the machine is that of before the run."""
    return {
        "benchmark": name,
        "command": command_of(["bench", name, *arguments]),
        "machine": machine_facts(),
        "versions": versions(distributions),
        "seeds": dict(seeds),
        "warm_up_rounds": WARM_UP_ROUNDS,
    }


def figures_of(rows: Sequence[Row], samples: Samples) -> dict[str, dict[str, Any]]:
    """By contender: seconds and GB/s, or why it did not take part."""
    return {row.name: _figures(row, samples.get(row.name, ())) for row in rows}


def _figures(row: Row, seconds: Sequence[float]) -> dict[str, Any]:
    described: dict[str, Any] = {"words": row.words, "group": row.group}
    if not seconds:
        return {**described, "absent": row.absent}
    spread = quartiles_of(seconds)
    described |= {"median_s": spread.median, "lower_quartile_s": spread.lower, "upper_quartile_s": spread.upper}
    if row.num_bytes is not None:
        described |= {"bytes": row.num_bytes, "gb_per_s": row.num_bytes / spread.median / GB}
    return described


def ratio_figures(ratios: Mapping[str, Ratio], samples: Samples) -> dict[str, Any]:
    """`ratios`: see rounds.py, Note [Ratios]; None where a contender did not take part. `ratio_terms`: whose seconds
    are divided by whose."""
    return {
        "ratios": {name: ratio.median(samples) for name, ratio in ratios.items()},
        "ratio_terms": {name: ratio.terms(samples) for name, ratio in ratios.items()},
    }


def format_figures(rows: Sequence[Row], samples: Samples) -> str:
    """The table of all contenders; one that did not take part says why."""
    cells = []
    for row in rows:
        figures = _figures(row, samples.get(row.name, ()))
        if "median_s" not in figures:
            cells.append([row.words, "-", "-", "-"])
            continue
        lower, upper = (format_value(figures[f"{end}_quartile_s"] * 1e3) for end in ("lower", "upper"))
        speed = f"{figures['gb_per_s']:.1f}" if "gb_per_s" in figures else "-"
        cells.append([row.words, format_value(figures["median_s"] * 1e3), f"{lower} - {upper}", speed])
    absences = [f"{row.words}: {row.absent}" for row in rows if row.absent]
    return "\n".join([format_table(["", "ms", "quartiles", "GB/s"], cells), *absences])


def format_ratios(ratios: Mapping[str, Ratio], samples: Samples) -> str:
    """The table of all ratios, with the lowest and highest of a round."""
    cells = []
    for name, ratio in ratios.items():
        of_rounds, median = ratio.of_rounds(samples), ratio.median(samples)
        spread = f"{min(of_rounds):.3f} - {max(of_rounds):.3f}" if of_rounds else "-"
        cells.append([name, "-" if median is None else f"{median:.3f}", spread])
    return format_table(["ratio", "median", "of rounds"], cells)


def draw_figures(
    title: str, rows: Sequence[Row], samples: Samples, notes: Sequence[str], *, in_gb_per_s: bool = False
) -> str:
    """An SVG of the medians with quartiles as whiskers: of milliseconds, or of GB/s for rows that all have bytes."""
    bars = [_bar(row, quartiles_of(samples[row.name]), in_gb_per_s) for row in rows if samples.get(row.name)]
    absences = [f"{row.words}: {row.absent}" for row in rows if row.absent]
    axis = "GB/s, higher is better" if in_gb_per_s else "milliseconds, lower is better"
    return bar_chart(title, bars, axis=f"{axis} (median; whiskers: quartiles)", notes=[*notes, *absences])


def _bar(row: Row, seconds: Quartiles, in_gb_per_s: bool) -> Bar:
    if not in_gb_per_s:
        return Bar(row.words, seconds.median * 1e3, seconds.lower * 1e3, seconds.upper * 1e3, row.group)
    num_gb = (row.num_bytes or 0.0) / GB
    return Bar(row.words, num_gb / seconds.median, num_gb / seconds.upper, num_gb / seconds.lower, row.group)
