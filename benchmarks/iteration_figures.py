"""Figures of whole iterations: rows for people, ratios and shares for the JSON, a chart.

Owns: what is compared in step_vs_deepspeed.py, the targets, and what a row of an absent peer says.
Does not: run anything.
Threads: the main thread.

Note [Memory]: peaks are of resident memory (VmHWM) less what the process held before it made its model: imports, which
both report. `peak_memory_share` compares the peaks of whole runs, `training_memory_share` those while iterations were
timed; the target must hold for both. The device of both is the CPU, so that our device budget is host memory, too.
"""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks.measure.chart import Bar, bar_chart
from benchmarks.measure.rounds import Ratio, quartiles_of
from offload.report.console import format_table
from offload.units import format_bytes

DEEPSPEED: Final = "deepspeed"
DISK: Final = "offload_disk"
SAME_MEMORY: Final = "offload_same_memory"
WORDS: Final = {
    DEEPSPEED: "DeepSpeed ZeRO-3, state on disk",
    DISK: "offload, all state on disk",
    SAME_MEMORY: "offload, memory as DeepSpeed",
}
TARGETS: Final = {"vs_deepspeed_disk": 1.4, "vs_deepspeed_same_memory": 2.0}
MEMORY_SHARE_TARGET: Final = 0.5
RATIOS: Final = {
    "vs_deepspeed_disk": Ratio((DEEPSPEED,), DISK),
    "vs_deepspeed_same_memory": Ratio((DEEPSPEED,), SAME_MEMORY),
}


@dataclass
class Rows:
    """What every run of every contender answered, and why one is absent."""

    runs: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in WORDS})
    absent: dict[str, str] = field(default_factory=dict)

    def lose_peer(self, reason: str) -> None:
        """DeepSpeed takes no part, and so does not the row that needs to know its memory."""
        self.absent = {DEEPSPEED: reason, SAME_MEMORY: "without DeepSpeed there is no memory to be given"}
        for name in self.absent:
            self.runs[name].clear()

    @property
    def samples(self) -> dict[str, list[float]]:
        """Seconds per iteration of every round."""
        return {name: [statistics.fmean(run["iteration_s"]) for run in runs] for name, runs in self.runs.items()}


def net_peak(run: dict[str, Any], name: str) -> int:
    """See Note [Memory]."""
    return int(run[name]) - int(run["baseline_rss_bytes"])


def figures_of(rows: Rows) -> dict[str, dict[str, Any]]:
    """By contender: seconds, memory, losses and every sample; or why it is absent."""
    figures: dict[str, dict[str, Any]] = {}
    for name, runs in rows.runs.items():
        figures[name] = {"words": WORDS[name]}
        if not runs:
            figures[name]["absent"] = rows.absent.get(name, "did not run")
            continue
        spread = quartiles_of([seconds for run in runs for seconds in run["iteration_s"]])
        figures[name] |= {
            "iteration_s": statistics.median(rows.samples[name]),
            "iteration_quartiles_s": [spread.lower, spread.median, spread.upper],
            "peak_bytes": max(net_peak(run, "peak_rss_bytes") for run in runs),
            "training_peak_bytes": max(net_peak(run, "training_peak_rss_bytes") for run in runs),
            "baseline_bytes": statistics.median(run["baseline_rss_bytes"] for run in runs),
            "samples": {"iteration_s": [run["iteration_s"] for run in runs], "losses": [run["losses"] for run in runs]},
            "rounds": [{key: run[key] for key in run if key not in ("iteration_s", "losses")} for run in runs],
        }
    return figures


def compared(rows: Rows, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ratios of seconds and shares of memory; None where one of the two did not run."""
    result: dict[str, Any] = {name: ratio.median(rows.samples) for name, ratio in RATIOS.items()}
    result["of_rounds"] = {name: ratio.of_rounds(rows.samples) for name, ratio in RATIOS.items()}
    both = "absent" not in figures[DEEPSPEED]
    for share, peak in (("peak_memory_share", "peak_bytes"), ("training_memory_share", "training_peak_bytes")):
        result[share] = figures[DISK][peak] / figures[DEEPSPEED][peak] if both else None
        result[f"same_memory_{share}"] = figures[SAME_MEMORY][peak] / figures[DEEPSPEED][peak] if both else None
    result["targets"] = TARGETS | {"peak_memory_share": MEMORY_SHARE_TARGET}
    met: dict[str, bool | None] = {name: result[name] >= TARGETS[name] if both else None for name in TARGETS}
    shares = [result["peak_memory_share"], result["training_memory_share"]] if both else []
    met["peak_memory_share"] = max(shares) <= MEMORY_SHARE_TARGET if both else None
    result["met"] = met
    result["losses"] = sane_losses(rows)
    return result


def sane_losses(rows: Rows) -> dict[str, Any]:
    """Whether all are finite and fall, and how far ours are from DeepSpeed's at the same iteration."""
    losses = {name: runs[0]["losses"] for name, runs in rows.runs.items() if runs}
    everything = [run["losses"] for runs in rows.runs.values() for run in runs]
    found: dict[str, Any] = {
        "finite": all(math.isfinite(loss) for run in everything for loss in run),
        "falling": all(run[-1] < run[0] for run in everything),
        "ours_same_on_all_homes": losses[SAME_MEMORY] == losses[DISK] if SAME_MEMORY in losses else None,
    }
    if DEEPSPEED in losses:
        pairs = zip(losses[DISK], losses[DEEPSPEED], strict=True)
        found["largest_difference_to_deepspeed"] = max(abs(ours - theirs) for ours, theirs in pairs)
    return found


def table(figures: dict[str, dict[str, Any]]) -> str:
    """For people."""
    cells = []
    for row in figures.values():
        if "absent" in row:
            cells.append([row["words"], "-", "-", "-", "-"])
            continue
        lower, _, upper = row["iteration_quartiles_s"]
        peaks = [format_bytes(row[name]) for name in ("peak_bytes", "training_peak_bytes")]
        cells.append([row["words"], f"{row['iteration_s']:.3f}", f"{lower:.3f} - {upper:.3f}", *peaks])
    absences = [f"{row['words']}: {row['absent']}" for row in figures.values() if "absent" in row]
    return "\n".join([format_table(["", "s an iteration", "quartiles", "peak", "while timed"], cells), *absences])


def chart_of(figures: dict[str, dict[str, Any]], title: str) -> str:
    """Seconds as bars, memory in words below."""
    bars, notes = [], []
    for name, row in figures.items():
        if "absent" in row:
            notes.append(f"{row['words']}: {row['absent']}")
            continue
        lower, median, upper = row["iteration_quartiles_s"]
        bars.append(Bar(row["words"], median, lower, upper, "DeepSpeed" if name == DEEPSPEED else "offload"))
        peaks = [format_bytes(row[peak]) for peak in ("peak_bytes", "training_peak_bytes")]
        notes.append(f"{row['words']}: peak memory above imports {peaks[0]}, while timed {peaks[1]}")
    return bar_chart(
        title, bars, axis="seconds an iteration, lower is better (median; whiskers: quartiles)", notes=notes
    )
