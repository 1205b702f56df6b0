"""Show all that ``gpu_all.sh`` found in one table: by how much each goal is met or missed, and the
error of each prediction.

    python -m benchmarks.gpu_summary [FOLDER]

A row says so where nothing has been measured. A file that does not hold the record its name stands
for is rejected by name, with exit code 1; the others are shown.
"""

import json
import sys
from collections import defaultdict
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
    # Positive where the goal is met, whichever side is the good one.
    better = value / goal.must - 1 if goal.at_least else 1 - value / goal.must
    if goal is QUACK:
        # Another library's GEMM: it can be worth taking, but it misses no goal of ours.
        worth = "worth" if better >= 0 else "not worth"
        return f"{worth} being the base: {value:.2f} times as fast"
    if better < 0:
        return f"MISSED by {-100 * better:.0f} %"
    good = value >= goal.good if goal.at_least else value <= goal.good
    return f"met{', good' if good else ''}: by {100 * better:.0f} %"


def of_goals(records: Records) -> list[Line]:
    """Return each goal for each case, with the untuned rule and with the table; the verdict is of
    the last measured."""
    # Goal -> case -> file -> value: both files have the same cases unless one ran out of time.
    found: defaultdict[str, dict[str, dict[str, float | None]]] = defaultdict(dict)
    for name in (KERNELS, TUNED):
        if name not in records:
            continue
        for row in records[name]["goals"]:
            found[row["goal"]].setdefault(row["case"], {})[name] = row["value"]
    lines = []
    for goal in EVERY:
        if goal.name not in found:
            lines.append(Line(goal.name, "-", limits_of(goal), NOT_YET))
        for case, values in found.get(goal.name, {}).items():
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
        # One row for all of them: a short budget leaves over dozens.
        left = f"{what}: {len(not_reached)} cases, first {not_reached[0]}"
        lines.append(Line(left, "-", "", "not reached"))
    return lines


def of_tests(record: dict[str, Any]) -> list[Line]:
    """How many passed; and each that was skipped, as on a GPU nothing should be without a
    reason."""
    passed = 0
    skipped = []
    for row in record["rows"]:
        passed += row["outcome"] == "passed"
        if row["outcome"] == "skipped":
            name = row["test"].rpartition("::")[2]
            skipped.append(Line(f"tests: {name}", "-", row["why"], "skipped"))
    verdict = "FAILED" if record["failures"] else "ok"
    lines = [Line("tests", f"{passed} passed", f"{len(skipped)} skipped", verdict)]
    lines += skipped
    return lines + failures_of("tests", record["failures"], record["not_reached"])


def of_anchors(record: dict[str, Any]) -> list[Line]:
    """Each anchor beside the range that it was expected in."""
    lines = []
    for row in record["rows"]:
        span = ""
        # An anchor that failed has neither a value nor a range.
        if expected := row["expected"]:
            span = f"expected {expected['low']:.4g} to {expected['high']:.4g}"
        verdict = row["verdict"]
        if verdict == "FAILED":
            verdict = f"FAILED: {row['status']}"
        measured = f"{number(row['value'], 2)} {row['unit']}"
        lines.append(Line(f"anchor: {row['anchor']}", measured, span, verdict))
    return lines + failures_of("anchor", [], record["not_reached"])


def of_tune(record: dict[str, Any]) -> list[Line]:
    """Return how much faster than the rule's the variants of the table are, and where torch's GEMM
    takes over."""
    gains = []
    for row in record["rows"]:
        # The rule's variant may fit no SM of this card, or have been refused: no gain over it then.
        if row["rule_us"]:
            gains.append(row["rule_us"] / row["us"])
    span = f"{min(gains):.2f} to {max(gains):.2f} times as fast as the rule" if gains else ""
    stands = f"the rule stands for {len(record['rule_stands'])}"
    lines = [Line("tuned products", str(len(record["rows"])), span, stands)]
    for layer in record["layers"]:
        rows = layer["vendor_from"]
        sizes = f"{layer['dtype']} {layer['hidden']} x {layer['intermediate']}, rank {layer['R']}"
        verdict = "Triton throughout" if rows is None else f"torch's from {rows} rows per expert"
        lines.append(Line(f"back end: {sizes}", "", "", verdict))
    sweep = record["sweep"]
    for name, why in sweep["refused"].items():
        lines.append(Line(f"tune: {name}: {why}", "-", "", "refused"))
    return lines + failures_of("tune", [], sweep["not_reached"])


def of_model(record: dict[str, Any]) -> list[Line]:
    """Each arm's speed and memory, with its profile and the planner's errors where it has them."""
    lines = []
    for row in record["rows"]:
        name = f"train: {row['arm']}, {row['layers']} layers"
        if row["status"] != "ok":
            lines.append(Line(name, "-", "", row["status"]))
            continue
        memory = ""
        if row["peak_bytes"] is not None:  # None in a dry run on a CPU
            memory = f", peak {row['peak_bytes'] / GIB:.1f} GiB"
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
    waits = 0
    places = set()
    for wait in profile["waits"].values():
        waits += wait["count"]
        places |= set(wait["in"])
    # Under EP 1 no count of tokens has to reach the host, so each wait is a fault of ours.
    verdict = "FAILED" if waits else "ok"
    lines = [
        # Without idle time the profiler saw no device: the kernels were not counted either.
        Line(f"{name}: kernels of a layer", launches, "", NOT_YET if idle is None else ""),
        Line(f"{name}: waits of the host in a step", f"{waits:g}", "none at EP 1", verdict),
    ]
    if idle is not None:
        gaps = f"{profile['notable_gaps']:g} gaps of 10 us and more, under the profiler"
        lines.append(Line(f"{name}: GPU idle", f"{100 * idle:.0f} %", gaps, ""))
    for place in sorted(places):
        lines.append(Line(f"{name}: waits in", place, "", ""))
    for kernel in profile["kernels"][:3]:
        share = f"{100 * kernel['share']:.0f} % of kernel time"
        lines.append(Line(f"{name}: {kernel['phase']}", share, kernel["name"][:60], ""))
    return lines


def of_planned(name: str, row: dict[str, Any]) -> list[Line]:
    """The planner's errors, in percent of what was measured."""
    lines = []
    for what, unit, scale in (("peak_bytes", "GiB", GIB), ("step_ms", "ms", 1.0)):
        measured = "-" if row[what] is None else f"{row[what] / scale:.1f} {unit}"
        predicted = f"predicted {row['planned'][what] / scale:.1f} {unit}"
        off = error_text(row["error_percent"][what])
        lines.append(Line(f"planner: {name}: {what}", measured, predicted, off))
    return lines


def error_text(percent: float | None) -> str:
    return NOT_YET if percent is None else f"off by {percent:+.1f} %"


def of_peers(record: dict[str, Any]) -> list[Line]:
    """Tokens per second of each arm, and how many times as long as megalora's its step takes."""
    lines = []
    for case in record["cases"]:
        for text in case["wrong"]:
            lines.append(Line(f"peers, {case['shape']}: {text}", "-", "", "FAILED"))
        for row in case["rows"]:
            name = f"peers, {case['shape']}: {row['arm']}"
            if row["status"] != "ok" or "over_megalora" not in row:
                lines.append(Line(name, "-", "", row["status"]))
                continue
            times = f"{row['over_megalora']['step']['median']:.2f} times megalora's step"
            beside = f"{row['peak_bytes'] / GIB:.2f} GiB"
            # Measured on a CPU an arm has ratios to megalora, but no times of its own.
            if milliseconds := row.get("step_ms"):
                rate = 1e3 * case["tokens"] / milliseconds["median"]
                beside = f"{rate:.0f} tokens/s, {beside}"
            lines.append(Line(name, times, beside, "ok"))
    return lines


def of_shared(record: dict[str, Any]) -> list[Line]:
    """Each layout that shared the GPU, with its deviations from float64."""
    lines = []
    for row in record["rows"]:
        name = f"shared: {row['case']}"
        if row["failed"]:
            # A traceback's last line is the error itself.
            lines.append(Line(name, "-", row["failed"].strip().splitlines()[-1][:100], "FAILED"))
            continue
        values = f"loss {row['loss']:.0e}, gradient {row['gradient']:.0e}"
        verdict = "FAILED" if row["exceeded"] else "pass"
        lines.append(Line(name, values, ", ".join(row["exceeded"]), verdict))
    for name in record["not_reached"]:
        lines.append(Line(f"shared: {name}", "-", "", "not reached"))
    return lines


def of_calibration(record: dict[str, Any]) -> list[Line]:
    kinds = ("gemm", "grouped_gemm", "attention", "memory")
    counts = ", ".join(f"{len(record[kind])} {kind}" for kind in kinds)
    layer = record["overhead"]["layer_forward_s"] + record["overhead"]["layer_backward_s"]
    return [Line("calibration", counts, f"host {1e6 * layer:.0f} us a layer", "ok")]


def of_layouts(record: dict[str, Any]) -> list[Line]:
    """Each layout's speed, and the planner's errors for it."""
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
    for name in record["not_reached"]:
        lines.append(Line(f"layout: {name}", "-", "", "not reached"))
    return lines


def of_steps(record: dict[str, Any]) -> list[Line]:
    """How each step of ``gpu_all.sh`` ended."""
    lines = []
    for name, step in record["steps"].items():
        lines.append(Line(f"step: {name}", f"{step['seconds']:g} s", step["why"], step["result"]))
    return lines


READERS: dict[str, Callable[[dict[str, Any]], list[Line]]] = {
    "gpu_tests.json": of_tests,
    "gpu_anchors.json": of_anchors,
    KERNELS: of_kernels,
    "gpu_tuned.json": of_tune,
    TUNED: of_kernels,
    "gpu_model.json": of_model,
    "gpu_peers.json": of_peers,
    "gpu_shared.json": of_shared,
    "gpu_calibration.json": of_calibration,
    "gpu_layouts.json": of_layouts,
    "gpu_all.json": of_steps,
}
"""What reads each file, in the order of the table."""


def show(lines: Iterable[Line]) -> str:
    """Return the table; below it rows whose cells would make all others too wide to read."""
    rows: list[Line] = []
    below: list[str] = []
    for line in lines:
        if len(line.what) <= WIDEST_NAME and max(map(len, line[1:])) <= WIDEST:
            rows.append(line)
            continue
        # The verdict first: what follows is long.
        cells = (line.verdict, line.what, line.measured, line.beside)
        below.append(" | ".join(cell for cell in cells if cell not in ("", "-")))
    return "\n".join([table(("what", "measured", "beside", "verdict"), rows), *below])


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
                what = name.removeprefix("gpu_").removesuffix(".json")
                lines.append(Line(what, "-", "", NOT_YET))
            continue
        try:
            record = json.loads(path.read_text())
            rows = reader(record)
            # The goals are read from all records together, later: here only to see whether they can
            # be, so that a broken file is named and takes no other with it.
            of_goals({name: record} if name in (KERNELS, TUNED) else {})
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            refused.append(f"{path}: not the record that belongs there ({error!r})")
            continue
        records[name] = record
        lines += rows
    return records, lines, refused


def is_dry(record: dict[str, Any]) -> bool:
    """Whether a record comes from a dry run; some scripts say so among their settings."""
    return bool(record.get("dry") or record.get("settings", {}).get("dry"))


def main(given: list[str] | None = None) -> int:
    words = sys.argv[1:] if given is None else given
    folder = Path(words[0]) if words else Path("benchmarks/results")
    if len(words) > 1 or not folder.is_dir():
        print(f"gpu_summary: want one folder of results, got {' '.join(words)!r}", file=sys.stderr)
        return 2
    records, lines, refused = read(folder)
    lines = of_goals(records) + lines
    # Usually one; two cards in a folder are worth knowing before any comparison.
    devices = sorted({record["device"] for record in records.values() if "device" in record})
    print(", ".join(devices) or "nothing was measured")
    if any(is_dry(record) for record in records.values()):
        print("a dry run: times, ratios and errors mean nothing")
    print(show(lines))
    for text in refused:
        print(f"REFUSED {text}", file=sys.stderr)
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
