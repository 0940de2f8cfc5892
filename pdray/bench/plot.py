"""A line plot as an SVG file, written by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 50, 60  # margins around the axes
NUM_TICKS = 6
FONT = 'font-family="sans-serif" font-size="13"'


class Series(NamedTuple):
    """One line. points: (x, y), none below 0."""

    name: str
    color: str
    points: Sequence[tuple[float, float]]


def line_plot(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """An SVG of the series. Both axes begin at 0; every point has a mark."""
    x_ticks = ticks(max(x for each in series for x, _ in each.points))
    y_ticks = ticks(max(y for each in series for _, y in each.points))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (right - LEFT) * x / x_ticks[-1], bottom - (bottom - TOP) * y / y_ticks[-1]

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {FONT}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 22, title, "middle", 'font-size="15"'),
        _text((LEFT + right) / 2, HEIGHT - 14, x_label, "middle"),
        _text(18, (TOP + bottom) / 2, y_label, "middle", f'transform="rotate(-90 18 {(TOP + bottom) / 2:.1f})"'),
    ]
    for x in x_ticks:
        at, _ = place(x, 0)
        parts += [_line(at, bottom, at, bottom + 5, "black"), _text(at, bottom + 20, f"{x:g}", "middle")]
    for y in y_ticks:
        _, at = place(0, y)
        parts += [_line(LEFT, at, right, at, "#dddddd"), _text(LEFT - 8, at + 4, f"{y:g}", "end")]
    parts += [_line(LEFT, bottom, right, bottom, "black"), _line(LEFT, TOP, LEFT, bottom, "black")]
    for number, each in enumerate(series):
        places = [place(x, y) for x, y in each.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{each.color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{each.color}"/>' for x, y in places]
        at = TOP + 14 + 20 * number
        parts.append(f'<rect x="{LEFT + 14}" y="{at - 10}" width="12" height="12" fill="{each.color}"/>')
        parts.append(_text(LEFT + 32, at, each.name, "start"))
    return "\n".join([*parts, "</svg>", ""])


def ticks(highest: float) -> list[float]:
    """Axis ticks from 0 to at least ``highest``: at most NUM_TICKS + 1, a round number apart."""
    highest = highest or 1.0
    rough = highest / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [number * step for number in range(math.ceil(highest / step - 1e-9) + 1)]


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'
