"""Charts as inline SVG: lines (linear or logarithmic) and stacked shares over steps.

Knows nothing about metrics. Colours are CSS classes `s0`.. of the page, so one drawing serves light and dark. Every
chart carries its points as JSON for the page's read-out under the pointer.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from html import escape
from typing import Literal, TypeAlias

import attrs

Point: TypeAlias = tuple[float, float]
Scale: TypeAlias = Literal["linear", "log"]

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 24
MOST_POINTS = 300
SMOOTHED_FROM = 60
_TICKS = 4


@attrs.frozen(kw_only=True)
class Series:
    name: str
    points: Sequence[Point]
    """(step, value), steps ascending; all values finite."""


@attrs.frozen(kw_only=True)
class Axes:
    """Data coordinates to SVG coordinates."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    scale: Scale = "linear"

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        low, high, at = self.y_low, self.y_high, value
        if self.scale == "log":
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (at - low) / (high - low)

    @classmethod
    def around(cls, series: Sequence[Series], *, scale: Scale, from_zero: bool) -> Axes:
        xs = [x for s in series for x, _ in s.points]
        ys = [y for s in series for _, y in s.points]
        low, high = _log_bounds(ys) if scale == "log" else _linear_bounds(ys, from_zero=from_zero)
        x_high = max(xs) if max(xs) > min(xs) else min(xs) + 1
        return cls(x_low=min(xs), x_high=x_high, y_low=low, y_high=high, scale=scale)


def _log_bounds(values: Sequence[float]) -> Point:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def _linear_bounds(values: Sequence[float], *, from_zero: bool) -> Point:
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    return (low if from_zero and low == 0.0 else low - margin), high + margin


def line_chart(
    series: Sequence[Series], *, scale: Scale = "linear", from_zero: bool = False, smoothed: bool = True
) -> str:
    """Lines over steps. If `smoothed`, a long one is drawn faint, with its running mean on top.

    On a logarithmic scale values that are not positive have no place and are left out.
    """
    if scale == "log":
        series = [attrs.evolve(s, points=[(x, y) for x, y in s.points if y > 0]) for s in series]
    series = [attrs.evolve(s, points=thinned(s.points)) for s in series if s.points]
    if not series:
        return ""
    axes = Axes.around(series, scale=scale, from_zero=from_zero)
    marks = "".join(_line(s, axes, index, smoothed=smoothed) for index, s in enumerate(series))
    return _svg(axes, marks, series)


def _line(series: Series, axes: Axes, index: int, *, smoothed: bool) -> str:
    points = series.points
    if len(points) == 1:
        x, y = points[0]
        return f'<circle class="dot s{index}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3"/>'
    if not smoothed or len(points) < SMOOTHED_FROM:
        return f'<path class="line s{index}" d="{_path(points, axes)}"/>'
    smooth = running_mean(points, len(points) // 20)
    return (
        f'<path class="line faint s{index}" d="{_path(points, axes)}"/>'
        f'<path class="line s{index}" d="{_path(smooth, axes)}"/>'
    )


def stacked_chart(series: Sequence[Series]) -> str:
    """Shares of 1 on top of each other, ordered: each series is a stronger shade of one colour."""
    series = [attrs.evolve(s, points=thinned(s.points)) for s in series if s.points]
    if not series:
        return ""
    axes = attrs.evolve(Axes.around(series, scale="linear", from_zero=True), y_low=0.0, y_high=1.0)
    base = [(x, 0.0) for x, _ in series[0].points]
    marks = ""
    for index, one in enumerate(series):
        top = [(x, min(1.0, low + share)) for (x, low), (_, share) in zip(base, one.points, strict=True)]
        opacity = 0.2 + 0.7 * index / max(1, len(series) - 1)
        outline = _path([*top, *reversed(base)], axes)
        marks += f'<path class="area" fill-opacity="{opacity:.2f}" d="{outline}Z"/>'
        base = top
    return _svg(axes, marks, series)


def _path(points: Sequence[Point], axes: Axes) -> str:
    return "M" + "L".join(f"{axes.x(x):.1f} {axes.y(y):.1f}" for x, y in points)


def _svg(axes: Axes, marks: str, series: Sequence[Series]) -> str:
    payload = {
        "low": axes.x_low,
        "high": axes.x_high,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "series": [[s.name, [[x, _rounded(y)] for x, y in s.points]] for s in series],
    }
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" data-chart="{escape(json.dumps(payload))}">'
        f"{_grid(axes)}{marks}"
        f'<line class="pointer" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/></svg>'
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _grid(axes: Axes) -> str:
    parts = []
    for value, label in _labelled(_log_ticks(axes) if axes.scale == "log" else linear_ticks(axes.y_low, axes.y_high)):
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    for value, label in _labelled(linear_ticks(axes.x_low, axes.x_high)):
        parts.append(f'<text x="{axes.x(value):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{label}</text>')
    return "".join(parts)


def _labelled(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """With as few digits as tell them apart."""
    for digits in range(1, 8):
        labels = [readable(tick, digits) for tick in ticks]
        if all(math.isclose(float(f"{tick:.{digits}g}"), tick, abs_tol=1e-12) for tick in ticks):
            break
    return list(zip(ticks, labels, strict=True))


def linear_ticks(low: float, high: float) -> list[float]:
    """About four round numbers inside [low, high].

    Example:
        >>> linear_ticks(0.0, 1.0)
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    raw = (high - low) / _TICKS
    power: float = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(axes: Axes) -> list[float]:
    low, high = round(math.log10(axes.y_low)), round(math.log10(axes.y_high))
    every = max(1, math.ceil((high - low) / _TICKS))
    return [10.0**power for power in range(low, high + 1, every)]


def readable(value: float, digits: int = 3) -> str:
    """A number in few characters.

    Example:
        >>> readable(12340.0), readable(0.25), readable(3.14e-09, 2), readable(0.0)
        ('12.3k', '0.25', '3.1e-9', '0')
    """
    value = float(f"{value:.{digits}g}")
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for bound, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= bound:
            return f"{value / bound:g}{suffix}"
    return f"{value:g}"


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS points: neighbours are averaged."""
    if len(points) <= MOST_POINTS:
        return list(points)
    edges = [round(i * len(points) / MOST_POINTS) for i in range(MOST_POINTS + 1)]
    return [_mean(points[a:b]) for a, b in itertools.pairwise(edges)]


def _mean(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def running_mean(points: Sequence[Point], reach: int) -> list[Point]:
    """Each value replaced by the mean of it and up to `reach` neighbours on either side."""
    total = [0.0]
    for _, y in points:
        total.append(total[-1] + y)
    smooth = []
    for i, (x, _) in enumerate(points):
        low, high = max(0, i - reach), min(len(points), i + reach + 1)
        smooth.append((x, (total[high] - total[low]) / (high - low)))
    return smooth
