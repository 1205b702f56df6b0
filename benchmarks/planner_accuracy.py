"""How far the planner is from what was counted, published or measured.

    python -m benchmarks.planner_accuracy [--only TEXT] [--out
    benchmarks/results/planner_accuracy.json] [--show FILE]

(a) Memory: real training steps of small models on CPU ranks, every live tensor counted
(``tests/planner/counted.py`` says what
    differs from a GPU), against the plan. Exit code 1 where a category or the peak is off by more
    than 5 %.
(b) Published figures of others, as far as their set-ups are stated.
(c) Runs of ``megalora bench``, on GPUs or not, if their results lie in
benchmarks/results/bench_*.json.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import tests.prepare  # noqa: F401  sets up the host before anything from Megatron is imported
from benchmarks import planner_published
from benchmarks.harness import save
from megalora.bench.rows import load_rows
from tests.fixtures import write_chats
from tests.forked import forked
from tests.planner.counted import CATEGORIES, MODELS, Case, compare, make_model

ALLOWED = 0.05
AT_ONCE = 2
LAYOUTS = [
    Case(1, {}), Case(1, {}, micro=2), Case(1, {}, recompute="selective"),
    Case(1, {}, recompute="full"),
    Case(1, {}, recompute="full", model="vocab"), Case(1, {}, micro=2, model="dense"),
    Case(1, {}, model="many", dtype="bfloat16"),
    Case(2, {"tp": 2}), Case(2, {"ep": 2}, micro=2), Case(2, {"pp": 2}),
    Case(2, {"etp": 2}, recompute="selective"),
    Case(2, {"ep": 2}, recompute="full"), Case(2, {"tp": 2}, recompute="selective", model="shared"),
    Case(2, {"tp": 2}, micro=2, recompute="selective", model="many", dtype="bfloat16"),
    Case(4, {"ep": 4}), Case(4, {"tp": 4}, micro=2), Case(4, {"pp": 2, "vpp": 2, "tp": 2}),
    Case(4, {"tp": 2, "ep": 2, "etp": 2}, recompute="selective"), Case(4, {"pp": 4}),
    Case(4, {"pp": 2, "ep": 2}, micro=2, recompute="full"),
    Case(8, {"tp": 2, "pp": 2, "ep": 2}, recompute="selective"),
    Case(8, {"tp": 2, "ep": 4}, micro=2),
    Case(8, {"pp": 2, "vpp": 2, "ep": 4}), Case(8, {"tp": 4, "pp": 2, "etp": 2}, recompute="full"),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", help="layouts whose name contains this, such as 'ep2' or 'full'"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/planner_accuracy.json")
    )
    parser.add_argument(
        "--show",
        type=Path,
        metavar="FILE",
        help="print the tables of an earlier run and do nothing else",
    )
    args = parser.parse_args()
    if args.show:
        show(json.loads(args.show.read_text())["rows"], args.show.parent)
        return
    cases = [case for case in LAYOUTS if args.only in case.name]
    if not cases:
        parser.error(f"no layout's name contains {args.only!r}; one is {LAYOUTS[-1].name!r}")
    rows = [{"table": "memory", **row} for row in memory(cases)]
    rows += [{"table": "published", **row} for row in planner_published.rows()]
    show(rows, args.out.parent)
    save("planner_accuracy", rows, args.out)
    sys.exit(any(row["failed"] or worst(row) > ALLOWED for row in rows if row["table"] == "memory"))


def memory(cases: list[Case]) -> list[dict[str, Any]]:
    """A row for each pipeline stage of each layout; the layouts in processes of their own, largest
    worlds first."""
    start = time.perf_counter()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in MODELS:
            make_model(model, folder)
        chats = write_chats(folder / "chats.jsonl")
        order = sorted(cases, key=lambda case: -case.world)
        jobs = ((case, count, (case, folder, chats)) for case in order)
        for case, seconds, _ in forked(jobs, AT_ONCE):
            found[case.name] = json.loads((folder / f"{case.name}.json").read_text())
            said = max((worst(row) for row in found[case.name] if not row["failed"]), default=0.0)
            verdict = (
                "FAILED"
                if any(row["failed"] for row in found[case.name])
                else f"{100 * said:.2f} %"
            )
            print(
                f"{len(found):3d}/{len(cases)} {case.name:50} {seconds:4.0f} s  largest error"
                f" {verdict}",
                flush=True,
            )
    print(f"{time.perf_counter() - start:.0f} s")
    return [row for case in cases for row in found[case.name]]


def count(case: Case, folder: Path, chats: Path) -> None:
    """Leave the rows of one layout, or its traceback, as a file."""
    with (folder / f"{case.name}.log").open("w") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    head = {"layout": case.name, "world": case.world, "failed": None}
    try:
        rows = [head | row for row in compare(case, folder, chats)]
    except Exception:
        rows = [head | {"failed": traceback.format_exc()}]
    (folder / f"{case.name}.json").write_text(json.dumps(rows))


def error(row: dict[str, Any], category: str) -> float:
    """Predicted over counted, less 1; 0 where there is neither."""
    said = row["said"][category]
    found = row["found"][category]
    return said / found - 1 if found else float(bool(said))


def worst(row: dict[str, Any]) -> float:
    """The largest error of a category, either way."""
    return max(abs(error(row, category)) for category in CATEGORIES)


def show(rows: list[dict[str, Any]], results: Path) -> None:
    counted = [row for row in rows if row["table"] == "memory"]
    print(
        f"\n(a) memory counted on CPU ranks, {len({row['layout'] for row in counted})}"
        f" layouts\n\n{layouts_table(counted)}"
    )
    print(f"\nLargest error of each category by number of ranks\n\n{summary_table(counted)}")
    published = [row for row in rows if row["table"] == "published"]
    print(f"\n(b) published\n\n{planner_published.table(published)}")
    print(f"\n(c) measured by megalora bench\n\n{measured_table(results)}\n")


def layouts_table(rows: list[dict[str, Any]]) -> str:
    good = [row for row in rows if not row["failed"]]
    lines = [
        "| layout | stage | peak, bytes | " + " | ".join(CATEGORIES) + " |",
        "|---|---|---|" + "---|" * len(CATEGORIES),
    ]
    for row in good:
        errors = " | ".join(f"{100 * error(row, c):+.2f} %" for c in CATEGORIES)
        lines.append(f"| {row['layout']} | {row['stage']} | {row['found']['peak']:,} | {errors} |")
    return "\n".join(
        [*lines, *(f"FAILED {row['layout']}\n{row['failed']}" for row in rows if row["failed"])]
    )


def summary_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| ranks | layouts | " + " | ".join(CATEGORIES) + " |",
        "|---|---|" + "---|" * len(CATEGORIES),
    ]
    for world in sorted({row["world"] for row in rows}):
        some = [row for row in rows if row["world"] == world and not row["failed"]]
        largest = [max((error(row, c) for row in some), key=abs, default=0.0) for c in CATEGORIES]
        number = len({row["layout"] for row in some})
        lines.append(
            f"| {world} | {number} | " + " | ".join(f"{100 * e:+.2f} %" for e in largest) + " |"
        )
    return "\n".join(lines)


def measured_table(results: Path) -> str:
    """Every row that ``megalora bench`` measured and predicted, from its ``results.json`` copied
    here as bench_*.json."""
    lines = []
    on_gpus = False
    for path in sorted(results.glob("bench_*.json")):
        for row in load_rows(path):
            m = row.measured
            p = row.predicted
            if m is None or p is None:
                continue
            on_gpus |= m.memory_from == "allocator"
            pairs = (
                (m.step_seconds, p.step_seconds, 1.0, "s"),
                (max(m.peak_bytes), p.peak_bytes, 2**30, "GiB"),
            )
            cells = (
                f"{found / unit:.3f} {name} | {100 * (said / found - 1):+.1f} %"
                for found, said, unit, name in pairs
            )
            lines.append(
                f"| {path.name} | {m.num_ranks} x {m.device} | {row.layout} | "
                + " | ".join(cells)
                + " |"
            )
    head = [
        "| file | device | layout | step | error | peak | error |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(
        [*(head if lines else []), *lines, *([] if on_gpus else ["not yet measured on a GPU"])]
    )


if __name__ == "__main__":
    main()
