"""Bar charts as SVG.

Owns: the drawing: bars with their spread, labels, an axis with its unit, a legend of groups.
Does not: know what is measured; write files (results.py).
Threads: any.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Final
from xml.sax.saxutils import escape

COLOURS: Final = ("#7a8288", "#1668b3", "#d9822b", "#3d8b57", "#8e5bb5")
"""One for each group, in the order of their first bar; told apart in grey print, too."""

WIDTH: Final = 920
MARGIN: Final = 24
BAR_HEIGHT: Final = 20
ROW_HEIGHT: Final = 30
TITLE_SIZE: Final = 17
TEXT_SIZE: Final = 13
SMALL_SIZE: Final = 12
CHARACTER_SHARE: Final = 0.58
"""Width of an average character by its size: SVG cannot ask the font, which is another one everywhere."""
LINE_CHARACTERS: Final = int((WIDTH - 2 * MARGIN) / (SMALL_SIZE * CHARACTER_SHARE))
"""Of a note: more would leave the frame."""
VALUE_WIDTH: Final = 64
"""Kept free to the right of the longest bar, for its value."""
MAX_TICKS: Final = 6


@dataclass(frozen=True, slots=True)
class Bar:
    """One row: `value` is where the bar ends, `low` and `high` are the ends of its whisker."""

    label: str
    value: float
    low: float
    high: float
    group: str


@dataclass(frozen=True, slots=True)
class _Scale:
    """Maps values to x."""

    left: float
    pixels_per_unit: float

    def x(self, value: float) -> float:
        return self.left + value * self.pixels_per_unit


def bar_chart(title: str, bars: Sequence[Bar], *, axis: str, notes: Sequence[str] = ()) -> str:
    """Horizontal bars from 0. `axis` says what is measured, and its unit; each of `notes` starts a line below."""
    lines = [line for note in notes for line in wrap(note, LINE_CHARACTERS)]
    groups = list(dict.fromkeys(bar.group for bar in bars))
    colours = {group: COLOURS[index % len(COLOURS)] for index, group in enumerate(groups)}
    left = MARGIN + max((_width(bar.label, TEXT_SIZE) for bar in bars), default=0.0) + 10
    top = MARGIN + TITLE_SIZE + 42
    bottom = top + len(bars) * ROW_HEIGHT
    height = bottom + 62 + len(lines) * (SMALL_SIZE + 5)
    ticks = nice_ticks(max((bar.high for bar in bars), default=0.0))
    scale = _Scale(left, (WIDTH - MARGIN - VALUE_WIDTH - left) / ticks[-1])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="Helvetica, Arial, \'DejaVu Sans\', sans-serif" font-size="{TEXT_SIZE}" fill="#1f2428">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(MARGIN, MARGIN + TITLE_SIZE - 4, title, size=TITLE_SIZE, weight="bold"),
        *_legend(colours, MARGIN + TITLE_SIZE + 20),
        *_axis(ticks, scale, top, bottom, axis),
    ]
    for row, bar in enumerate(bars):
        parts += _row(bar, colours[bar.group], scale, top + row * ROW_HEIGHT)
    for number, line in enumerate(lines):
        parts.append(_text(MARGIN, bottom + 62 + number * (SMALL_SIZE + 5), line, size=SMALL_SIZE, fill="#57606a"))
    return "\n".join([*parts, "</svg>", ""])


def nice_ticks(highest: float) -> list[float]:
    """0 and multiples of 1, 2 or 5 times a power of ten, at most `MAX_TICKS` of them, the last not below `highest`."""
    if not highest > 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest / (MAX_TICKS - 1)))
    for factor in (1, 2, 5, 10):
        step = factor * power
        count = math.ceil(highest / step - 1e-9)
        if count < MAX_TICKS:
            break
    return [index * step for index in range(count + 1)]


def format_value(value: float) -> str:
    """Three significant digits, whole from 100 on."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _row(bar: Bar, colour: str, scale: _Scale, top: float) -> list[str]:
    middle = top + ROW_HEIGHT / 2
    end, low, high = scale.x(bar.value), scale.x(bar.low), scale.x(bar.high)
    whisker = (
        f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 4:.1f}v8M{high:.1f} {middle - 4:.1f}v8" '
        'stroke="#1f2428" stroke-width="1.2" fill="none"/>'
    )
    return [
        _text(scale.left - 10, middle + 4.5, bar.label, anchor="end"),
        f'<rect x="{scale.left:.1f}" y="{middle - BAR_HEIGHT / 2:.1f}" width="{end - scale.left:.2f}" '
        f'height="{BAR_HEIGHT}" fill="{colour}" class="bar"/>',
        *([whisker] if bar.high > bar.low else []),  # what is counted has no spread
        _text(max(end, high) + 7, middle + 4.5, format_value(bar.value), weight="bold"),
    ]


def _axis(ticks: Sequence[float], scale: _Scale, top: float, bottom: float, words: str) -> list[str]:
    parts = []
    for tick in ticks:
        x = scale.x(tick)
        parts.append(f'<path d="M{x:.1f} {top}V{bottom + 5}" stroke="{"#1f2428" if tick == 0 else "#d8dee4"}"/>')
        parts.append(_text(x, bottom + 20, format_value(tick), size=SMALL_SIZE, anchor="middle"))
    parts.append(_text(scale.left, bottom + 40, words))
    return parts


def _legend(colours: dict[str, str], y: float) -> list[str]:
    parts, x = [], float(MARGIN)
    for group, colour in colours.items():
        parts.append(f'<rect x="{x:.1f}" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(x + 18, y, group, size=SMALL_SIZE))
        x += 18 + _width(group, SMALL_SIZE) + 22
    return parts


def _text(
    x: float, y: float, words: str, *, size: int = TEXT_SIZE, anchor: str = "start", weight: str = "", fill: str = ""
) -> str:
    style = "".join(
        f' {name}="{value}"'
        for name, value in (("text-anchor", anchor), ("font-weight", weight), ("fill", fill))
        if value and value != "start"
    )
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}"{style}>{escape(words)}</text>'


def _width(words: str, size: int) -> float:
    return len(words) * size * CHARACTER_SHARE
