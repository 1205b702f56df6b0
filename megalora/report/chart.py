"""Draw quantities over steps as SVG, several runs in one picture.

A chart is 360 units wide, so that its text is as large on a phone as it was drawn; wider screens
show several beside each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megalora.report.axis import brief, ticks
from megalora.report.colours import SERIES
from megalora.report.records import Series

WIDTH = 360
HEIGHT = 210
LEFT = 52
RIGHT = 350
TOP = 10
BOTTOM = 180
MOST_POINTS = 300
"""Of a longer series the mean of neighbours is drawn, over a band from the least to the largest."""


@dataclass(frozen=True)
class Curve:
    """One quantity of one run in a chart."""

    run: int
    """Number of the run, which decides colour and dashes."""
    label: str
    series: Series
    dots: bool = False
    """Mark every value, as of evaluations, which are few."""


@dataclass(frozen=True)
class Point:
    """What stands at one place of a curve."""

    step: float
    mean: float
    low: float
    high: float


def thinned(series: Series) -> list[Point]:
    """The points to draw: every value, or stretches of a longer series."""
    count = len(series.steps)
    size = -(-count // MOST_POINTS)
    points: list[Point] = []
    for start in range(0, count, size):
        steps = series.steps[start : start + size]
        values = series.values[start : start + size]
        mean = sum(values) / len(values)
        points.append(Point(sum(steps) / len(steps), mean, min(values), max(values)))
    return points


class _Scale:
    """From values of one axis to places in the picture."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        # A constant is drawn in the middle.
        if low == high:
            room = abs(low) * 0.05 or 1.0
            low -= room
            high += room
        self.low = low
        self.high = high
        self.start = start
        self.end = end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def chart(title: str, curves: Sequence[Curve]) -> str:
    """A figure with its title, picture, and a table of each curve's numbers; nothing without
    values."""
    drawn = [(curve, thinned(curve.series)) for curve in curves if curve.series.steps]
    if not drawn:
        return ""
    points = [point for _, of_curve in drawn for point in of_curve]
    x = _Scale(
        min(point.step for point in points), max(point.step for point in points), LEFT, RIGHT
    )
    # SVG's y axis points down.
    y = _Scale(min(point.low for point in points), max(point.high for point in points), BOTTOM, TOP)
    parts = [
        f'<figure class="chart"><h3>{escape(title)}</h3>',
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over steps">',
        *_axes(x, y),
    ]
    for curve, of_curve in drawn:
        parts += _curve(curve, of_curve, x, y)
    parts.append("</svg>")
    parts.append(_numbers([curve for curve, _ in drawn]))
    parts.append("</figure>")
    return "\n".join(parts)


def _axes(x: _Scale, y: _Scale) -> list[str]:
    parts: list[str] = []
    for value in ticks(y.low, y.high):
        at = y(value)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(
            f'<text class="y" x="{LEFT - 5}" y="{at}" dy="4" text-anchor="end"'
            f' data-value="{value!r}">{brief(value)}</text>'
        )
    for value in ticks(x.low, x.high):
        at = x(value)
        parts.append(
            f'<text class="x" x="{at}" y="{BOTTOM + 16}" text-anchor="middle"'
            f' data-value="{value!r}">{brief(value)}</text>'
        )
    parts.append(f'<path class="axis frame" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>')
    parts.append(
        f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 2}" text-anchor="middle">step</text>'
    )
    return parts


def _curve(curve: Curve, points: Sequence[Point], x: _Scale, y: _Scale) -> list[str]:
    kind = SERIES[curve.run]
    title = f"<title>{escape(curve.label)}</title>"
    parts: list[str] = []
    if any(point.low < point.high for point in points):
        upper = [f"{x(p.step)},{y(p.high)}" for p in points]
        lower = [f"{x(p.step)},{y(p.low)}" for p in reversed(points)]
        parts.append(f'<polygon class="band {kind}" points="{" ".join([*upper, *lower])}"/>')
    if curve.dots or len(points) == 1:
        for point in points:
            parts.append(
                f'<circle class="dot {kind}" cx="{x(point.step)}" cy="{y(point.mean)}" r="3">'
                f"{title}</circle>"
            )
    # Between dots a line only leads the eye; in one run's chart it must not look like training.
    kind += " pale" if curve.dots else ""
    places = " ".join(f"{x(p.step)},{y(p.mean)}" for p in points)
    parts.append(f'<polyline class="line {kind}" points="{places}">{title}</polyline>')
    return parts


def _numbers(curves: Sequence[Curve]) -> str:
    """A table that says what the picture shows, for those who cannot see it."""
    rows = ["<tr><th>curve</th><th>first</th><th>last</th><th>least</th><th>largest</th></tr>"]
    for curve in curves:
        values = curve.series.values
        cells = [f"<td>{escape(curve.label)}</td>"]
        for value in (values[0], values[-1], min(values), max(values)):
            cells.append(f'<td class="n">{value:.6g}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        '<details><summary class="muted">numbers</summary><div class="wide"><table>'
        f"{''.join(rows)}</table></div></details>"
    )
