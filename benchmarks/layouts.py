"""Measure recomputation and microbatches of a whole Qwen3-30B-A3B on one GPU, and compare with the
planner.

    python -m benchmarks.layouts --budget-seconds 300 [--out FILE] [--dry]

This runs ``megalora bench`` with random weights, one layout after the other, each in a process of
its own. Predictions rest on ``gpu_calibration.json`` in the folder of the results, if it exists,
else on the table of the GPU. A layout that does not fit is a row, not a failure. A second call runs
those for which there was no time. ``--dry`` takes a small model on a CPU.
"""

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_timing import Budget, earlier, save, table, the_gpu
from benchmarks.model_plan import error_percent, machine_of
from megalora import host
from megalora.bench.command import predicted
from megalora.bench.rows import BenchOptions, Row
from megalora.bench.runs import parse_layout, run_layouts
from megalora.config.file import load_config
from megalora.planner.gpus import read_machine
from megalora.planner.hardware import Machine

ROOT = Path(__file__).parents[1]
LEAST_SECONDS = 60
"""Seconds without which no layout is started: imports, random weights of a whole model, kernels to
compile and a few steps."""
DONE = ("ok", "out of memory", "refused", "failed")
"""Beginnings of the status of a layout that a second call does not run again."""


@dataclass(frozen=True)
class Plan:
    """Layouts to measure, and the config they change."""

    config: Path
    overrides: tuple[str, ...]
    layouts: tuple[str, ...]
    options: BenchOptions


GPU = Plan(
    ROOT / "configs/sft/qwen3_30b_a3b_1xh100_4k.yaml", ("train.global_batch_size=4",),
    # The second does not fit 80 GB: the planner must say so, too.
    ("recompute=full", "recompute=selective,micro=2"),
    BenchOptions(steps=3, warmup=2, weights="random"),
)  # fmt: skip
DRY = Plan(
    ROOT / "configs/bench/cpu.yaml",
    (f"model.path={ROOT}/configs/bench/small_moe.yaml", "data.max_length=33",
     "train.global_batch_size=1"),
    ("micro=1",), BenchOptions(steps=1, warmup=2, weights="random"),
)  # fmt: skip


def machine_beside(results: Path, dry: bool) -> Machine:
    """Return the machine whose calibration is in this folder, or the table of the GPU."""
    calibration = results / "gpu_calibration.json"
    if calibration.is_file():
        return read_machine(calibration)
    machine = machine_of(host.device_name())
    if dry:
        # A CPU trains in float32, with twice the bytes.
        machine = replace(machine, dtype="float32")
    return machine


def measure(plan: Plan, text: str, machine: Machine, logs: Path, limit_s: float) -> dict[str, Any]:
    """Measure one layout and return its row, with the planner's errors in percent of what was
    measured."""
    config = load_config(plan.config, plan.overrides)
    (found,) = run_layouts(
        plan.config, plan.overrides, [parse_layout(text, 1, config)], num_ranks=1, out=logs,
        predict=lambda of_layout, ranks: predicted(of_layout, ranks, machine), options=plan.options,
        timeout_s=limit_s, say=lambda line: print(line, flush=True),
    )  # fmt: skip
    return {"asked": text, **asdict(found), "error_percent": errors_of(found)}


def errors_of(row: Row) -> dict[str, float | None]:
    """Return how far predictions are from measurements, in percent; None where there is nothing to
    compare."""
    if row.measured is None or row.predicted is None:
        return {"step_seconds": None, "peak_bytes": None}
    return {
        "step_seconds": error_percent(row.predicted.step_seconds, row.measured.step_seconds),
        # The rank that needs most decides whether a layout fits.
        "peak_bytes": error_percent(row.predicted.peak_bytes, max(row.measured.peak_bytes)),
    }


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget-seconds", type=float, help="no layout is started that would end later"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_layouts.json"))
    parser.add_argument(
        "--dry", action="store_true", help="a small model on a CPU: to try the script itself"
    )
    args = parser.parse_args(given)
    device = the_gpu(parser, args.dry)
    budget = Budget(args.budget_seconds)
    plan = DRY if args.dry else GPU
    settings = {
        "layouts": plan.layouts,
        "overrides": plan.overrides,
        "config": plan.config.name,
        "dry": args.dry,
    }
    record = earlier(args.out, "layouts", device, settings) or {"rows": []}
    rows = [row for row in record["rows"] if row["status"].startswith(DONE)]
    done = {row["asked"] for row in rows}
    machine = machine_beside(args.out.parent, args.dry)
    for text in plan.layouts:
        if text not in done and (args.dry or budget.left() > LEAST_SECONDS):
            # Without a budget an hour, so that a layout that hangs ends at some time.
            limit_s = max(1.0, min(budget.left(), 3600.0))
            rows.append(measure(plan, text, machine, args.out.parent / "layouts", limit_s))
        # One that was cut off by its limit has a row, but is not done: a second call runs it again.
        left = list(plan.layouts)
        for row in rows:
            if row["status"].startswith(DONE):
                left.remove(row["asked"])
        save(args.out, "layouts", device, settings=settings, rows=rows, not_reached=left)
    lines = [(row["asked"], row["status"], row["error_percent"]) for row in rows]
    print(table(("layout", "status", "planner's error, %"), lines))
    return int(any(row["status"].startswith(("refused", "failed")) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
