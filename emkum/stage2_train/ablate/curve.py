"""The curve of an ablation over one numeric axis of its grid, as one SVG file with nothing to load."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from emkum.stage2_train.ablate.results import Line, Spread
from emkum.stage2_train.report import ticks

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 34, 48  # margins
LEGEND_LINE = 18
MOST_MARKS = 8  # on the axis below
LOG_FROM = 20  # an axis whose largest value is so many times its smallest is logarithmic
COLOURS = ("#1f6fc4", "#c2571a", "#1a7f4b", "#7a4fb3", "#8a6d00", "#b03060")


@dataclass(frozen=True)
class Point:
    x: float
    spread: Spread


@dataclass(frozen=True)
class Curve:
    """The best score over the axis `path`, a line for each combination of everything else."""

    path: str
    score_name: str
    lines: tuple[tuple[str, tuple[Point, ...]], ...]


def curve_of(lines: Sequence[Line]) -> Curve | None:
    """The curve, if exactly one axis of the grid is numeric with two values or more, and two variants are finished."""
    values: dict[str, set[float]] = {}
    for line in lines:
        for path, value in line.variant.axes.items():
            values.setdefault(path, set()).add(value if type(value) in (int, float) else math.nan)
    numeric = [path for path, found in values.items() if len(found) > 1 and not any(math.isnan(x) for x in found)]
    done = [line for line in lines if line.best is not None]
    if len(numeric) != 1 or len({line.score_name for line in done}) != 1:
        return None
    path = numeric[0]
    drawn: dict[str, list[Point]] = {}
    for line in done:
        if path in line.variant.axes and line.best is not None:
            others = [f"{key.rpartition('.')[2]}={x}" for key, x in line.variant.axes.items() if key != path]
            drawn.setdefault(" ".join([line.variant.base, *others]).strip(), []).append(
                Point(float(line.variant.axes[path]), line.best)
            )
    if max(map(len, drawn.values()), default=0) < 2:
        return None
    ordered = tuple((name, tuple(sorted(points, key=lambda point: point.x))) for name, points in drawn.items())
    return Curve(path, done[0].score_name, ordered)


def svg(curve: Curve, title: str) -> str:
    """The curve as an SVG document: means as dots, standard deviations as bars through them."""
    points = [point for _, line in curve.lines for point in line]
    xs = [point.x for point in points]
    logarithmic = min(xs) > 0 and max(xs) / min(xs) >= LOG_FROM
    named = [name for name, _ in curve.lines if name]
    height = HEIGHT + LEGEND_LINE * len(named)
    x_marks = sorted(set(xs))
    if len(x_marks) > MOST_MARKS:
        x_marks = x_marks[:: -(-len(x_marks) // MOST_MARKS)] if logarithmic else ticks(min(xs), max(xs), 5)
    low = min(point.spread.mean - (point.spread.deviation or 0) for point in points)
    high = max(point.spread.mean + (point.spread.deviation or 0) for point in points)
    y_marks = ticks(low, high, 5)
    start, end = min(*xs, *x_marks), max(*xs, *x_marks)

    def across(x: float) -> float:
        place = math.log(x / start) / math.log(end / start) if logarithmic else (x - start) / (end - start)
        return LEFT + 14 + place * (WIDTH - LEFT - RIGHT - 28)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_marks[0]) / (y_marks[-1] - y_marks[0]) * (HEIGHT - TOP - BOTTOM)

    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>', _label(LEFT, 20, title, "start", "600")]
    for y in y_marks:
        parts.append(f'<path d="M{LEFT} {down(y):.1f}H{right}" stroke="#dfe3e8"/>')
        parts.append(_label(LEFT - 7, down(y) + 4, f"{y:.6g}", "end"))
    for x in x_marks:
        parts.append(f'<path d="M{across(x):.1f} {bottom}v5" stroke="#5a6675"/>')
        parts.append(_label(across(x), bottom + 18, f"{x:.6g}", "middle"))
    parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#5a6675"/>')
    axis = curve.path + (" (logarithmic)" if logarithmic else "")
    parts.append(_label((LEFT + right) / 2, HEIGHT - 10, axis, "middle"))
    middle = (TOP + bottom) / 2
    parts.append(
        f'<g transform="translate(15 {middle:.0f}) rotate(-90)">{_label(0, 0, curve.score_name, "middle")}</g>'
    )
    for number, (name, line) in enumerate(curve.lines):
        colour = COLOURS[number % len(COLOURS)]
        joined = "L".join(f"{across(point.x):.1f} {down(point.spread.mean):.1f}" for point in line)
        parts.append(f'<path d="M{joined}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for point in line:
            x, mean, deviation = across(point.x), point.spread.mean, point.spread.deviation
            if deviation:
                parts.append(
                    f'<path d="M{x:.1f} {down(mean - deviation):.1f}V{down(mean + deviation):.1f}" stroke="{colour}"/>'
                )
            parts.append(f'<circle cx="{x:.1f}" cy="{down(mean):.1f}" r="3.5" fill="{colour}"/>')
        if name:
            y = HEIGHT + LEGEND_LINE * named.index(name)
            parts.append(f'<path d="M{LEFT} {y}h22" stroke="{colour}" stroke-width="2"/>')
            parts.append(_label(LEFT + 30, y + 4, name, "start"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" font-family="system-ui,sans-serif" font-size="12">\n<title>{html.escape(title)}</title>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _label(x: float, y: float, text: str, anchor: str, weight: str = "400") -> str:
    clean = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="#1c2430">'
        f"{html.escape(clean)}</text>"
    )
