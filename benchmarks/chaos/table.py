"""Count faults by kind, and show the counts as a table."""

import statistics
from typing import Any

from benchmarks.chaos.fault import HANG, LOST, REFUSED, SURVIVED, Fault


def rows_of(faults: list[Fault]) -> list[dict[str, Any]]:
    """One row per kind: number, results, median and longest seconds."""
    rows: list[dict[str, Any]] = []
    for kind in dict.fromkeys(fault.kind for fault in faults):
        of_kind = [fault for fault in faults if fault.kind == kind]
        results = [fault.result for fault in of_kind]
        seconds = [fault.seconds for fault in of_kind]
        rows.append({
            "kind": kind, "times": len(of_kind), "survived": results.count(SURVIVED),
            "refused": results.count(REFUSED), "lost": results.count(LOST),
            "hang": results.count(HANG),
            "left_over": sum(1 for fault in of_kind if fault.left_over),
            "median_seconds": round(statistics.median(seconds), 2),
            "longest_seconds": round(max(seconds), 2),
        })  # fmt: skip
    return rows


COLUMNS = (
    "kind", "times", "survived", "refused", "lost", "hang", "median_seconds", "longest_seconds",
)  # fmt: skip


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, with their sum."""
    lines = [" | ".join(name.replace("_", " ") for name in COLUMNS), "|".join(["---"] * 8)]
    for row in rows:
        lines.append(" | ".join(str(row[name]) for name in COLUMNS))
    sums = [str(sum(row[name] for row in rows)) for name in COLUMNS[1:6]]
    lines.append(" | ".join(["all", *sums, "", ""]))
    return "\n".join(f"| {line} |" for line in lines)
