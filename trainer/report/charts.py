"""Charts as SVG text in the page's own colours, so that they follow light and dark.

Classes do the colouring: `raw` and `refined` for the backbones, `tone-1` to `tone-6` for lines.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from trainer.pages import ticks

_WIDTH, _HEIGHT = 440, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 20, 12, 40
_POINTS = 240
_ROW = 26
_SMOOTHED = 40
"""Steps from which a running mean differs from what was recorded."""


class Line(NamedTuple):
    """A value over steps."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


class Dot(NamedTuple):
    """A mean with its interval; `low` and `high` are the mean where there is none."""

    name: str
    kind: str
    mean: float
    low: float
    high: float


def lines(series: Sequence[Line], *, label: str, is_exact: bool = False) -> str:
    """Lines over steps: pale as recorded, strong as a running mean, and a legend in HTML.

    `is_exact` lines are drawn as they are, from zero on.
    """
    values = [value for one in series for value in one.values if math.isfinite(value)]
    steps = [step for one in series for step in one.steps]
    low, high = min(values, default=0.0), max(values, default=1.0)
    low = min(0.0, low) if is_exact else low
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    y = _Axis(0 if is_exact and low == 0 else low - margin, high + margin,
              _HEIGHT - _BOTTOM, _TOP)  # fmt: skip
    x = _Axis(min(steps, default=0), max(steps, default=1), _LEFT, _WIDTH - _RIGHT)
    parts = [_grid(y, x)]
    for number, one in enumerate(series, 1):
        points = [(s, v) for s, v in zip(one.steps, one.values, strict=True) if math.isfinite(v)]
        strong = points if is_exact else _running_mean(points)
        if not is_exact and len(points) >= _SMOOTHED:
            parts.append(_path(_thinned(points), x, y, f"tone-{number} pale"))
        parts.append(_path(_thinned(strong), x, y, f"tone-{number}"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, "step", "middle"))
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 18 10" aria-hidden="true">'
        f'<path class="tone-{number}" d="M1 5H17"/></svg>{escape(one.name)}</li>'
        for number, one in enumerate(series, 1)
    )
    last = ", ".join(f"{one.name} {one.values[-1]:.4g}" for one in series if one.values)
    return (
        _svg(_WIDTH, _HEIGHT, parts, f"{label} over {len(set(steps))} steps; at the end {last}")
        + f'<ul class="legend">{legend}</ul>'
    )


def intervals(dots: Sequence[Dot], *, label: str, unit: str) -> str:
    """A row per dot: the mean, and a whisker over its interval, on one axis."""
    height = _ROW * len(dots) + 36
    low, high = min(dot.low for dot in dots), max(dot.high for dot in dots)
    margin = 0.15 * (high - low) or 0.02 * abs(high) or 1.0
    left = 78
    x = _Axis(low - margin, high + margin, left, _WIDTH - _RIGHT)
    base = height - 30
    parts = [_line(left, _WIDTH - _RIGHT, base, base, "axis")]
    for value in ticks(low - margin, high + margin, 5):
        parts.append(_line(x(value), x(value), 4, base, "grid"))
        parts.append(_text(x(value), base + 15, f"{value:g}", "middle"))
    for number, dot in enumerate(dots):
        middle = 4 + _ROW * (number + 0.5)
        parts.append(_text(left - 10, middle + 4, dot.name, "end", "name"))
        if dot.high > dot.low:
            parts.append(_line(x(dot.low), x(dot.high), middle, middle, f"whisker {dot.kind}"))
            for end in (dot.low, dot.high):
                parts.append(_line(x(end), x(end), middle - 5, middle + 5, f"whisker {dot.kind}"))
        parts.append(f'<circle class="{dot.kind}" cx="{x(dot.mean):.1f}" cy="{middle:.1f}" r="5"/>')
    told = ", ".join(f"{dot.name} {dot.mean:.4g} ({dot.low:.4g} to {dot.high:.4g})" for dot in dots)
    return _svg(_WIDTH, height, parts, f"{label} {unit}: {told}".replace(" :", ":"))


class _Axis:
    """Values to places in the picture."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high if high > low else low + 1
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)


def _grid(y: _Axis, x: _Axis) -> str:
    parts = []
    levels = ticks(y.low, y.high, 4)
    digits = max(
        (len(f"{level:.10f}".rstrip("0").partition(".")[2]) for level in levels), default=0
    )
    for value in levels:
        parts.append(_line(_LEFT, _WIDTH - _RIGHT, y(value), y(value), "grid"))
        small = 0 < max(map(abs, levels)) < 1e-3
        shown = f"{value:.1e}".replace("e-0", "e-") if small and value else f"{value:.{digits}f}"
        parts.append(_text(_LEFT - 7, y(value) + 4, shown if value else "0", "end"))
    for value in ticks(x.low, x.high, 5):
        parts.append(_text(x(value), _HEIGHT - _BOTTOM + 16, f"{value:g}", "middle"))
    parts.append(_line(_LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM, "axis"))
    return "".join(parts)


def _running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of a window around each point that is a twentieth of all of them wide."""
    reach = len(points) // 40
    found = []
    for place, (step, _) in enumerate(points):
        near = points[max(0, place - reach) : place + reach + 1]
        found.append((step, sum(value for _, value in near) / len(near)))
    return found


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    every = -(-len(points) // _POINTS) or 1
    return [*points[::every], *([points[-1]] if points and (len(points) - 1) % every else [])]


def _path(points: Sequence[tuple[float, float]], x: _Axis, y: _Axis, kind: str) -> str:
    places = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    return f'<polyline class="{kind}" points="{places}"/>'


def _line(x1: float, x2: float, y1: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: int, height: int, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
