"""Draw speed, parts of a step and memory of each layout of a benchmark, beside the predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalora.bench.rows import Row, fastest_first

GIB = 2**30
MIB = 2**20
MEASURED = "#0072B2"
PREDICTED = "#BBBBBB"
COLOURS = {
    "attention": "#0072B2", "experts": "#D55E00", "dispatch": "#E69F00", "mlp": "#CC79A7",
    "head": "#56B4E9",
    "reduction": "#009E73", "optimizer": "#F0E442", "bubble": "#FFFFFF", "other": "#999999",
    "reference": "#000000",
}  # fmt: skip
"""The colours of Okabe and Ito, which most people can tell apart; a bubble is empty."""
THICK = 0.36
"""Height of a bar, where a row is 1 high; two stand above each other."""
OFFSETS = (-THICK / 2, THICK / 2)
"""Places of the measured and the predicted bar, from the middle of a row; the y axis points down.
"""
MAX_STATUS = 70
"""Characters of a status that fit into the picture."""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the PNG ``path``. Rows that failed say so where their bars would be."""
    # Not pyplot, which keeps every figure alive and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = fastest_first(rows)
    figure = Figure(figsize=(17, 2.2 + 0.62 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    speed, time, memory = figure.subplots(1, 3, sharey=True)
    _speed(speed, rows)
    _time(time, rows)
    _memory(memory, rows)
    labels = [_label(row) for row in rows]
    speed.set_yticks(range(len(rows)), labels, fontsize=8, family="monospace")
    # The axis points down, so that the fastest layout is on top.
    speed.set_ylim(len(rows) - 0.4, -0.6)
    figure.suptitle(_title(rows), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _label(row: Row) -> str:
    """Two lines: the grids, the rest."""
    grids, space, rest = row.layout.partition(" micro=")
    return f"{grids}\nmicro={rest}" if space else grids


def _title(rows: Sequence[Row]) -> str:
    # All layouts do the same work, so any row that was measured can name it.
    for row in rows:
        m = row.measured
        if m is not None:
            what = f"{m.global_batch_size} samples of {m.sequence_length + 1} tokens a step"
            return f"{m.num_ranks} x {m.device}: {what}, {m.weights} weights, {m.routing} routing"
    return "no layout ran"


def _speed(axes: Any, rows: Sequence[Row]) -> None:
    pairs: list[_Pair] = []
    for row in rows:
        speed = predicted = None
        m = row.measured
        p = row.predicted
        if m is not None:
            speed = m.tokens_per_second_per_gpu
            if p is not None:
                # The same tokens in the predicted time.
                predicted = speed * m.step_seconds / p.step_seconds
        pairs.append((speed, predicted))
    _bars(axes, pairs)
    for y, row in enumerate(rows):
        if not row.ok:
            _annotate_failure(axes, y, row.status)
    axes.set_xlabel("tokens/s/GPU")


def _memory(axes: Any, rows: Sequence[Row]) -> None:
    peaks = [max(row.measured.peak_bytes) for row in rows if row.measured]
    # A tiny model takes a few MiB.
    unit, name = (GIB, "GiB") if max(peaks, default=0) >= GIB // 10 else (MIB, "MiB")
    pairs: list[_Pair] = []
    for row in rows:
        measured = predicted = None
        if row.measured:
            measured = max(row.measured.peak_bytes) / unit
        if row.predicted:
            predicted = row.predicted.peak_bytes / unit
        pairs.append((measured, predicted))
    _bars(axes, pairs)
    axes.set_xlabel(f"peak memory of the fullest rank, {name}")


type _Pair = tuple[float | None, float | None]
"""Measured and predicted; None where it is not known."""


def _bars(axes: Any, pairs: Sequence[_Pair]) -> None:
    """The measured bar above the predicted one for each row, with the number at its end."""
    for y, pair in enumerate(pairs):
        for value, offset, colour in zip(pair, OFFSETS, (MEASURED, PREDICTED), strict=True):
            if value is None:
                continue
            axes.barh(y + offset, value, THICK, color=colour, edgecolor="#555555", linewidth=0.5)
            _annotate(axes, _number(value), value, y + offset)
    # Room at the right for the numbers.
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    for label, colour in (("measured", MEASURED), ("predicted", PREDICTED)):
        axes.barh([0], [0], color=colour, edgecolor="#555555", label=label)
    _legend(axes, 2)


def _time(axes: Any, rows: Sequence[Row]) -> None:
    """One stack above the other: the measured parts of a step, the predicted ones."""
    above, below = OFFSETS
    for y, row in enumerate(rows):
        if row.measured:
            end = _stack(axes, row.measured.parts, y + above, alpha=1)
            _annotate(axes, _number(end), end, y + above)
        if row.predicted:
            end = _stack(axes, row.predicted.parts, y + below, alpha=0.5)
            _annotate(axes, f"{_number(end)} predicted", end, y + below)
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    # Empty bars, one of each colour, for the legend.
    for name, colour in COLOURS.items():
        axes.barh([0], [0], color=colour, edgecolor="#555555", linewidth=0.4, label=name)
    _legend(axes, 5)
    axes.set_xlabel("ms of a step on the slowest stage, every part timed")


def _stack(axes: Any, parts: dict[str, float], y: float, alpha: float) -> float:
    """Draw the parts of a step one behind the other; returns where they end, in ms."""
    left = 0.0
    for name, colour in COLOURS.items():
        width = 1e3 * parts.get(name, 0.0)
        axes.barh(
            y, width, THICK, left=left, color=colour, edgecolor="#555555", linewidth=0.4,
            alpha=alpha,
        )  # fmt: skip
        left += width
    return left


def _annotate(axes: Any, text: str, x: float, y: float, colour: str = "black") -> None:
    """Write a small text a few points to the right of a place."""
    axes.annotate(
        text, (x, y), (3, 0), textcoords="offset points", va="center", fontsize=7, color=colour
    )


def _annotate_failure(axes: Any, y: float, status: str) -> None:
    """Say in red why a layout has no bar."""
    if len(status) > MAX_STATUS:
        status = status[: MAX_STATUS - 3] + "..."
    _annotate(axes, status, 0, y, colour="#AA0000")


def _legend(axes: Any, columns: int) -> None:
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, fontsize=7, frameon=False
    )
    axes.spines[["top", "right"]].set_visible(False)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
