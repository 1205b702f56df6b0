"""Measure the assumptions behind the predictions for the kernels, and say which of them is wrong.

    python -m benchmarks.anchors --budget-seconds 60 --out benchmarks/results/gpu_anchors.json
    TRITON_INTERPRET=1 python -m benchmarks.anchors --dry --out /tmp/anchors.json

The second command runs tiny cases on a CPU: its times mean nothing.

Measured are bandwidths, the dense rate, clocks and launches, then our first products and passes. A
result is checked before it is timed. A value outside its range is no failure: the table says which
assumption it puts in doubt. The exit code is 1 where a result was wrong, or where something of ours
could not run. A second call with the same ``--out`` continues where the first one stopped.
"""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megalora_kernels import backend

from benchmarks.anchor_cases import ANCHORS
from benchmarks.anchor_lab import Anchor, Lab, NotAvailableError
from benchmarks.gpu_timing import Budget, earlier, first_line, number, save, table, the_gpu
from benchmarks.tile_gpus import GPUS, Gpu

NOT_AVAILABLE = "not available"
LEAST_SECONDS = 2
"""Seconds without which no anchor is begun."""


def known_gpu(device: torch.device) -> Gpu | None:
    """The model's constants for this card; None for cards it does not know."""
    if device.type != "cuda":
        return None
    # Such as "nvidia h100 80gb hbm3".
    name = torch.cuda.get_device_name(device).lower()
    for key, gpu in GPUS.items():
        if key in name:
            return gpu
    return None


def examine(anchor: Anchor, lab: Lab, gpu: Gpu | None) -> dict[str, Any]:
    """Measure one anchor; one that fails is a row that says why."""
    row: dict[str, Any] = {
        "anchor": anchor.name,
        "unit": anchor.unit,
        "status": "ok",
        "value": None,
    }
    started = time.monotonic()
    try:
        found = anchor.measure(lab)
        row |= {"value": found.value, "more": found.more}
    except NotAvailableError as error:
        row["status"] = f"{NOT_AVAILABLE}: {error}"
    except Exception as error:
        # Whatever a driver or a compiler raises belongs in the table, and the next anchor goes on.
        row["status"] = first_line(error)
    row["seconds"] = round(time.monotonic() - started, 2)
    row["expected"] = None if gpu is None else asdict(anchor.expect(gpu))
    row["verdict"] = verdict(anchor, row, lab.dry)
    return row


def verdict(anchor: Anchor, row: dict[str, Any], dry: bool) -> str:
    """What a value says about the assumptions behind its expectation."""
    if row["status"].startswith(NOT_AVAILABLE):
        return NOT_AVAILABLE
    if row["status"] != "ok":
        return "FAILED"
    if dry:
        return "dry: means nothing"
    if row["expected"] is None:
        return "no expectation for this GPU"
    if row["value"] < row["expected"]["low"]:
        return f"below: {anchor.below}"
    if row["value"] > row["expected"]["high"]:
        return f"above: {anchor.above}"
    return "as expected"


def run(lab: Lab, budget: Budget, out: Path) -> int:
    """Measure every anchor that time allows; return the exit code."""
    settings = {"dry": lab.dry, "repeats": lab.repeats}
    before = earlier(out, "anchors", lab.device, settings)
    rows: list[dict[str, Any]] = []
    if before:
        # Those that failed are measured again: a driver or a package may be there by now.
        rows = [row for row in before["rows"] if row["status"] == "ok"]
    kept = {row["anchor"] for row in rows}
    gpu = known_gpu(lab.device)
    not_reached: list[str] = []

    # After each anchor, so that a call that is killed leaves what it has found.
    def write() -> None:
        content = {"dry": lab.dry, "rows": rows, "not_reached": not_reached}
        save(out, "anchors", lab.device, settings=settings, **content)

    for anchor in ANCHORS:
        if anchor.name in kept:
            continue
        if budget.left() < LEAST_SECONDS:
            not_reached.append(anchor.name)
            continue
        rows.append(examine(anchor, lab, gpu))
        write()
    # Once more, for what was not reached.
    write()
    print(show(rows))
    for name in not_reached:
        print(f"out of time before: {name}")
    print(f"wrote {out}")
    return 1 if any(row["verdict"] == "FAILED" for row in rows) else 0


def show(rows: list[dict[str, Any]]) -> str:
    """The table: each value beside the range in which it was expected."""
    header = ("anchor", "measured", "unit", "expected", "range", "verdict")
    lines = []
    for row in rows:
        expected = "-"
        span = "-"
        if wanted := row["expected"]:
            expected = f"{wanted['value']:.4g}"
            span = f"{wanted['low']:.4g} to {wanted['high']:.4g}"
        says = row["verdict"]
        if row["status"] != "ok":
            says += f": {row['status']}"
        value = number(row["value"], 2)
        lines.append((row["anchor"], value, row["unit"], expected, span, says))
    return table(header, lines)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.anchors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--budget-seconds", type=float, help="begin no anchor when this much time has passed"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_anchors.json"))
    parser.add_argument(
        "--dry", action="store_true", help="tiny sizes on a CPU, through Triton's interpreter"
    )
    args = parser.parse_args(given)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: at least 1")
    if args.dry and not backend.INTERPRETED:
        parser.error("--dry runs kernels on a CPU: set TRITON_INTERPRET=1")
    device = the_gpu(parser, args.dry)
    # References are float32; TF32 would round their inputs to 10 bits.
    torch.set_float32_matmul_precision("highest")
    dtype = torch.float32 if args.dry else torch.bfloat16
    lab = Lab(device, dtype, 1 if args.dry else args.repeats, args.dry)
    try:
        return run(lab, Budget(args.budget_seconds), args.out)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
