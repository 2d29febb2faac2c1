"""Figures of iterations beside plain torch: ratios with their spread, targets, tables for people.

Owns: what a row says, which targets there are, and whether they are met.
Does not: run anything.
Threads: the main thread.

Note [Ratio]: of seconds of an iteration to those of the plain loop in the same round of the same process; lower is
better, 1.0 is plain torch.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.iteration.layouts import DEVICE, DISK_STATE, HOST_STATE, LAYOUTS
from benchmarks.iteration.worker import DEEPSPEED, FSDP2, FUSED, OURS, PHASES, PLAIN
from benchmarks.measure.chart import Bar, bar_chart, format_value
from benchmarks.measure.rounds import Ratio
from offload.report.console import format_table

CONTENDERS: Final = {OURS: "offload", FSDP2: "FSDP2, CPUOffloadPolicy", DEEPSPEED: "DeepSpeed ZeRO-3"}

TARGETS: Final[Mapping[str, Mapping[str, float]]] = {
    "readme": {DEVICE: 1.03, HOST_STATE: 1.10, DISK_STATE: 1.35},
    "llama": {DEVICE: 1.03, HOST_STATE: 1.10, DISK_STATE: 1.35},
    "tiny": {DEVICE: 1.5, HOST_STATE: 2.0, DISK_STATE: 4.0},
}
"""The most times the plain loop's seconds that ours may take, by model and layout."""
FORWARD_TARGET_US: Final = 60.0
BACKWARD_TARGET_US: Final = 120.0
"""Of a block of twelve parameters, CPU time of the training thread that the plain loop does not need."""
ENABLE_TARGET_S: Final = 5.0
SHOWN: Final = ("forward", "forward_cpu", "backward", "backward_cpu")


@dataclass(frozen=True, slots=True)
class Case:
    """What one process compares."""

    subject: str
    precision: str
    contender: str
    layout: str

    @property
    def words(self) -> str:
        """The row's name."""
        return f"{CONTENDERS[self.contender]}: {LAYOUTS[self.layout]}"


def compared(case: Case, answer: Mapping[str, Any]) -> dict[str, Any]:
    """A row: ratios to both plain loops, milliseconds, tokens a second; or why the contender is absent."""
    row: dict[str, Any] = {
        "subject": case.subject, "precision": case.precision, "contender": case.contender, "layout": case.layout,
        "words": case.words,
    }  # fmt: skip
    if "absent" in answer:
        return row | {"absent": answer["absent"]}
    for kind in ("train", "forward"):
        samples = answer[kind]["samples_s"]
        medians = {name: statistics.median(seconds) for name, seconds in samples.items()}
        row[kind] = {
            "median_s": medians,
            "ratio": spread_of(Ratio((case.contender,), PLAIN).of_rounds(samples)),
            "ratio_to_fused": spread_of(Ratio((case.contender,), FUSED).of_rounds(samples)),
            "tokens_per_s": {name: answer["tokens"] / seconds for name, seconds in medians.items()},
        } | answer[kind]
    target = TARGETS[case.subject].get(case.layout) if case.contender == OURS else None
    if target is not None:
        row |= {"target": target, "met": row["train"]["ratio"]["median"] <= target}
    return row | {key: answer[key] for key in answer if key not in ("train", "forward", "tokens")}


def spread_of(ratios: Sequence[float]) -> dict[str, Any]:
    """Median, lowest and highest."""
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def grown(count: int, numel: int, layout: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Microseconds of a block, more than without a session, by phase; seconds of enable and close."""
    row: dict[str, Any] = {"blocks": count, "numel": numel, "layout": layout}
    if "absent" in answer:
        return row | {"absent": answer["absent"]}
    samples = answer["samples_s"]
    phases = samples[OURS]
    more_us = {
        phase: statistics.median(
            (ours - plain) / count * 1e6 for ours, plain in zip(phases[phase], samples[PLAIN][phase], strict=True)
        )
        for phase in phases
    }
    whole_s = {
        name: statistics.median(map(sum, zip(*(samples[name][phase] for phase in PHASES), strict=True)))
        for name in (PLAIN, OURS)
    }
    return row | {
        "partitions": answer["partitions"],
        "more_us_per_block": more_us,
        "step_us_per_block": {name: seconds / count * 1e6 for name, seconds in whole_s.items()},
        "enable_s": answer["enable_s"],
        "close_s": answer["close_s"],
        "load_average_1m": answer["load_average_1m"],
        "samples_s": samples,
    }


def growth_met(rows: Iterable[Mapping[str, Any]]) -> dict[str, bool]:
    """Whether the hooks' targets hold for every number of blocks with everything on the device, and that of enable.

    By CPU time: another program on the machine is not the hooks' fault, and they wait for nothing there.
    """
    measured = [row for row in rows if row["layout"] == DEVICE]
    present = [row for row in measured if "absent" not in row]
    complete = bool(present) and len(present) == len(measured)
    return {
        "forward_us": complete and all(row["more_us_per_block"]["forward_cpu"] <= FORWARD_TARGET_US for row in present),
        "backward_us": complete
        and all(row["more_us_per_block"]["backward_cpu"] <= BACKWARD_TARGET_US for row in present),
        "enable_s": complete and all(row["enable_s"] <= ENABLE_TARGET_S for row in present),
    }


# -------------------------------------------------------------------------------------------------------- tables


def comparison_table(rows: Sequence[Mapping[str, Any]], kind: str) -> str:
    """One model and precision: of training iterations ("train") or of passes forward alone ("forward")."""
    cells = []
    for row in rows:
        if "absent" in row:
            cells.append([row["words"], *["-"] * 6])
            continue
        of, ratio = row[kind], row[kind]["ratio"]
        target = ("yes" if row["met"] else "no") + f" ({row['target']})" if kind == "train" and "target" in row else ""
        cells.append([
            row["words"], format_value(of["median_s"][row["contender"]] * 1e3),
            format_value(of["tokens_per_s"][row["contender"]]), f"{ratio['median']:.2f}",
            f"{ratio['lowest']:.2f} - {ratio['highest']:.2f}", f"{of['ratio_to_fused']['median']:.2f}", target,
        ])  # fmt: skip
    absences = [f"{row['words']}: {row['absent']}" for row in rows if "absent" in row]
    headers = ["", "ms", "tokens/s", "x plain", "of rounds", "x fused", "met" if kind == "train" else ""]
    return "\n".join([format_table(headers, cells), *absences])


def growth_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All numbers of blocks."""
    cells = []
    for row in rows:
        name = [str(row["blocks"]), str(row["numel"]), LAYOUTS[row["layout"]]]
        if "absent" in row:
            cells.append([*name, *["-"] * 8, row["absent"]])
            continue
        more, step = row["more_us_per_block"], row["step_us_per_block"]
        cells.append([
            *name, str(row["partitions"]), *(f"{more[phase]:.0f}" for phase in SHOWN),
            f"{step[PLAIN]:.0f}", f"{step[OURS]:.0f}", f"{row['enable_s']:.2f}", f"{row['close_s']:.2f}",
        ])  # fmt: skip
    headers = [
        "blocks", "elements", "", "partitions", "+forward us", "of cpu", "+backward us", "of cpu", "plain us", "ours us",
        "enable s", "close s",
    ]  # fmt: skip
    return format_table(headers, cells)


def chart_of(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Ratios of training iterations to plain torch's."""
    bars, notes = [], []
    for row in rows:
        words = f"{row['subject']}, {row['precision']}, {row['words']}"
        if "absent" in row:
            notes.append(f"{words}: {row['absent']}")
            continue
        ratio = row["train"]["ratio"]
        bars.append(Bar(words, ratio["median"], ratio["lowest"], ratio["highest"], CONTENDERS[row["contender"]]))
    axis = "seconds of an iteration by those of plain torch, lower is better (median; whiskers: lowest and highest)"
    return bar_chart(title, bars, axis=axis, notes=notes)
