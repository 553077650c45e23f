"""Curves as SVG: thinned honestly, drawn in the colours of the page."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

POINTS = 1000  # of a curve; more would not be seen
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 8, 22  # margins of a panel


@dataclass(frozen=True)
class Curve:
    """One column of rows, and how it reads."""

    key: str
    title: str
    say: Callable[[float], str]  # a value as text
    from_zero: bool = True
    size: tuple[int, int] = (360, 150)  # of its panel in pixels, where the page has room


@dataclass(frozen=True)
class Point:
    """Some rows in a row, as one; without values where none of them has one."""

    step: float  # the mean of their steps
    mean: float
    low: float
    high: float

    @property
    def exists(self) -> bool:
        """Whether there is a value to draw."""
        return not math.isnan(self.mean)


def rows_of_a_point(count: int) -> int:
    """How many of `count` rows a point of a curve stands for."""
    return max(-(-count // POINTS), 1)


def thin(rows: Sequence[dict[str, Any]], key: str) -> list[Point]:
    """At most POINTS points, each of as many rows: the mean of what they hold, its least and its greatest value, so
    that no peak goes. Rows without a value (a loss that is not finite) count for nothing."""
    size, points = rows_of_a_point(len(rows)), []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        values = [row[key] for row in part if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
        step = sum(row["step"] for row in part) / len(part)
        mean, low, high = (sum(values) / len(values), min(values), max(values)) if values else (math.nan,) * 3
        points.append(Point(step, mean, low, high))
    return points


def panel(curve: Curve, points: list[Point], marks: list[int]) -> str:
    """A curve as an HTML figure with its newest value, or nothing where there is none to draw.

    Args:
        marks: steps to mark by a line, where the run went on after a break.
    """
    drawn = [point for point in points if point.exists]
    if not drawn:
        return ""
    low, high = min(point.low for point in drawn), max(point.high for point in drawn)
    said = f"{curve.say(low)} to {curve.say(high)}" if low < high else "all along"
    return (
        f"<figure><figcaption><b>{escape(curve.title)}</b><span class=now>{escape(curve.say(drawn[-1].mean))}</span>"
        f"<span class=range>{escape(said)}</span></figcaption>{_svg(curve, points, drawn, marks)}</figure>"
    )


def _svg(curve: Curve, points: list[Point], drawn: list[Point], marks: list[int]) -> str:
    width, height = curve.size
    left, right = points[0].step, max(points[-1].step, points[0].step + 1)
    low = 0.0 if curve.from_zero else min(point.low for point in drawn)
    high = max(point.high for point in drawn)
    ticks = nice_ticks(low, high if high > low else low + (abs(low) or 1.0), height // 45)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x(step: float) -> float:
        return LEFT + (step - left) / (right - left) * (width - LEFT - RIGHT)

    def y(value: float) -> float:
        return height - BOTTOM - (value - low) / (high - low) * (height - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(curve.title)} by step">']
    for tick in ticks:
        parts.append(f'<line class=grid x1={LEFT} x2={width - RIGHT} y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x={LEFT - 6} y="{y(tick) + 3.5:.1f}" class=left>{escape(curve.say(tick))}</text>')
    for tick in (tick for tick in nice_ticks(left, right, width // 70) if left <= tick <= right):
        parts.append(f'<text x="{x(tick):.1f}" y={height - 6} class=below>{short(tick)}</text>')
    for mark in (mark for mark in marks if left <= mark <= right):
        line = f'<line class=mark x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1={TOP} y2={height - BOTTOM}>'
        parts.append(f"{line}<title>went on from step {mark:,}</title></line>")
    for run in _unbroken(points):
        if any(point.low < point.high for point in run):
            around = [(p.step, p.high) for p in run] + [(p.step, p.low) for p in reversed(run)]
            parts.append(f'<polygon class=band points="{_path(around, x, y)}"/>')
        parts.append(f'<polyline class=line points="{_path([(p.step, p.mean) for p in run], x, y)}"/>')
    for point in (point for point in points if not point.exists):
        parts.append(f'<circle class=lost cx="{x(point.step):.1f}" cy={TOP + 4} r=3><title>no value</title></circle>')
    return "".join([*parts, "</svg>"])


def _path(corners: list[tuple[float, float]], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in corners)


def _unbroken(points: list[Point]) -> list[list[Point]]:
    """The points in runs without a gap; one alone is doubled, for a line of one point is not seen."""
    runs: list[list[Point]] = [[]]
    for point in points:
        if point.exists:
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run * 2 if len(run) == 1 else run for run in runs if run]


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, that reach from `low` or below it to `high` or above."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    apart = next(step * power for step in (1, 2, 5, 10) if step * power >= raw * 0.999)
    first, last = math.floor(low / apart + 1e-9), math.ceil(high / apart - 1e-9)
    return [number * apart for number in range(first, last + 1)]


def short(step: float) -> str:
    """A step in few letters: 1,500 -> 1.5k."""
    return f"{step:g}" if step < 1000 else f"{step / 1e3:g}k" if step < 1e6 else f"{step / 1e6:g}M"
