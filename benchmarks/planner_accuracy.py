"""Compare the planner's figures with what was counted, published or measured.

    python -m benchmarks.planner_accuracy [--only TEXT] [--out FILE.json] [--show FILE.json]

(a) Memory: real training steps of small models on CPU ranks, every live tensor counted, against
    the plan (``tests/planner/counted.py`` says what differs from a GPU). The exit code is 1 where a
    category or the peak is off by more than 5 %.
(b) Published figures of others, as far as their set-ups are stated.
(c) Runs of ``megalora bench``, on GPUs or not, if benchmarks/results/bench_*.json has results.
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
from tests.planner.counted import error as error_of

ALLOWED = 0.05
"""Largest relative error of a category of memory, or of the peak."""
AT_ONCE = 2
"""Layouts trained at once: more would share the cores, and a layout has up to 8 ranks already."""
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
    # Rows with as many documents as chunks, see tests/planner/test_peak.py.
    Case(2, {"cp": 2}, micro=4), Case(4, {"cp": 4}, micro=8, recompute="full"),
    Case(4, {"cp": 2, "tp": 2}, micro=4, recompute="selective", model="shared"),
    Case(4, {"cp": 2, "pp": 2}, micro=4), Case(8, {"cp": 2, "ep": 4}, micro=4),
    Case(2, {"pp": 2}, recompute="full1+selective"),
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
    counted = of_table("memory", memory(cases))
    published = of_table("published", planner_published.rows())
    rows = counted + published
    show(rows, args.out.parent)
    save("planner_accuracy", rows, args.out)
    # Only (a) decides: the published set-ups are known in part, so their errors prove nothing.
    sys.exit(any(row["failed"] or worst(row) > ALLOWED for row in counted))


def of_table(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows marked with their table, since the record holds the rows of all tables in one list."""
    return [{"table": name, **row} for row in rows]


def memory(cases: list[Case]) -> list[dict[str, Any]]:
    """A row for each pipeline stage of each layout. Layouts run in processes of their own, the
    largest worlds first."""
    start = time.perf_counter()
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in MODELS:
            make_model(model, folder)
        chats = write_chats(folder / "chats.jsonl")
        # The longest first, so that none is left alone at the end.
        order = sorted(cases, key=lambda case: -case.world)
        jobs = [(case, count, (case, folder, chats)) for case in order]
        for case, seconds, _ in forked(jobs, AT_ONCE):
            found[case.name] = json.loads((folder / f"{case.name}.json").read_text())
            print(
                f"{len(found):3d}/{len(cases)} {case.name:50} {seconds:4.0f} s  largest error"
                f" {verdict_of(found[case.name])}",
                flush=True,
            )
    print(f"{time.perf_counter() - start:.0f} s")
    # In the order asked for: they ended in another one.
    rows = []
    for case in cases:
        rows += found[case.name]
    return rows


def count(case: Case, folder: Path, chats: Path) -> None:
    """Train one layout, and leave its rows, or its traceback, as a file."""
    # At the level of file descriptors: C++ libraries and the ranks print past sys.stdout.
    with (folder / f"{case.name}.log").open("w") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    head = {"layout": case.name, "world": case.world, "failed": None}
    rows = []
    try:
        for row in compare(case, folder, chats):
            rows.append(head | row)
    except Exception:
        rows = [head | {"failed": traceback.format_exc()}]
    (folder / f"{case.name}.json").write_text(json.dumps(rows))


def verdict_of(stages: list[dict[str, Any]]) -> str:
    """The largest error of a layout's pipeline stages as text."""
    largest = 0.0
    for row in stages:
        # The row of a failed layout holds its traceback and no memory.
        if row["failed"]:
            return "FAILED"
        largest = max(largest, worst(row))
    return f"{100 * largest:.2f} %"


def error(row: dict[str, Any], category: str) -> float:
    """Relative error of a category: predicted over counted, less 1."""
    return error_of(row["said"][category], row["found"][category])


def worst(row: dict[str, Any]) -> float:
    """The largest error of a category, either way."""
    return max(abs(error(row, category)) for category in CATEGORIES)


def show(rows: list[dict[str, Any]], results: Path) -> None:
    """Print the three tables."""
    counted = []
    published = []
    for row in rows:
        if row["table"] == "memory":
            counted.append(row)
        else:
            published.append(row)
    layouts = {row["layout"] for row in counted}
    print(f"\n(a) memory counted on CPU ranks, {len(layouts)} layouts\n\n{layouts_table(counted)}")
    print(f"\nLargest error of each category by number of ranks\n\n{summary_table(counted)}")
    print(f"\n(b) published\n\n{planner_published.table(published)}")
    print(f"\n(c) measured by megalora bench\n\n{measured_table(results)}\n")


def layouts_table(rows: list[dict[str, Any]]) -> str:
    """Every layout and stage with the error of each category; tracebacks stand below the table."""
    lines = [
        "| layout | stage | peak, bytes | " + " | ".join(CATEGORIES) + " |",
        "|---|---|---|" + "---|" * len(CATEGORIES),
    ]
    failed = []
    for row in rows:
        if row["failed"]:
            failed.append(f"FAILED {row['layout']}\n{row['failed']}")
            continue
        # In the order of the head.
        errors = percents([error(row, category) for category in CATEGORIES])
        lines.append(f"| {row['layout']} | {row['stage']} | {row['found']['peak']:,} | {errors} |")
    return "\n".join(lines + failed)


def percents(errors: list[float]) -> str:
    """Errors as the cells of a table's row, without the bars at its ends."""
    cells = []
    for error in errors:
        # With its sign: too much is safe, too little runs out of memory.
        cells.append(f"{100 * error:+.2f} %")
    return " | ".join(cells)


def summary_table(rows: list[dict[str, Any]]) -> str:
    """The largest error of each category, either way, by the number of ranks."""
    lines = [
        "| ranks | layouts | " + " | ".join(CATEGORIES) + " |",
        "|---|---|" + "---|" * len(CATEGORIES),
    ]
    for world in sorted({row["world"] for row in rows}):
        largest = dict.fromkeys(CATEGORIES, 0.0)
        layouts = set()
        for row in rows:
            if row["world"] != world or row["failed"]:
                continue
            layouts.add(row["layout"])
            for category in CATEGORIES:
                # By size, but the sign stays: it tells too little from too much.
                largest[category] = max(largest[category], error(row, category), key=abs)
        lines.append(f"| {world} | {len(layouts)} | {percents(list(largest.values()))} |")
    return "\n".join(lines)


def measured_table(results: Path) -> str:
    """Every row that ``megalora bench`` measured and predicted, read from its ``results.json``,
    which are kept in this folder as bench_*.json."""
    lines = []
    on_gpus = False
    for path in sorted(results.glob("bench_*.json")):
        for row in load_rows(path):
            m = row.measured
            p = row.predicted
            if m is None or p is None:
                continue
            # On CPU ranks tensors are counted instead, which says nothing about a GPU's allocator.
            on_gpus |= m.memory_from == "allocator"
            step = f"{m.step_seconds:.3f} s | {percent_off(p.step_seconds, m.step_seconds)}"
            # The rank that needs most decides whether a layout fits.
            peak = max(m.peak_bytes)
            memory = f"{peak / 2**30:.3f} GiB | {percent_off(p.peak_bytes, peak)}"
            lines.append(
                f"| {path.name} | {m.num_ranks} x {m.device} | {row.layout} | {step} | {memory} |"
            )
    if lines:
        head = [
            "| file | device | layout | step | error | peak | error |",
            "|---|---|---|---|---|---|---|",
        ]
        lines = head + lines
    if not on_gpus:
        lines.append("not yet measured on a GPU")
    return "\n".join(lines)


def percent_off(predicted: float, measured: float) -> str:
    """How far a prediction is off, in percent of what was measured."""
    return f"{100 * (predicted / measured - 1):+.1f} %"


if __name__ == "__main__":
    main()
