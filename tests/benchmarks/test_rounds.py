"""Interleaved rounds: their order, what is kept of them, and the ratios made of them."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.measure.comparison import Row, draw_figures, figures_of, format_figures, format_ratios
from benchmarks.measure.rounds import Contender, Ratio, quartiles_of, rotated, run_rounds


class Runs:
    """Progress that remembers what ran."""

    def __init__(self) -> None:
        self.ran_words: list[str] = []

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ran(self, words: str, seconds: float) -> None:
        self.ran_words.append(words)


def contender(name: str, seconds: list[float]) -> Contender:
    left = iter(seconds)
    return Contender(name, name, lambda: next(left))


def test_rounds_of_warm_up_are_run_and_not_kept() -> None:
    runs = Runs()
    contenders = [contender("a", [9.0, 1.0, 2.0]), contender("b", [8.0, 3.0, 4.0])]
    samples = run_rounds(contenders, 2, runs, warm_up_rounds=1, settle_s=0.0)
    assert samples == {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    assert runs.ran_words == ["a", "b", "b", "a", "a", "b"]  # each round begins with the next one


@given(st.integers(1, 8), st.integers(0, 50))
def test_every_round_has_every_contender_once(count: int, number: int) -> None:
    names = [str(index) for index in range(count)]
    assert sorted(rotated(names, number)) == sorted(names)
    assert {rotated(names, number + shift)[0] for shift in range(count)} == set(names)


def test_a_ratio_is_the_median_of_rounds_and_not_a_ratio_of_medians() -> None:
    samples = {"ours": [1.0, 2.0, 10.0], "theirs": [3.0, 2.0, 20.0]}
    ratio = Ratio(("theirs",), "ours")
    assert ratio.of_rounds(samples) == [3.0, 1.0, 2.0]
    assert ratio.median(samples) == 2.0
    assert statistics.median(samples["theirs"]) / statistics.median(samples["ours"]) == 1.5


def test_of_several_rivals_the_one_with_the_lowest_median_is_taken() -> None:
    samples = {"ours": [1.0, 1.0, 1.0], "slow": [1.0, 9.0, 9.0], "quick": [4.0, 4.0, 8.0]}
    ratio = Ratio(("slow", "quick", "absent"), "ours")
    assert ratio.terms(samples) == ("quick", "ours")
    assert ratio.median(samples) == 4.0


@pytest.mark.parametrize("samples", [{}, {"ours": [1.0]}, {"theirs": [1.0]}, {"ours": [], "theirs": []}])
def test_a_ratio_with_one_who_did_not_run_is_none(samples: dict[str, list[float]]) -> None:
    ratio = Ratio(("theirs",), "ours")
    assert ratio.terms(samples) is None
    assert ratio.median(samples) is None
    assert format_ratios({"speed": ratio}, samples).splitlines()[-1].split() == ["speed", "-", "-"]


@given(st.lists(st.floats(0.001, 1000.0), min_size=1, max_size=20))
def test_quartiles_lie_around_the_median(seconds: list[float]) -> None:
    spread = quartiles_of(seconds)
    assert spread.median == pytest.approx(statistics.median(seconds))
    assert min(seconds) <= spread.lower <= spread.median <= spread.upper <= max(seconds)


def test_one_who_did_not_run_is_shown_with_the_reason() -> None:
    rows = [Row("ours", "our copy", "ours", num_bytes=2e9), Row("fio", "fio", "peers", absent="not installed")]
    samples = {"ours": [0.5, 0.5, 1.0]}
    figures = figures_of(rows, samples)
    assert figures["ours"]["gb_per_s"] == pytest.approx(4.0)
    assert figures["fio"] == {"words": "fio", "group": "peers", "absent": "not installed"}
    table = format_figures(rows, samples)
    assert "fio: not installed" in table
    assert "4.0" in table
    assert "fio: not installed" in draw_figures("copies", rows, samples, [])


def test_a_chart_of_speeds_has_the_longer_bar_for_the_shorter_time() -> None:
    rows = [Row("a", "slow", "x", num_bytes=1e9), Row("b", "quick", "x", num_bytes=1e9)]
    samples = {"a": [0.5], "b": [0.25]}
    for in_gb_per_s, shown in ((True, ("2.00", "4.00")), (False, ("500", "250"))):
        chart = draw_figures("copies", rows, samples, [], in_gb_per_s=in_gb_per_s)
        assert all(f'font-weight="bold">{words}<' in chart for words in shown)


def test_where_nothing_moves_bytes_there_are_seconds_alone() -> None:
    rows = [Row("step", "step", "ours")]
    assert "gb_per_s" not in figures_of(rows, {"step": [1.0]})["step"]
    assert format_figures(rows, {"step": [1.0]}).splitlines()[-1].split()[-1] == "-"
