"""Rows of a benchmark as a table to read and as files: ``results.csv``, ``results.json`` and
``layouts.png``. What failed is in all."""

import csv
from collections.abc import Sequence
from pathlib import Path

from megalora.bench.figure import draw
from megalora.bench.flops import FORMULA
from megalora.bench.rows import PARTS, Measured, Row, load_rows, save_rows
from megalora.config.checks import require

GIB = 2**30
COLUMNS = (
    "layout", "status", "tokens/s/GPU", "TFLOP/s", "step ms", "predicted ms", "error %", "peak GiB",
    "predicted GiB", "error %",
)  # fmt: skip


def write_results(rows: Sequence[Row], out: Path) -> dict[str, Path]:
    """Write all three into the folder ``out``; their paths by the kind ``csv``, ``json``, ``png``.

    The table and the picture show these rows; ``results.json`` keeps what else was measured into
    it. Raises ``ValueError`` without rows.
    """
    require(bool(rows), "there is no row to report: no layout was given")
    out.mkdir(parents=True, exist_ok=True)
    paths = {"csv": out / "results.csv", "json": out / "results.json", "png": out / "layouts.png"}
    save_rows(
        list(
            (
                {row.key: row for row in load_rows(paths["json"])} | {row.key: row for row in rows}
            ).values()
        ),
        paths["json"],
    )
    with paths["csv"].open("w", newline="") as file:
        written = [_flat(row) for row in rows]
        writer = csv.DictWriter(file, fieldnames=list(written[0]))
        writer.writeheader()
        writer.writerows(written)
    draw(rows, paths["png"])
    return paths


def table(rows: Sequence[Row]) -> str:
    """Two tables with the same layouts, the best first: speed and memory against prediction, and
    where a step's time goes."""
    rows = sorted(
        rows, key=lambda row: -row.measured.tokens_per_second_per_gpu if row.measured else 0
    )
    parts = [
        name for name in PARTS if any(row.measured and row.measured.parts[name] for row in rows)
    ]
    lines = [*_header(rows), "", *_aligned([list(COLUMNS), *(_cells(row) for row in rows)])]
    if done := [row for row in rows if row.measured]:
        head = [
            "ms of a step, slowest stage",
            *parts,
            "bare step",
            "timed step",
            "imbalance",
            "worst",
        ]
        lines += ["", *_aligned([head, *(_part_cells(row, parts) for row in done)])]
    failed = [row for row in rows if not row.ok and row.log]
    lines += (
        ["", *(f"{row.layout}\n  {row.status}\n  see {row.log}" for row in failed)]
        if failed
        else []
    )
    return "\n".join(lines)


def _header(rows: Sequence[Row]) -> list[str]:
    """What all of it rests on."""
    found = [row.measured for row in rows if row.measured]
    bases = sorted({row.predicted.basis for row in rows if row.predicted})
    lines = [f"predicted from {basis}" for basis in bases]
    on = dict.fromkeys(
        f"{m.num_ranks} x {m.device};"
        f" {', '.join(f'{name} {version}' for name, version in m.versions.items())}"
        for m in found
    )
    for m in found[:1]:
        lines = [
            *on,
            (
                f"{m.global_batch_size} samples of {m.sequence_length + 1} tokens a step"
                f" ({m.tokens}), {m.weights} weights, {m.routing} routing; peak memory:"
                f" {m.memory_from}"
            ),
            f"TFLOP/s per GPU by {FORMULA}; nothing counted twice where it is recomputed",
            *lines,
        ]
    return lines


def _cells(row: Row) -> list[str]:
    m = row.measured
    p = row.predicted
    peak = max(m.peak_bytes) if m else None
    status = row.status if len(row.status) <= 60 else row.status[:57] + "..."
    return [
        row.layout,
        status,
        f"{m.tokens_per_second_per_gpu:,.0f}" if m else "-",
        _short(m.model_tflops) if m else "-",
        f"{m.step_seconds * 1e3:,.1f}" if m else "-",
        f"{p.step_seconds * 1e3:,.1f}" if p else "-",
        _error(p.step_seconds if p else None, m.step_seconds if m else None),
        _short(peak / GIB) if peak else "-",
        _short(p.peak_bytes / GIB) if p else "-",
        _error(p.peak_bytes if p else None, peak),
    ]


def _part_cells(row: Row, parts: Sequence[str]) -> list[str]:
    m = row.measured
    assert m is not None
    uneven = [
        "-" if value is None else f"{value:.3f}" for value in (m.imbalance, m.imbalance_worst)
    ]
    times = [m.parts[name] for name in parts] + [m.step_seconds, m.marked_step_seconds]
    return [row.layout, *(f"{seconds * 1e3:,.1f}" for seconds in times), *uneven]


def _error(predicted: float | None, measured: float | None) -> str:
    """In percent of what was measured; above zero where too much was predicted."""
    return f"{100 * (predicted / measured - 1):+.1f}" if predicted is not None and measured else "-"


def _short(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _aligned(cells: list[list[str]]) -> list[str]:
    """The first two columns from the left, numbers from the right; a line under the first row."""
    texts = 2 if cells[0][:2] == list(COLUMNS[:2]) else 1
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(
            c.ljust(w) if i < texts else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _flat(row: Row) -> dict[str, object]:
    """One line of the CSV; times in seconds, memory in bytes, empty where nothing is known."""
    m = row.measured
    p = row.predicted
    peak = max(m.peak_bytes) if m else None
    names: tuple[str, ...] = (
        "num_ranks", "device", "routing", "weights", "step_seconds", "step_seconds_min",
        "step_seconds_max",
        "tokens_per_second_per_gpu", "model_tflops", "hardware_tflops", "imbalance",
        "imbalance_worst", "marked_step_seconds",
    )  # fmt: skip
    flat: dict[str, object] = {"layout": row.layout, "status": row.status}
    flat |= {name: getattr(m, name) if m else None for name in names}
    flat |= {"predicted_step_seconds": p.step_seconds if p else None, "peak_bytes": peak}
    flat |= {
        "reserved_bytes": _most_reserved(m),
        "predicted_peak_bytes": p.peak_bytes if p else None,
    }
    for name in PARTS:
        flat[f"{name}_seconds"] = m.parts[name] if m else None
        flat[f"predicted_{name}_seconds"] = p.parts.get(name) if p else None
    return flat | {"prediction_basis": p.basis if p else None, "log": row.log}


def _most_reserved(m: Measured | None) -> int | None:
    return max(m.reserved_bytes) if m and m.reserved_bytes else None
