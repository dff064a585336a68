"""Charts of the page, as SVG text: nothing is loaded when it is read."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.pages import ticks

_WIDTH, _HEIGHT = 720, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 30, 40
_BINS = 60
_QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


class Series(NamedTuple):
    name: str
    values: Tensor
    color: str


class Mark(NamedTuple):
    """A vertical line at a value."""

    value: float
    name: str
    is_dashed: bool = False


def histogram(series: Sequence[Series], marks: Sequence[Mark], x_label: str) -> str:
    """Shares of values per bin, one filled outline per series, with marks."""
    flat = torch.cat([one.values.flatten() for one in series]).float().sort().values
    last = len(flat) - 1
    # A few outliers must not press everything else into a corner.
    low = min([float(flat[round(0.001 * last)]), *(mark.value for mark in marks)])
    high = max([float(flat[round(0.999 * last)]), *(mark.value for mark in marks)])
    margin = 0.03 * (high - low) or 0.01
    low, high = low - margin, high + margin
    shares = [
        torch.histc(one.values.float().flatten(), _BINS, min=low, max=high) / one.values.numel()
        for one in series
    ]
    tallest = max(float(share.max()) for share in shares) or 1.0
    plot = _Plot((low, high), (0, 1.08 * tallest))
    parts = [plot.frame(x_label, "share of tokens")]
    for one, share in zip(series, shares, strict=True):
        step = (high - low) / _BINS
        corners = [(low, 0.0)]
        for number, value in enumerate(share.tolist()):
            corners += [(low + number * step, value), (low + (number + 1) * step, value)]
        path = " ".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in [*corners, (high, 0.0)])
        parts.append(
            f'<polygon points="{path}" fill="{one.color}" fill-opacity="0.22" '
            f'stroke="{one.color}" stroke-width="1.5"/>'
        )
    parts += _marks(plot, marks)
    return _svg(parts, [(one.name, one.color) for one in series])


def layers(layer_inflow_LQN: Tensor, current: range, suggested: range | None) -> str:
    """Per block: the spread of the inflow over its mean, on a logarithmic scale."""
    flat_LX = layer_inflow_LQN.flatten(1).float()
    relative_LX = (flat_LX / flat_LX.mean(dim=1, keepdim=True).clamp(min=1e-12)).sort(dim=1).values
    last = relative_LX.shape[1] - 1
    places = torch.tensor([round(share * last) for share in _QUANTILES])
    table_L5 = relative_LX[:, places].clamp(min=0.01, max=100).log10()
    num_layers = len(table_L5)
    low = min(-0.5, float(table_L5.min()))
    high = max(0.5, float(table_L5.max()))
    plot = _Plot((-0.5, num_layers - 0.5), (low - 0.05, high + 0.05))
    levels = [t for t in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100) if low <= _log(t) <= high]
    parts = [plot.bands("block", "inflow over its mean", [(_log(t), f"{t:g}x") for t in levels])]
    for span, color, opacity in ((current, "#98a2b3", 0.28), (suggested, "#2e9e5b", 0.22)):
        if span is not None and len(span):
            x0, x1 = plot.x(span.start - 0.5), plot.x(span.stop - 0.5)
            parts.append(
                f'<rect x="{x0:.1f}" y="{_TOP}" width="{x1 - x0:.1f}" '
                f'height="{_HEIGHT - _TOP - _BOTTOM}" fill="{color}" fill-opacity="{opacity}"/>'
            )
    box = min(16.0, 0.6 * (plot.x(1) - plot.x(0)))
    every = max(1, num_layers // 24)
    for number, (a, b, c, d, e) in enumerate(table_L5.tolist()):
        x = plot.x(number)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{plot.y(a):.1f}" y2="{plot.y(e):.1f}" '
            'stroke="#3b6fb6" stroke-width="1.5"/>'
            f'<rect x="{x - box / 2:.1f}" y="{plot.y(d):.1f}" width="{box:.1f}" '
            f'height="{max(1.0, plot.y(b) - plot.y(d)):.1f}" fill="#b9cde8" stroke="#3b6fb6"/>'
            f'<line x1="{x - box / 2:.1f}" x2="{x + box / 2:.1f}" y1="{plot.y(c):.1f}" '
            f'y2="{plot.y(c):.1f}" stroke="#1d3f6e" stroke-width="2"/>'
        )
        if number % every == 0:
            parts.append(_text(x, _HEIGHT - _BOTTOM + 15, str(number), "middle"))
    legend = [("recipe's blocks", "#98a2b3")]
    if suggested is not None:
        legend.append(("suggested", "#2e9e5b"))
    return _svg(parts, legend)


class _Plot:
    """Values to places in the picture."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        self._x_range, self._y_range = x_range, y_range

    def x(self, value: float) -> float:
        low, high = self._x_range
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y_range
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def frame(self, x_label: str, y_label: str) -> str:
        marks = [(value, f"{100 * value:g}%") for value in ticks(*self._y_range, 3) if value > 0]
        below = [
            _text(self.x(value), _HEIGHT - _BOTTOM + 15, f"{value:g}", "middle")
            for value in ticks(*self._x_range, 7)
        ]
        return self.bands(x_label, y_label, marks) + "".join(below)

    def bands(self, x_label: str, y_label: str, ticks: Sequence[tuple[float, str]]) -> str:
        base = _HEIGHT - _BOTTOM
        parts = [
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}" stroke="#667085"/>',
            _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_label, "middle"),
            _text(4, _TOP - 12, y_label, "start"),
        ]
        for value, label in ticks:
            y = self.y(value)
            parts.append(
                f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
                'stroke="#e4e7ec"/>' + _text(_LEFT - 5, y + 4, label, "end")
            )
        return "".join(parts)


def _marks(plot: _Plot, marks: Sequence[Mark]) -> list[str]:
    parts = []
    for number, mark in enumerate(marks):
        x = plot.x(mark.value)
        color = "#2e9e5b" if mark.is_dashed else "#101828"
        dash = ' stroke-dasharray="5 4"' if mark.is_dashed else ""
        is_right = x > 0.75 * _WIDTH
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" '
            f'stroke="{color}" stroke-width="1.8"{dash}/>'
            + _text(
                x + (-5 if is_right else 5),
                _TOP + 12 + 15 * number,
                f"{mark.name} {mark.value:.3g}",
                "end" if is_right else "start",
                color,
            )
        )
    return parts


def _svg(parts: Sequence[str], legend: Sequence[tuple[str, str]]) -> str:
    x = float(_WIDTH - _RIGHT)
    keys = []
    for name, color in reversed(legend):
        x -= 7.0 * len(name)
        keys.append(_text(x, 16, name, "start"))
        x -= 16
        keys.append(f'<rect x="{x:.1f}" y="7" width="11" height="11" fill="{color}"/>')
        x -= 14
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" class="chart">'
        f"{''.join(parts)}{''.join(keys)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str, color: str = "#475467") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'
    )


def _log(value: float) -> float:
    return math.log10(value)
