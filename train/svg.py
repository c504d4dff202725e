"""Line charts as SVG, for a page without scripts: colours come from its style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 270
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 12, 34
MOST_POINTS = 300

Number = int | float
Points = Sequence[tuple[Number, Number | None]]


@dataclass(frozen=True)
class Line:
    """A curve; None breaks it. `colour` counts from 0; faint ones show their spread as a shade."""

    label: str
    points: Points
    colour: int = 0
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Band:
    """Where curves are expected: at each x from low to high."""

    label: str
    points: Sequence[tuple[Number, Number, Number]]


def chart(
    title: str, x_label: str, lines: Sequence[Line], band: Band | None = None, zero: bool = False
) -> str:
    """An `<svg>`, or nothing if there is nothing to draw. `zero`: the y axis begins at 0."""
    thinned = [(line, _thinned(line.points)) for line in lines]
    xs = [x for _, points in thinned for x, *_ in points]
    ys = [y for _, points in thinned for _, _, low, high in points for y in (low, high)]
    inside = []
    if band is not None and xs:
        inside = [point for point in band.points if min(xs) <= point[0] <= max(xs)]
        ys += [y for _, low, high in inside for y in (low, high)]
    if not ys:
        return ""
    x_ticks, y_ticks = _ticks(min(xs), max(xs), 8), _ticks(0.0 if zero else min(ys), max(ys), 5)
    x_from, x_to = min(xs), max(max(xs), min(xs) + 1e-9)
    y_from, y_to = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def at(x: Number, y: Number) -> str:
        across = (x - x_from) / (x_to - x_from) * (WIDTH - LEFT - RIGHT)
        up = (y - y_from) / ((y_to - y_from) or 1.0) * (HEIGHT - TOP - BOTTOM)
        return f"{LEFT + across:.1f},{HEIGHT - BOTTOM - up:.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in y_ticks:
        left, height = at(x_from, y).split(",")
        parts.append(f'<path class="grid" d="M{left},{height}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="y" x="{LEFT - 8}" y="{float(height) + 4:.1f}">{short(y)}</text>'
        )
    for x in x_ticks:
        if x_from <= x <= x_to:
            across = at(x, y_from).split(",")[0]
            parts.append(f'<text class="x" x="{across}" y="{HEIGHT - 17}">{short(x)}</text>')
    right = WIDTH - RIGHT
    parts.append(f'<text class="axis" x="{right}" y="{HEIGHT - 3}">{escape(x_label)}</text>')
    if len(inside) > 1:
        upper = [at(x, high) for x, _, high in inside]
        lower = [at(x, low) for x, low, _ in reversed(inside)]
        parts.append(f'<path class="band" d="M{"L".join(upper + lower)}Z"/>')
    for line, points in thinned:
        colour = f"c{line.colour % 6}"
        if line.faint and any(high > low for _, _, low, high in points):
            upper = [at(x, high) for x, _, _, high in points]
            lower = [at(x, low) for x, _, low, _ in reversed(points)]
            parts.append(f'<path class="spread {colour}" d="M{"L".join(upper + lower)}Z"/>')
        kind = "line faint" if line.faint else "line"
        path = "L".join(at(x, y) for x, y, _, _ in points)
        if len(points) > 1:
            parts.append(f'<path class="{kind} {colour}" d="M{path}"/>')
        if line.dots or len(points) == 1:
            for x, y, _, _ in points:
                cx, cy = at(x, y).split(",")
                what = escape(f"{line.label}: {y:.4f} at {short(x)}")
                parts.append(
                    f'<circle class="{colour}" cx="{cx}" cy="{cy}" r="3"><title>{what}</title>'
                    "</circle>"
                )
    return "".join([*parts, "</svg>"])


def short(x: Number) -> str:
    """Such as 0.0003, 250, 12k, 3.4M."""
    size = abs(x)
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor * (10 if letter == "k" else 1):
            return f"{x / factor:.4g}{letter}"
    if 0 < size < 1e-3:
        return f"{x:.2g}"
    return f"{x:.4g}"


def _thinned(points: Points) -> list[tuple[Number, Number, Number, Number]]:
    """At most so many points: x, mean, least and most of runs of equal length."""
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    size = -(-len(known) // MOST_POINTS) or 1
    result = []
    for first in range(0, len(known), size):
        part = known[first : first + size]
        ys = [y for _, y in part]
        x = part[-1][0] if first + size >= len(known) else sum(x for x, _ in part) / len(part)
        result.append((x, sum(ys) / len(ys), min(ys), max(ys)))
    return result


def _ticks(low: Number, high: Number, about: int) -> list[float]:
    """Round numbers from below `low` to above `high`."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / about))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]
