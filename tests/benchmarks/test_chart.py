"""Bar charts: well-formed, within their frame, in proportion."""

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.measure.chart import (
    CHARACTER_SHARE,
    MARGIN,
    MAX_TICKS,
    SMALL_SIZE,
    WIDTH,
    Bar,
    bar_chart,
    format_value,
    nice_ticks,
)

SVG = "{http://www.w3.org/2000/svg}"


def bars_in(svg: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(svg).findall(f".//{SVG}rect[@class='bar']")


def test_lengths_are_in_proportion_to_values() -> None:
    bars = [Bar("a", 1.0, 0.9, 1.2, "x"), Bar("b", 4.0, 3.0, 5.0, "y")]
    short, long = (float(bar.attrib["width"]) for bar in bars_in(bar_chart("title", bars, axis="ms")))
    assert long == pytest.approx(4 * short, rel=1e-3)


def test_groups_have_colours_of_their_own() -> None:
    bars = [Bar(label, 1.0, 1.0, 1.0, group) for label, group in (("a", "x"), ("b", "y"), ("c", "x"))]
    first, second, third = (bar.attrib["fill"] for bar in bars_in(bar_chart("title", bars, axis="ms")))
    assert first == third != second


def test_words_with_markup_in_them_are_shown_as_they_are() -> None:
    words = 'a < b & "c"'
    svg = bar_chart(words, [Bar(words, 1.0, 1.0, 1.0, words)], axis=words, notes=[words])
    texts = [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert texts.count(words) == 5  # title, legend, label, axis, note


def test_a_long_note_goes_on_below_within_the_frame() -> None:
    note = " ".join(["words"] * 60)
    svg = bar_chart("title", [Bar("a", 1.0, 1.0, 1.0, "x")], axis="ms", notes=[note])
    lines = [text for text in ElementTree.fromstring(svg).iter(f"{SVG}text") if "words" in (text.text or "")]
    assert len(lines) > 1
    assert " ".join(str(line.text) for line in lines) == note
    assert max(len(str(line.text)) * SMALL_SIZE * CHARACTER_SHARE for line in lines) <= WIDTH - 2 * MARGIN
    assert float(ElementTree.fromstring(svg).attrib["height"]) > max(float(line.attrib["y"]) for line in lines)


def test_whiskers_are_drawn_where_there_is_a_spread() -> None:
    bars = [Bar("counted", 1.0, 1.0, 1.0, "x"), Bar("timed", 1.0, 0.9, 1.1, "x")]
    paths = ElementTree.fromstring(bar_chart("t", bars, axis="ms")).iter(f"{SVG}path")
    assert len([path for path in paths if path.attrib.get("fill") == "none"]) == 1


def test_a_chart_without_bars_is_well_formed() -> None:
    assert bars_in(bar_chart("nothing ran", [], axis="ms")) == []


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=8))
def test_every_bar_ends_within_the_chart(values: list[float]) -> None:
    bars = [Bar(f"row {index}", value, value, value, "x") for index, value in enumerate(values)]
    for bar in bars_in(bar_chart("title", bars, axis="ms")):
        assert 0 < float(bar.attrib["x"]) + float(bar.attrib["width"]) < WIDTH


@given(st.floats(1e-9, 1e12))
def test_ticks_are_few_and_reach_the_highest_value(highest: float) -> None:
    ticks = nice_ticks(highest)
    assert ticks[0] == 0
    assert 2 <= len(ticks) <= MAX_TICKS
    assert ticks[-1] >= highest * (1 - 1e-6)
    assert ticks[-1] <= 6 * highest


@pytest.mark.parametrize(
    ("value", "words"), [(0.0, "0"), (0.01234, "0.0123"), (1.0, "1.00"), (35.21, "35.2"), (12345.6, "12,346")]
)
def test_values_have_three_digits(value: float, words: str) -> None:
    assert format_value(value) == words
