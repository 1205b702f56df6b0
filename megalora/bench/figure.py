"""A picture of a benchmark: speed, where the time goes, and memory, layout by layout, measured and
predicted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalora.bench.rows import Row

GIB = 2**30
MIB = 2**20
MEASURED, PREDICTED = "#0072B2", "#BBBBBB"
COLOURS = {
    "attention": "#0072B2", "experts": "#D55E00", "dispatch": "#E69F00", "mlp": "#CC79A7",
    "head": "#56B4E9",
    "reduction": "#009E73", "optimizer": "#F0E442", "bubble": "#FFFFFF", "other": "#999999",
}  # fmt: skip
"""Okabe and Ito's, which most people can tell apart; a bubble is empty."""
THICK = 0.36


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the PNG ``path``. Rows that failed say so where their bars would be."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(
        rows, key=lambda row: -row.measured.tokens_per_second_per_gpu if row.measured else 0
    )
    figure = Figure(figsize=(17, 2.2 + 0.62 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    speed, time, memory = figure.subplots(1, 3, sharey=True)
    _speed(speed, rows)
    _time(time, rows)
    _memory(memory, rows)
    speed.set_yticks(
        range(len(rows)), [_label(row) for row in rows], fontsize=8, family="monospace"
    )
    speed.set_ylim(len(rows) - 0.4, -0.6)  # the best on top
    figure.suptitle(_title(rows), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _label(row: Row) -> str:
    """Two lines: the grids, the rest."""
    grids, space, rest = row.layout.partition(" micro=")
    return f"{grids}\nmicro={rest}" if space else grids


def _title(rows: Sequence[Row]) -> str:
    for m in (row.measured for row in rows if row.measured):
        what = f"{m.global_batch_size} samples of {m.sequence_length + 1} tokens a step"
        return f"{m.num_ranks} x {m.device}: {what}, {m.weights} weights, {m.routing} routing"
    return "no layout ran"


def _speed(axes: Any, rows: Sequence[Row]) -> None:
    pairs = []
    for row in rows:
        m = row.measured
        p = row.predicted
        speed = m.tokens_per_second_per_gpu if m else None
        # The same tokens in the predicted time.
        pairs.append(
            (
                speed,
                m.tokens_per_second_per_gpu * m.step_seconds / p.step_seconds if m and p else None,
            )
        )
    _bars(axes, rows, pairs)
    axes.set_xlabel("tokens/s/GPU")


def _memory(axes: Any, rows: Sequence[Row]) -> None:
    most = max([max(row.measured.peak_bytes) for row in rows if row.measured], default=0)
    unit, name = (GIB, "GiB") if most >= GIB // 10 else (MIB, "MiB")
    pairs = [
        (max(row.measured.peak_bytes) / unit if row.measured else None,
         row.predicted.peak_bytes / unit if row.predicted else None)
        for row in rows
    ]  # fmt: skip
    _bars(axes, rows, pairs, note=False)
    axes.set_xlabel(f"peak memory of the fullest rank, {name}")


def _bars(
    axes: Any,
    rows: Sequence[Row],
    pairs: Sequence[tuple[float | None, float | None]],
    note: bool = True,
) -> None:
    """Measured above predicted for each row, with the number at the end; what failed, in words."""
    for y, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        for value, offset, colour in zip(
            pair, (-THICK / 2, THICK / 2), (MEASURED, PREDICTED), strict=True
        ):
            if value is not None:
                axes.barh(
                    y + offset, value, THICK, color=colour, edgecolor="#555555", linewidth=0.5
                )
                axes.annotate(
                    _number(value),
                    (value, y + offset),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
        if note and not row.ok:
            status = row.status if len(row.status) <= 70 else row.status[:67] + "..."
            axes.annotate(
                status,
                (0, y),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color="#AA0000",
            )
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    for label, colour in (("measured", MEASURED), ("predicted", PREDICTED)):
        axes.barh([0], [0], color=colour, edgecolor="#555555", label=label)
    _legend(axes, 2)


def _time(axes: Any, rows: Sequence[Row]) -> None:
    """One stack above the other: the measured parts of a step, the predicted ones."""
    for y, row in enumerate(rows):
        found = (
            row.measured.parts if row.measured else None,
            row.predicted.parts if row.predicted else None,
        )
        for parts, offset in zip(found, (-THICK / 2, THICK / 2), strict=True):
            left = 0.0
            for name, colour in COLOURS.items():
                width = 1e3 * (parts or {}).get(name, 0.0)
                axes.barh(
                    y + offset, width, THICK, left=left, color=colour, edgecolor="#555555",
                    linewidth=0.4,
                    alpha=1 if parts is found[0] else 0.5,
                )  # fmt: skip
                left += width
            if parts:
                which = "" if parts is found[0] else " predicted"
                text = _number(left) + which
                axes.annotate(
                    text,
                    (left, y + offset),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    for name, colour in COLOURS.items():
        axes.barh([0], [0], color=colour, edgecolor="#555555", linewidth=0.4, label=name)
    _legend(axes, 5)
    axes.set_xlabel("ms of a step on the slowest stage, every part timed")


def _legend(axes: Any, columns: int) -> None:
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, fontsize=7, frameon=False
    )
    axes.spines[["top", "right"]].set_visible(False)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
