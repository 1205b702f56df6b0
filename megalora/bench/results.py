"""Report a benchmark: a table to read, ``results.csv``, ``results.json`` and ``layouts.png``.

Layouts that failed are in all of them.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

from megalora.bench.figure import draw
from megalora.bench.flops import FORMULA
from megalora.bench.rows import PARTS, Measured, Row, fastest_first, load_rows, save_rows
from megalora.config.checks import require

GIB = 2**30
COLUMNS = (
    "layout", "status", "tokens/s/GPU", "TFLOP/s", "step ms", "predicted ms", "error %", "peak GiB",
    "predicted GiB", "error %",
)  # fmt: skip
"""Heads of the first table."""
MAX_STATUS = 60
"""Characters of a status in the table; an error message may be far longer."""
MEASURED_COLUMNS = (
    "num_ranks", "device", "routing", "weights", "step_seconds", "step_seconds_min",
    "step_seconds_max", "tokens_per_second_per_gpu", "model_tflops", "hardware_tflops",
    "imbalance", "imbalance_worst", "marked_step_seconds",
)  # fmt: skip
"""Fields of ``Measured`` that the CSV has under their own names."""


def write_results(rows: Sequence[Row], out: Path) -> dict[str, Path]:
    """Write the three files into the folder ``out``.

    The CSV and the picture show these rows; ``results.json`` also keeps the rows that were
    measured into it before.

    Returns:
        The paths by the kind ``csv``, ``json``, ``png``.
    Raises:
        ValueError: there are no rows.
    """
    require(bool(rows), "there is no row to report: no layout was given")
    out.mkdir(parents=True, exist_ok=True)
    paths = {"csv": out / "results.csv", "json": out / "results.json", "png": out / "layouts.png"}
    _merge_into(paths["json"], rows)
    with paths["csv"].open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=_csv_columns())
        writer.writeheader()
        for row in rows:
            writer.writerow(_csv_row(row))
    draw(rows, paths["png"])
    return paths


def _merge_into(path: Path, rows: Sequence[Row]) -> None:
    """Replace the rows of ``path`` that have the same key, and add the others at the end."""
    by_key: dict[str, Row] = {}
    for row in [*load_rows(path), *rows]:
        by_key[row.key] = row
    save_rows(list(by_key.values()), path)


def table(rows: Sequence[Row]) -> str:
    """Two tables of the same layouts, the fastest first, then the errors of those that failed.

    The first compares speed and memory with the prediction, the second shows where the time of a
    step goes.
    """
    rows = fastest_first(rows)
    first: list[list[str]] = [list(COLUMNS)]
    for row in rows:
        first.append(_cells(row))
    # Layout and status are texts, the rest numbers.
    lines = [*_header(rows), "", *_aligned(first, num_texts=2)]
    done = [row for row in rows if row.measured]
    if done:
        lines += ["", *_part_table(done)]
    # A layout that was refused has no log: no process was started for it.
    failed = [row for row in rows if not row.ok and row.log]
    if failed:
        lines.append("")
    for row in failed:
        lines.append(f"{row.layout}\n  {row.status}\n  see {row.log}")
    return "\n".join(lines)


def _header(rows: Sequence[Row]) -> list[str]:
    """The machines, the work and the formula that the numbers below are to be read with."""
    bases: set[str] = set()
    lines: list[str] = []
    first: Measured | None = None
    for row in rows:
        if row.predicted:
            bases.add(f"predicted from {row.predicted.basis}")
        if row.measured:
            first = first or row.measured
            machine = _machine(row.measured)
            # Rows of an earlier run may come from another version, which then is a line of its own.
            if machine not in lines:
                lines.append(machine)
    if first is None:
        return sorted(bases)
    # The work is the same in all rows, so the first one says it.
    m = first
    lines.append(
        f"{m.global_batch_size} samples of {m.sequence_length + 1} tokens a step ({m.tokens}),"
        f" {m.weights} weights, {m.routing} routing; peak memory: {m.memory_from}"
    )
    lines.append(f"TFLOP/s per GPU by {FORMULA}; nothing counted twice where it is recomputed")
    return [*lines, *sorted(bases)]


def _machine(m: Measured) -> str:
    """Where a row was measured, and with which versions."""
    versions = [f"{name} {version}" for name, version in m.versions.items()]
    return f"{m.num_ranks} x {m.device}; {', '.join(versions)}"


def _cells(row: Row) -> list[str]:
    """A row of the first table, in the order of ``COLUMNS``; a dash where nothing is known."""
    speed = tflops = step = peak = "-"
    predicted_step = predicted_peak = "-"
    step_error = peak_error = "-"
    m = row.measured
    p = row.predicted
    if m is not None:
        speed = f"{m.tokens_per_second_per_gpu:,.0f}"
        tflops = _short(m.model_tflops)
        step = _milliseconds(m.step_seconds)
        # Memory has to suffice on the fullest rank.
        peak = _short(max(m.peak_bytes) / GIB)
    if p is not None:
        predicted_step = _milliseconds(p.step_seconds)
        predicted_peak = _short(p.peak_bytes / GIB)
    if m is not None and p is not None:
        step_error = _error(p.step_seconds, m.step_seconds)
        peak_error = _error(p.peak_bytes, max(m.peak_bytes))
    status = row.status
    if len(status) > MAX_STATUS:
        status = status[: MAX_STATUS - 3] + "..."
    return [
        row.layout, status, speed, tflops, step, predicted_step, step_error, peak, predicted_peak,
        peak_error,
    ]  # fmt: skip


def _part_table(rows: Sequence[Row]) -> list[str]:
    """Where the time of a step goes, for rows that were measured."""
    parts = [name for name in PARTS if _takes_time(name, rows)]
    head = ["ms of a step, slowest stage", *parts, "bare step", "timed step", "imbalance", "worst"]
    cells = [head]
    for row in rows:
        cells.append(_part_cells(row, parts))
    return _aligned(cells, num_texts=1)


def _takes_time(part: str, rows: Sequence[Row]) -> bool:
    """Whether any layout spends time in a part: a dense model has no experts, for example."""
    # Results of an earlier version may lack a part, here and below.
    return any(row.measured and row.measured.parts.get(part) for row in rows)


def _part_cells(row: Row, parts: Sequence[str]) -> list[str]:
    m = row.measured
    assert m is not None
    cells = [row.layout]
    for name in parts:
        cells.append(_milliseconds(m.parts.get(name, 0.0)))
    cells.append(_milliseconds(m.step_seconds))
    cells.append(_milliseconds(m.marked_step_seconds))
    for value in (m.imbalance, m.imbalance_worst):
        # None without expert parallelism: there is nothing to be uneven between.
        cells.append("-" if value is None else f"{value:.3f}")
    return cells


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"


def _error(predicted: float, measured: float) -> str:
    """In percent of what was measured; above zero where too much was predicted."""
    if not measured:
        return "-"
    return f"{100 * (predicted / measured - 1):+.1f}"


def _short(value: float) -> str:
    """Two decimals, or three significant digits of a number below one."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _aligned(rows: list[list[str]], num_texts: int) -> list[str]:
    """Lines of a table with a rule under its head.

    Args:
        rows: cells, the head first.
        num_texts: so many columns are texts, which start at the left; numbers end at the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(cell.ljust(width) if i < num_texts else cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    rule = "-" * max(map(len, lines))
    return [lines[0], rule, *lines[1:]]


def _csv_columns() -> list[str]:
    """Heads of the CSV. Times are in seconds, memory in bytes."""
    columns = ["layout", "status", *MEASURED_COLUMNS]
    columns += ["predicted_step_seconds", "peak_bytes", "reserved_bytes", "predicted_peak_bytes"]
    for name in PARTS:
        columns += [f"{name}_seconds", f"predicted_{name}_seconds"]
    return [*columns, "prediction_basis", "log"]


def _csv_row(row: Row) -> dict[str, object]:
    """A line of the CSV by its heads; ``DictWriter`` leaves empty what is not in it."""
    cells: dict[str, object] = {"layout": row.layout, "status": row.status, "log": row.log}
    m = row.measured
    if m is not None:
        for name in MEASURED_COLUMNS:
            cells[name] = getattr(m, name)
        cells |= _memory_cells(m)
        for name in PARTS:
            cells[f"{name}_seconds"] = m.parts.get(name)
    p = row.predicted
    if p is not None:
        cells |= {
            "predicted_step_seconds": p.step_seconds,
            "predicted_peak_bytes": p.peak_bytes,
            "prediction_basis": p.basis,
        }
        for name in PARTS:
            cells[f"predicted_{name}_seconds"] = p.parts.get(name)
    return cells


def _memory_cells(m: Measured) -> dict[str, object]:
    """Peaks of the fullest rank."""
    cells: dict[str, object] = {"peak_bytes": max(m.peak_bytes)}
    # Only a GPU has a caching allocator, which reserves more than it hands out.
    if m.reserved_bytes:
        cells["reserved_bytes"] = max(m.reserved_bytes)
    return cells
