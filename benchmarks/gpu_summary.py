"""What ``gpu_all.sh`` found, as one table: its steps, the goals, the training arms, the layouts on one GPU.

python -m benchmarks.gpu_summary FOLDER [STEPS.tsv]
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_timing import number, table


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def of_kernels(record: dict[str, Any]) -> list[Sequence[object]]:
    rows: list[Sequence[object]] = []
    for goal in record.get("goals", []):
        limits = f"must {goal['must']}, good {goal['good']}"
        rows.append((f"{goal['goal']}: {goal['case']}", number(goal["value"]), limits, goal["verdict"]))
    if left := record.get("not_reached", []):
        rows.append((f"{len(left)} cases out of time, first {left[0]}", "-", "", "not reached"))
    return rows + [(failure, "-", "", "FAILED") for failure in record.get("failures", [])]


def of_training(record: dict[str, Any]) -> list[Sequence[object]]:
    rows: list[Sequence[object]] = []
    for row in record.get("rows", []):
        name = f"train: {row['arm']}, {row['layers']} layers"
        if row["status"] == "ok":
            rates = f"{row['tokens_per_s']:.0f} tokens/s"
            peak = f"peak {row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else ""
            rows.append((name, rates, f"{row['tflops']:.0f} TFLOP/s, {peak}", "ok"))
        else:
            rows.append((name, "-", "", row["status"]))
    return rows


def of_shared(record: dict[str, Any]) -> list[Sequence[object]]:
    rows: list[Sequence[object]] = []
    for row in record.get("rows", []):
        if row["failed"]:
            rows.append((f"shared: {row['case']}", "-", "", "FAILED"))
        else:
            verdict = "FAILED" if row["exceeded"] else "pass"
            values = f"loss {row['loss']:.0e}, gradient {row['gradient']:.0e}"
            rows.append((f"shared: {row['case']}", values, ", ".join(row["exceeded"]), verdict))
    return rows + [(f"shared: {name}", "-", "", "not reached") for name in record.get("not_reached", [])]


def of_steps(path: Path) -> list[Sequence[object]]:
    """Lines of name, result and seconds, parted by tabs."""
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    return [(f"step: {name}", f"{seconds} s", "", result) for name, result, seconds in lines]


def main(given: list[str]) -> None:
    folder = Path(given[0])
    kernels, training = read(folder / "gpu_kernels.json"), read(folder / "gpu_model.json")
    shared = read(folder / "gpu_shared.json")
    rows = of_kernels(kernels) + of_training(training) + of_shared(shared)
    if len(given) > 1:
        rows += of_steps(Path(given[1]))
    devices = {record["device"] for record in (kernels, training, shared) if record}
    print(", ".join(sorted(devices)) or "nothing was measured")
    print(table(("what", "measured", "limits", "verdict"), rows))


if __name__ == "__main__":
    main(sys.argv[1:])
