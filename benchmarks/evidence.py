"""Write the tables of docs/evidence.md: what is predicted of the kernels beside what was measured.

    python -m benchmarks.evidence            write the tables anew, from the models and the results
    python -m benchmarks.evidence --check    exit code 1 where the page is stale

Text between the tables is written by hand. A table stands between two comments, ``<!-- table: NAME
-->`` and ``<!-- end -->``. Records of a dry run or of a CPU do not count as measurements.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import goals, roofline, tile_model
from benchmarks.anchor_cases import ANCHORS
from benchmarks.evidence_compiled import compiled
from benchmarks.evidence_records import NOT_YET, Results, digits, markdown, origin
from benchmarks.tile_gpus import H100, H200
from benchmarks.tune_points import variant_label
from tests.pretended.test_launches import CEILINGS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/evidence.md"
RESULTS = ROOT / "benchmarks/results"
MARKED = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


# ---- tables --------------------------------------------------------------------------------------


def constants(results: Results) -> str:
    """The tile model's constants, each beside the anchor that measures it."""
    record = results.on_gpu("gpu_anchors.json")
    measured = {row["anchor"]: row["value"] for row in record.get("rows", [])}
    # The number of processors is torch's answer, which stands in every record; no anchor needs to
    # measure it.
    names = {
        "multiprocessors": (H100.processors, record.get("processors")),
        "clock": (H100.clock_ghz, measured.get("clock under load")),
        "dense GEMM": (H100.dense_tflops, measured.get("dense bf16 8192^3")),
        "HBM, H100": (H100.hbm_tb_per_s, measured.get("copy of 1 GiB")),
        "HBM, H200": (H200.hbm_tb_per_s, measured.get("copy of 1 GiB")),
        "L2": (H100.l2_tb_per_s, measured.get("L2 reads of 24 MiB")),
        # No anchor tells these two from the rest of a tile.
        "shared memory of a multiprocessor": (H100.shared_bytes_per_cycle, None),
        "start and end of a tile": (H100.ends_cycles, None),
    }
    card = str(record.get("device", "")).lower()
    rows = []
    for name, (constant, value) in names.items():
        # Both cards' HBM stand in the table, and one of them was measured.
        other_card = name.startswith("HBM") and name.lower().split()[-1] not in card
        found = digits(None if other_card else value)
        rows.append(
            (name, f"{constant.value:g} {constant.unit}", constant.basis, constant.source, found)
        )
    return f"{origin(record)}\n\n" + markdown(
        ("constant", "value", "known how", "source", "measured"), rows
    )


def anchors(results: Results) -> str:
    """Values that a first run should give, and the verdict where it was run."""
    record = results.on_gpu("gpu_anchors.json")
    found = {row["anchor"]: row for row in record.get("rows", [])}
    rows = []
    # All of today's anchors: a record may be older than some.
    for anchor in ANCHORS:
        h100 = anchor.expect(H100)
        h200 = anchor.expect(H200)
        row = found.get(anchor.name)
        span = f"{h100.value:.4g} ({h100.low:.4g} to {h100.high:.4g})"
        verdict = row["verdict"] if row else NOT_YET
        rows.append(
            (
                anchor.name,
                anchor.unit,
                span,
                f"{h200.value:.3g}",
                digits(row and row["value"]),
                verdict,
            )
        )
    header = ("what", "unit", "expected, H100 (range)", "H200", "measured", "verdict")
    return f"{origin(record)}\n\n" + markdown(header, rows)


def published(_results: Results) -> str:
    """The tile model beside times that others published."""
    rows = []
    for case in tile_model.PUBLISHED:
        model_us = tile_model.cost(case.variant, case.product, case.experts).us
        off = f"{100 * (model_us / case.us - 1):+.0f} %"
        rows.append(
            (case.what, variant_label(case.variant), f"{case.us:.0f}", f"{model_us:.0f}", off)
        )
    return markdown(("kernel", "variant", "published us", "model us", "model off by"), rows)


TILE_RANK = 16
"""Rank of the adapters in the sweep of ``tune.py``."""


def tiles(results: Results) -> str:
    """Every product of a layer of the 30B model, by the tile model and by the sweep."""
    record = results.on_gpu("gpu_tuned.json")
    points = record.get("sweep", {}).get("points", {})
    rows = []
    for line in tile_model.lines("30b", TILE_RANK, H100):
        cells: list[object] = [f"{line.name}, {line.experts} × {line.rows}"]
        for us in (line.floor_us, line.before.us, line.now.us, line.best.us):
            cells.append(f"{us:.0f}")
        cells.append(line.now.bound)
        point = points.get(f"30b {line.name} {line.experts} x {line.rows}", {})
        # Times of the second round: the first one only drops the slow variants.
        times = point.get("second_us", {})
        for which in ("rule", "best"):
            us, _spread = times.get(point.get(which), (None, None))
            cells.append(digits(us, ".0f"))
        rows.append(cells)
    header = ("product, experts × rows", "floor", "last release", "rule", "best", "rule bound by",
              "rule measured",
              "best measured")  # fmt: skip
    return f"{origin(record)}\n\n" + markdown(header, rows)


LAYER_ARMS = {
    ("grouped_mm", 1): "ours grouped_mm joined",
    ("triton", 1): "ours triton",
    ("grouped_mm", 2): None,
    ("triton", 2): "ours triton, gate+up",
}
"""Arm of ``bench_grouped_lora.py`` by back end and adapters on gate_up; None: it is not timed."""


def layers(results: Results) -> str:
    """Time of a layer over that without adapters, by the roofline and by the benchmark."""
    by_rule = results.on_gpu("gpu_kernels.json")
    tuned = results.on_gpu("gpu_kernels_tuned.json")
    rows = []
    for ep in (8, 1):
        place = "one of 8 expert-parallel ranks" if ep > 1 else "all 128 experts"
        # The label that ``expert_case.Spec`` gives to this case.
        spec = f"30b tokens=8192 experts={128 // ep}/128 r=16 balanced"
        for (backend, on_gate_up), arm in LAYER_ARMS.items():
            case = roofline.layer("30b", tokens=8192, ep=ep, rank=16, on_gate_up=on_gate_up)
            found = roofline.ratios(case, backend)
            cells: list[object] = [f"`{backend}`, {place}", on_gate_up]
            cells += [f"{found.forward:.2f}", f"{found.both:.2f}", f"{found.split_over_ours:.1f}"]
            for record in (by_rule, tuned):
                # Over the base of the same back end, as the roofline's ratio is.
                cells.append(_measured_layer(record, spec, arm, f"base {backend}"))
            rows.append(cells)
    header = ("back end", "adapters on gate_up", "forward", "forward + backward",
              "split products / ours",
              "measured, by the rule", "measured, tuned")  # fmt: skip
    return f"{origin(by_rule, tuned)}\n\n" + markdown(header, rows)


def _measured_layer(record: dict[str, Any], spec: str, arm: str | None, base: str) -> str:
    """The measured ratios of forward, of forward and backward, and of the split arm over ours, as
    one cell. The split arm has one adapter on gate_up."""
    if arm is None:
        return "not timed"
    rows = {}
    for row in record.get("rows", []):
        # An arm that failed or was not reached has a row without times.
        if row["case"] == spec and row.get("train"):
            rows[row["arm"]] = row
    if arm not in rows or base not in rows:
        return NOT_YET
    ours = rows[arm]
    plain = rows[base]
    ratios = []
    for phase in ("forward", "train"):
        ratios.append(ours[phase]["median_ms"] / plain[phase]["median_ms"])
    # An early record may lack it: it is among the last arms of a case.
    if "split eager" in rows:
        ratios.append(rows["split eager"]["train"]["median_ms"] / ours["train"]["median_ms"])
    return " / ".join(f"{ratio:.2f}" for ratio in ratios)


def goal_table(results: Results) -> str:
    """Each goal, with the number of cases in which it was reached."""
    # The tuned kernels are what a user gets; those by the rule stand in until there are any.
    record = results.on_gpu("gpu_kernels_tuned.json") or results.on_gpu("gpu_kernels.json")
    rows = []
    for goal in goals.EVERY:
        num_cases = 0
        reached = 0
        values = []
        for found in record.get("goals", []):
            if found["goal"] != goal.name:
                continue
            num_cases += 1
            reached += found["verdict"] != "miss"
            # A case whose arm failed counts as missed, but has no value for the span.
            if found["value"] is not None:
                values.append(found["value"])
        span = f"{min(values):.3g} to {max(values):.3g}" if values else NOT_YET
        count = f"{reached} of {num_cases}" if num_cases else NOT_YET
        rows.append((goal.name, "≥" if goal.at_least else "≤", goal.must, goal.good, span, count))
    header = ("goal", "", "must", "good", "measured", "cases that pass")
    return f"{origin(record)}\n\n" + markdown(header, rows)


def peers(results: Results) -> str:
    """Steps of peers over ours on a CPU, as ratios: times of that CPU mean nothing elsewhere."""
    record = results.of("peers_cpu.json")
    if not record:
        return "Not yet measured."
    rows = []
    for case in record["cases"]:
        for row in case["rows"]:
            text = row["status"]
            if step := row.get("over_megalora", {}).get("step"):
                text = f"{step['median']:.2f} ({step['p10']:.2f} to {step['p90']:.2f})"
            same = "yes" if row.get("same_factors") else "no"
            rows.append((case["shape"], row["arm"], text, same))
    header = (
        "shape",
        "arm",
        "step / megalora's (10th to 90th percentile)",
        "trains the same factors",
    )
    return f"Measured on {record['device']}: ratios of steps taken in turn.\n\n" + markdown(
        header, rows
    )


def launches(results: Results) -> str:
    """Kernels and host operations of a layer: the ceilings that tests enforce, and the numbers that
    a profiler counted in a whole layer."""
    rows = []
    # Keys are "LAYER BACK_END RANKS base forward" and so on, four for each layer.
    names: list[str] = []
    for key in CEILINGS:
        name = key.rsplit(" ", 2)[0]
        if name not in names:
            names.append(name)
    for name in names:
        num_kernels: list[Any] = []
        host_operations: list[int] = []
        for which in COUNTED:
            kernels, operations = CEILINGS[f"{name} {which}"]
            num_kernels.append(kernels)
            host_operations.append(operations)
        # The last two are the adapters'; the base's host operations are not ours to lower.
        host = sum(host_operations[2:4])
        rows.append((name, *num_kernels, host))
    profiled = False
    for row in results.on_gpu("gpu_model.json").get("rows", []):
        if "phases" not in row.get("profile", {}):
            continue
        profiled = True
        phases = row["profile"]["phases"]
        # A profiler cannot tell the base's kernels from the adapters', so both stand together.
        forward = phases["forward"]["per_layer"]
        backward = phases["backward"]["per_layer"]
        what = f"measured: {row['arm']}, {row['layers']} layers"
        rows.append((what, "", "", forward, backward, ""))
    if not profiled:
        rows.append(("measured", *[NOT_YET] * 5))
    header = ("layer, back end, expert-parallel ranks", *(f"kernels, {which}" for which in COUNTED),
              "host operations, adapters")  # fmt: skip
    return markdown(header, rows)


COUNTED = ("base forward", "base backward", "adapters forward", "adapters backward")
TABLES: dict[str, Callable[[Results], str]] = {
    "constants": constants,
    "anchors": anchors,
    "published": published,
    "tiles": tiles,
    "layers": layers,
    "compiled": compiled,
    "launches": launches,
    "goals": goal_table,
    "peers": peers,
}


# ---- the page ------------------------------------------------------------------------------------


def filled(page: str, results: Results) -> str:
    """The page with every table written anew.

    Raises:
        ValueError: a table that nothing writes, or one that has no place on the page.
    """
    # Twice the same name, or a table without a place, would leave something stale for ever.
    named = [match[2] for match in MARKED.finditer(page)]
    if sorted(named) != sorted(TABLES):
        raise ValueError(
            f"the page has places for {sorted(named)}; the tables are {sorted(TABLES)}"
        )
    return MARKED.sub(lambda match: f"{match[1]}{TABLES[match[2]](results)}\n{match[3]}", page)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where the page is stale"
    )
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(given)
    for path, kind in ((args.page, "page"), (args.results, "folder of results")):
        if not path.exists():
            parser.error(f"{path}: there is no such {kind}")
    before = args.page.read_text()
    try:
        now = filled(before, Results(args.results))
    except ValueError as error:
        parser.error(f"{args.page}: {error}")
    if now == before:
        print(f"{args.page} is up to date")
        return 0
    if args.check:
        print(f"{args.page} is stale: run python -m benchmarks.evidence", file=sys.stderr)
        return 1
    args.page.write_text(now)
    print(f"wrote {args.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
