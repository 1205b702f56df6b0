"""Put all that ``gpu_all.sh`` found into one table: each goal met or missed and by how much, each
prediction's error.

    python -m benchmarks.gpu_summary [FOLDER]

What has not been measured is a row that says so. A file that is not the record it should be is
refused by name, with exit code 1, and the others are shown.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.goals import EVERY, QUACK, Goal
from benchmarks.gpu_timing import number, table

NOT_YET = "not yet measured on a GPU"
GIB = 2**30
KERNELS = "gpu_kernels.json"
TUNED = "gpu_kernels_tuned.json"
WIDEST_NAME = 110
WIDEST = 70
"""Characters of a row's first cell, and of its others, in the table."""
Records = dict[str, dict[str, Any]]


class Line(NamedTuple):
    """One row of the table."""

    what: str
    measured: str
    beside: str
    """What it is compared with."""
    verdict: str


def by_how_much(goal: Goal, value: float) -> str:
    """Return how far a value is on either side of what the goal asks for, in percent of that."""
    better = value / goal.must - 1 if goal.at_least else 1 - value / goal.must
    if goal is QUACK:
        return (
            f"{'worth' if better >= 0 else 'not worth'} being the base: {value:.2f} times as fast"
        )
    if better >= 0:
        reached = value >= goal.good if goal.at_least else value <= goal.good
        return f"met{', good' if reached else ''}: by {100 * better:.0f} %"
    return f"MISSED by {-100 * better:.0f} %"


def of_goals(records: Records) -> list[Line]:
    """Return each goal for each case, with the untuned rule and with the table; the verdict is of
    the last measured."""
    found: dict[tuple[str, str], dict[str, float | None]] = {}
    for name in (KERNELS, TUNED):
        for row in records[name]["goals"] if name in records else []:
            found.setdefault((row["goal"], row["case"]), {})[name] = row["value"]
    lines = []
    for goal in EVERY:
        cases = [(case, values) for (name, case), values in found.items() if name == goal.name]
        if not cases:
            lines.append(Line(goal.name, "-", limits_of(goal), NOT_YET))
        for case, values in cases:
            before = values.get(KERNELS)
            after = values.get(TUNED)
            last = before if after is None else after
            verdict = NOT_YET if last is None else by_how_much(goal, last)
            measured = f"{number(before)}, tuned {number(after)}"
            lines.append(Line(f"{goal.name}: {case}", measured, limits_of(goal), verdict))
    return lines


def limits_of(goal: Goal) -> str:
    sign = ">=" if goal.at_least else "<="
    return f"must {sign} {goal.must:g}, good {goal.good:g}"


def of_kernels(record: dict[str, Any]) -> list[Line]:
    """Failures and what there was no time for; values are in ``of_goals``."""
    return failures_of("kernels", record["failures"], record["not_reached"])


def failures_of(what: str, failures: Iterable[str], not_reached: list[str]) -> list[Line]:
    lines = [Line(f"{what}: {failure}", "-", "", "FAILED") for failure in failures]
    if not_reached:
        lines.append(
            Line(
                f"{what}: {len(not_reached)} cases, first {not_reached[0]}", "-", "", "not reached"
            )
        )
    return lines


def of_tests(record: dict[str, Any]) -> list[Line]:
    outcomes = [row["outcome"] for row in record["rows"]]
    passed = outcomes.count("passed")
    skipped = [row for row in record["rows"] if row["outcome"] == "skipped"]
    lines = [
        Line(
            "tests",
            f"{passed} passed",
            f"{len(skipped)} skipped",
            "FAILED" if record["failures"] else "ok",
        )
    ]
    lines += [
        Line(f"tests: {row['test'].rpartition('::')[2]}", "-", row["why"], "skipped")
        for row in skipped
    ]
    return lines + failures_of("tests", record["failures"], record["not_reached"])


def of_anchors(record: dict[str, Any]) -> list[Line]:
    lines = []
    for row in record["rows"]:
        expected = row["expected"]
        span = f"expected {expected['low']:.4g} to {expected['high']:.4g}" if expected else ""
        verdict = f"FAILED: {row['status']}" if row["verdict"] == "FAILED" else row["verdict"]
        lines.append(
            Line(
                f"anchor: {row['anchor']}",
                f"{number(row['value'], 2)} {row['unit']}",
                span,
                verdict,
            )
        )
    return lines + failures_of("anchor", [], record["not_reached"])


def of_tune(record: dict[str, Any]) -> list[Line]:
    """Return how much faster than the rule's the variants of the table are, and where torch's GEMM
    takes over."""
    gains = sorted(row["rule_us"] / row["us"] for row in record["rows"] if row["rule_us"])
    span = f"{gains[0]:.2f} to {gains[-1]:.2f} times as fast as the rule" if gains else ""
    stands = f"the rule stands for {len(record['rule_stands'])}"
    lines = [Line("tuned products", str(len(record["rows"])), span, stands)]
    for layer in record["layers"]:
        rows = layer["vendor_from"]
        sizes = f"{layer['dtype']} {layer['hidden']} x {layer['intermediate']}, rank {layer['R']}"
        verdict = "Triton throughout" if rows is None else f"torch's from {rows} rows per expert"
        lines.append(Line(f"back end: {sizes}", "", "", verdict))
    sweep = record["sweep"]
    refused = [f"{name}: {why}" for name, why in sweep["refused"].items()]
    lines += [Line(f"tune: {text}", "-", "", "refused") for text in refused]
    return lines + failures_of("tune", [], sweep["not_reached"])


def of_model(record: dict[str, Any]) -> list[Line]:
    lines = []
    for row in record["rows"]:
        name = f"train: {row['arm']}, {row['layers']} layers"
        if row["status"] != "ok":
            lines.append(Line(name, "-", "", row["status"]))
            continue
        peak = row["peak_bytes"]
        memory = "" if peak is None else f", peak {peak / GIB:.1f} GiB"
        speed = f"{row['tokens_per_s']:.0f} tokens/s"
        lines.append(Line(name, speed, f"{row['tflops']:.0f} TFLOP/s{memory}", "ok"))
        if "profile" in row:
            lines += of_profile(name, row["profile"])
        if "planned" in row:
            lines += of_planned(name, row)
    return lines


def of_profile(name: str, profile: dict[str, Any]) -> list[Line]:
    """Launches of a layer, gaps and waits of a step."""
    if "problem" in profile:
        return [Line(f"{name}: profile", "-", "", profile["problem"])]
    phases = profile["phases"]
    launches = (
        f"{phases['forward']['per_layer']} forward, {phases['backward']['per_layer']} backward"
    )
    idle = profile["idle_share"]
    waits = sum(wait["count"] for wait in profile["waits"].values())
    where = sorted({place for wait in profile["waits"].values() for place in wait["in"]})
    lines = [
        Line(f"{name}: kernels of a layer", launches, "", NOT_YET if idle is None else ""),
        Line(
            f"{name}: waits of the host in a step",
            f"{waits:g}",
            "none at EP 1",
            "FAILED" if waits else "ok",
        ),
    ]
    if idle is not None:
        gaps = f"{profile['notable_gaps']:g} gaps of 10 us and more, under the profiler"
        lines.append(Line(f"{name}: GPU idle", f"{100 * idle:.0f} %", gaps, ""))
    lines += [Line(f"{name}: waits in", place, "", "") for place in where]
    for kernel in profile["kernels"][:3]:
        share = f"{100 * kernel['share']:.0f} % of kernel time"
        lines.append(Line(f"{name}: {kernel['phase']}", share, kernel["name"][:60], ""))
    return lines


def of_planned(name: str, row: dict[str, Any]) -> list[Line]:
    """The planner's errors, in percent of what was measured."""
    said = row["planned"]
    errors = row["error_percent"]
    lines = []
    for what, unit, scale in (("peak_bytes", "GiB", GIB), ("step_ms", "ms", 1.0)):
        measured = "-" if row[what] is None else f"{row[what] / scale:.1f} {unit}"
        predicted = f"predicted {said[what] / scale:.1f} {unit}"
        lines.append(
            Line(f"planner: {name}: {what}", measured, predicted, error_text(errors[what]))
        )
    return lines


def error_text(percent: float | None) -> str:
    return NOT_YET if percent is None else f"off by {percent:+.1f} %"


def of_peers(record: dict[str, Any]) -> list[Line]:
    """Tokens per second of each arm, and how many times as long as megalora's its step takes."""
    lines = []
    for case in record["cases"]:
        lines += [
            Line(f"peers, {case['shape']}: {text}", "-", "", "FAILED") for text in case["wrong"]
        ]
        for row in case["rows"]:
            name = f"peers, {case['shape']}: {row['arm']}"
            if row["status"] != "ok" or "over_megalora" not in row:
                lines.append(Line(name, "-", "", row["status"]))
                continue
            times = f"{row['over_megalora']['step']['median']:.2f} times megalora's step"
            milliseconds = row.get("step_ms")
            speed = (
                ""
                if milliseconds is None
                else f"{1e3 * case['tokens'] / milliseconds['median']:.0f} tokens/s"
            )
            memory = f"{row['peak_bytes'] / GIB:.2f} GiB"
            lines.append(Line(name, times, ", ".join(filter(None, (speed, memory))), "ok"))
    return lines


def of_shared(record: dict[str, Any]) -> list[Line]:
    lines = []
    for row in record["rows"]:
        name = f"shared: {row['case']}"
        if row["failed"]:
            lines.append(Line(name, "-", row["failed"].strip().splitlines()[-1][:100], "FAILED"))
            continue
        values = f"loss {row['loss']:.0e}, gradient {row['gradient']:.0e}"
        lines.append(
            Line(name, values, ", ".join(row["exceeded"]), "FAILED" if row["exceeded"] else "pass")
        )
    return lines + [
        Line(f"shared: {name}", "-", "", "not reached") for name in record["not_reached"]
    ]


def of_calibration(record: dict[str, Any]) -> list[Line]:
    kinds = ("gemm", "grouped_gemm", "attention", "memory")
    counts = ", ".join(f"{len(record[kind])} {kind}" for kind in kinds)
    layer = record["overhead"]["layer_forward_s"] + record["overhead"]["layer_backward_s"]
    return [Line("calibration", counts, f"host {1e6 * layer:.0f} us a layer", "ok")]


def of_layouts(record: dict[str, Any]) -> list[Line]:
    lines = []
    for row in record["rows"]:
        name = f"layout: {row['asked']}"
        if row["measured"] is None:
            lines.append(Line(name, "-", "", row["status"]))
            continue
        speed = f"{row['measured']['tokens_per_second_per_gpu']:.0f} tokens/s"
        lines.append(Line(name, speed, "", row["status"]))
        for what, percent in row["error_percent"].items():
            lines.append(Line(f"planner: {name}: {what}", "", "", error_text(percent)))
    return lines + [
        Line(f"layout: {name}", "-", "", "not reached") for name in record["not_reached"]
    ]


def of_steps(record: dict[str, Any]) -> list[Line]:
    return [
        Line(f"step: {name}", f"{step['seconds']:g} s", step["why"], step["result"])
        for name, step in record["steps"].items()
    ]


READERS: dict[str, Callable[[dict[str, Any]], list[Line]]] = {
    "gpu_tests.json": of_tests, "gpu_anchors.json": of_anchors, KERNELS: of_kernels,
    "gpu_tuned.json": of_tune,
    TUNED: of_kernels, "gpu_model.json": of_model, "gpu_peers.json": of_peers,
    "gpu_shared.json": of_shared,
    "gpu_calibration.json": of_calibration, "gpu_layouts.json": of_layouts,
    "gpu_all.json": of_steps,
}  # fmt: skip


def show(lines: Iterable[Line]) -> str:
    """Return the table; below it rows whose cells would make all others too wide to read."""
    rows: list[Line] = []
    long: list[Line] = []
    for line in lines:
        fits = len(line.what) <= WIDEST_NAME and max(map(len, line[1:])) <= WIDEST
        (rows if fits else long).append(line)
    said = (
        " | ".join(cell for cell in (line.verdict, *line[:3]) if cell not in ("", "-"))
        for line in long
    )
    return "\n".join([table(("what", "measured", "beside", "verdict"), rows), *said])


def read(folder: Path) -> tuple[Records, list[Line], list[str]]:
    """Return records by file, their rows, and what is wrong with files that are refused."""
    records: Records = {}
    lines: list[Line] = []
    refused = []
    for name, reader in READERS.items():
        path = folder / name
        if not path.is_file():
            # goals without a value say so one by one
            if name not in (KERNELS, TUNED, "gpu_all.json"):
                lines.append(
                    Line(name.removeprefix("gpu_").removesuffix(".json"), "-", "", NOT_YET)
                )
            continue
        try:
            record = json.loads(path.read_text())
            rows = reader(record)
            of_goals({name: record} if name in (KERNELS, TUNED) else {})
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            refused.append(f"{path}: not the record that belongs there ({error!r})")
            continue
        records[name] = record
        lines += rows
    return records, lines, refused


def main(given: list[str] | None = None) -> int:
    words = sys.argv[1:] if given is None else given
    folder = Path(words[0]) if words else Path("benchmarks/results")
    if len(words) > 1 or not folder.is_dir():
        print(f"gpu_summary: want one folder of results, got {' '.join(words)!r}", file=sys.stderr)
        return 2
    records, lines, refused = read(folder)
    lines = of_goals(records) + lines
    devices = sorted({record["device"] for record in records.values() if "device" in record})
    print(", ".join(devices) or "nothing was measured")
    if any(
        record.get("dry") or record.get("settings", {}).get("dry") for record in records.values()
    ):
        print("a dry run: times, ratios and errors mean nothing")
    print(show(lines))
    for text in refused:
        print(f"REFUSED {text}", file=sys.stderr)
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
