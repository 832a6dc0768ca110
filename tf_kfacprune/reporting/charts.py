"""Line charts as inline SVG: no script, no font, colours from the page's variables."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Band", "Line", "line_chart", "number", "ticks"]

_WIDTH, _HEIGHT = 720, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 10, 46
# More points than this are a line without dots.
_MOST_DOTS = 60


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: What it shows.
        points: `(x, y)`; where y is not finite the line is broken.
        color: Name of a CSS variable, without the dashes.
        dashed: Whether it is dashed and has no dots.
    """

    label: str
    points: Sequence[tuple[float, float]]
    color: str
    dashed: bool = False


@dataclass(frozen=True)
class Band:
    """A shaded range of x: its borders, and the CSS variable of its colour."""

    start: float
    end: float
    color: str


def line_chart(
    lines: Sequence[Line],
    *,
    x_range: tuple[float, float],
    x_label: str,
    title: str,
    bands: Sequence[Band] = (),
    percent: bool = False,
) -> str:
    """Draws lines over shaded bands; the y axis is logarithmic where values span a decade.

    Args:
        lines: What to draw.
        x_range: Least and largest x.
        x_label: Name of the x axis.
        title: Name of the chart, for those who do not see it.
        bands: Shaded ranges.
        percent: Whether values are fractions, shown in per cent.

    Returns:
        A `<figure>` with a legend and an SVG picture; empty if no value is finite.
    """
    values = [y for line in lines for _, y in line.points if math.isfinite(y)]
    if not values:
        return ""
    axis = _Axis(values)
    left, right = x_range

    def x_of(x: float) -> float:
        share = (x - left) / ((right - left) or 1.0)
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 2)

    def y_of(y: float) -> float:
        return round(_HEIGHT - _BOTTOM - axis.share(y) * (_HEIGHT - _TOP - _BOTTOM), 2)

    low, high = _HEIGHT - _BOTTOM, _TOP
    parts = []
    for band in bands:
        start, end = x_of(max(band.start, left)), x_of(min(band.end, right))
        if end > start:
            parts.append(
                f'<rect x="{start}" y="{high}" width="{round(end - start, 2)}" '
                f'height="{low - high}" fill="var(--{band.color})"/>'
            )
    for value in axis.ticks:
        y, shown = y_of(value), number(100 * value) + " %" if percent else number(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{shown}</text>')
    for value in _whole_ticks(left, right):
        x = x_of(value)
        parts.append(f'<path class="axis" d="M{x} {low}v4"/>')
        parts.append(f'<text x="{x}" y="{low + 18}" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {low}H{_WIDTH - _RIGHT}"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    label = html.escape(x_label)
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{label}</text>')
    for line in lines:
        parts += _drawn(line, x_of, y_of, percent)
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(parts)}</svg>"
    )
    scale = "(logarithmic)" if axis.logarithmic else ""
    return (
        f"<figure><figcaption><b>{html.escape(title)}</b>{scale}{_legend(lines)}</figcaption>"
        f"{svg}</figure>"
    )


class _Axis:
    """Where values lie between the lower and the upper end, and which of them are marked."""

    def __init__(self, values: Sequence[float]) -> None:
        low, high = min(values), max(values)
        self.logarithmic = low > 0 and high / low >= 10
        self.ticks = _decades(low, high) if self.logarithmic else ticks(low, high)
        self._low = self._scaled(min(low, self.ticks[0]))
        self._high = self._scaled(max(high, self.ticks[-1]))

    def share(self, value: float) -> float:
        return (self._scaled(value) - self._low) / ((self._high - self._low) or 1.0)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


def _drawn(
    line: Line,
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    percent: bool,
) -> list[str]:
    pieces: list[list[str]] = [[]]
    dots = []
    for x, y in line.points:
        if not math.isfinite(y):
            pieces.append([])
            continue
        pieces[-1].append(f"{x_of(x)} {y_of(y)}")
        shown = f"{number(100 * y)} %" if percent else number(y)
        tip = html.escape(f"{line.label}: {shown} at {number(x)}")
        dots.append(f'<circle cx="{x_of(x)}" cy="{y_of(y)}" r="2.6"><title>{tip}</title></circle>')
    path = "".join(f"M{'L'.join(piece)}" for piece in pieces if piece)
    style = ' stroke-dasharray="5 4"' if line.dashed else ""
    drawn = [f'<path class="line" stroke="var(--{line.color})"{style} d="{path}"/>']
    if not line.dashed and len(dots) <= _MOST_DOTS:
        drawn.append(f'<g fill="var(--{line.color})">{"".join(dots)}</g>')
    return drawn


def _legend(lines: Sequence[Line]) -> str:
    entries = []
    for line in lines:
        kind = "dashed" if line.dashed else "solid"
        swatch = f'<i class="{kind}" style="border-color:var(--{line.color})"></i>'
        entries.append(f'<span class="key">{swatch}{html.escape(line.label)}</span>')
    return "".join(entries)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that enclose a range, at most so many steps of 1, 2 or 5 times a power of 10.

    Args:
        low: Lower end.
        high: Upper end, not below it.
        most: Largest number of steps.

    Returns:
        Ascending numbers, two at least; the first at most `low` and the last at least `high`.
    """
    if high == low:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    return [round(k * step, 12) for k in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Marks of a logarithmic axis: 1, 2 and 5 of every decade, or every so many decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > 3:
        every = -(-(last - first) // 5)
        return [10.0**k for k in range(first, last + every, every)]
    factors = (1, 2, 5) if last - first <= 2 else (1, 3)
    found = [factor * 10.0**k for k in range(first, last + 1) for factor in factors]
    start = max(k for k, value in enumerate(found) if value <= low * (1 + 1e-9))
    end = min(k for k, value in enumerate(found) if value >= high * (1 - 1e-9))
    return found[start : end + 1]


def _whole_ticks(low: float, high: float) -> list[float]:
    """Whole numbers within a range, about six of them."""
    step = max(1.0, ticks(0.0, max(high - low, 1.0), 7)[1])
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step) + 1)]


def number(value: float) -> str:
    """A number with three significant digits, thousands apart: `0.0123`, `12.3`, `12,300`."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.0e}"
