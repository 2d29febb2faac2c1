"""Figures of whole iterations: what is compared with DeepSpeed, and what is said where it is absent."""

from typing import Any

import pytest

from benchmarks.iteration_figures import DEEPSPEED, DISK, SAME_MEMORY, Rows, chart_of, compared, figures_of, table

BASELINE = 400


def run(seconds: float, peak: int, training_peak: int, losses: tuple[float, ...] = (10.0, 7.0, 4.0)) -> dict[str, Any]:
    """As a worker answers, with what it held before its model."""
    return {
        "iteration_s": [seconds * 0.9, seconds * 1.1],
        "losses": list(losses),
        "peak_rss_bytes": BASELINE + peak,
        "training_peak_rss_bytes": BASELINE + training_peak,
        "baseline_rss_bytes": BASELINE,
    }


def three_rows(their_peaks: tuple[int, int] = (6000, 4000), our_peaks: tuple[int, int] = (1500, 1400)) -> Rows:
    """Two rounds, the second on a machine that is twice as slow."""
    rows = Rows()
    for slower in (1.0, 2.0):
        rows.runs[DEEPSPEED].append(run(4.0 * slower, *their_peaks))
        rows.runs[DISK].append(run(2.0 * slower, *our_peaks))
        rows.runs[SAME_MEMORY].append(run(1.0 * slower, 3900, 3900))
    return rows


def test_ratios_are_taken_within_rounds_and_memory_without_the_imports() -> None:
    rows = three_rows()
    result = compared(rows, figures_of(rows))
    assert result["vs_deepspeed_disk"] == pytest.approx(2.0)
    assert result["vs_deepspeed_same_memory"] == pytest.approx(4.0)
    assert result["of_rounds"]["vs_deepspeed_disk"] == pytest.approx([2.0, 2.0])
    assert (result["peak_memory_share"], result["training_memory_share"]) == (0.25, 0.35)
    assert result["met"] == {"vs_deepspeed_disk": True, "vs_deepspeed_same_memory": True, "peak_memory_share": True}


def test_half_the_peak_of_the_start_alone_does_not_meet_the_target() -> None:
    rows = three_rows(their_peaks=(6000, 2000))
    result = compared(rows, figures_of(rows))
    assert result["peak_memory_share"] == 0.25
    assert result["met"]["peak_memory_share"] is False


def test_a_loss_that_rises_or_is_not_finite_is_told() -> None:
    rows = three_rows()
    rows.runs[DISK][1]["losses"] = [10.0, float("nan"), 11.0]
    losses = compared(rows, figures_of(rows))["losses"]
    assert losses == {
        "finite": False, "falling": False, "ours_same_on_all_homes": True, "largest_difference_to_deepspeed": 0.0,
    }  # fmt: skip


def test_a_lost_peer_is_a_row_that_says_why_and_takes_all_comparisons_with_it() -> None:
    rows = three_rows()
    rows.lose_peer("not installed here")
    figures = figures_of(rows)
    result = compared(rows, figures)
    assert figures[DEEPSPEED] == {"words": "DeepSpeed ZeRO-3, state on disk", "absent": "not installed here"}
    assert [result[name] for name in ("vs_deepspeed_disk", "vs_deepspeed_same_memory", "peak_memory_share")] == [
        None
    ] * 3
    assert set(result["met"].values()) == {None}
    assert "not installed here" in table(figures)
    assert "not installed here" in chart_of(figures, "title")
