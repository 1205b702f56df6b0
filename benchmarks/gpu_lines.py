"""Read the records of ``gpu_all.sh``, each into the rows of the summary's table."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks.gpu_timing import number

NOT_YET = "not yet measured on a GPU"
GIB = 2**30


class Line(NamedTuple):
    """One row of the table."""

    what: str
    measured: str
    beside: str
    """Value that the measured one is compared with."""
    verdict: str


def of_kernels(record: dict[str, Any]) -> list[Line]:
    """Return failures, and cases for which there was no time; values are in
    ``gpu_summary.of_goals``."""
    return failures_of("kernels", record["failures"], record["not_reached"])


def failures_of(what: str, failures: Iterable[str], not_reached: list[str]) -> list[Line]:
    """Return a row for each failure, and one for all cases that were not reached."""
    lines = [Line(f"{what}: {failure}", "-", "", "FAILED") for failure in failures]
    if not_reached:
        # A short budget leaves dozens.
        left = f"{what}: {len(not_reached)} cases, first {not_reached[0]}"
        lines.append(Line(left, "-", "", "not reached"))
    return lines


def of_tests(record: dict[str, Any]) -> list[Line]:
    """Return the number of tests that passed, and each that was skipped: on a GPU every skip needs
    a reason."""
    passed = 0
    skipped = []
    for row in record["rows"]:
        passed += row["outcome"] == "passed"
        if row["outcome"] == "skipped":
            # Without the path of its file.
            name = row["test"].rpartition("::")[2]
            skipped.append(Line(f"tests: {name}", "-", row["why"], "skipped"))
    verdict = "FAILED" if record["failures"] else "ok"
    lines = [Line("tests", f"{passed} passed", f"{len(skipped)} skipped", verdict)]
    lines += skipped
    return lines + failures_of("tests", record["failures"], record["not_reached"])


def of_anchors(record: dict[str, Any]) -> list[Line]:
    """Return each anchor with the range in which it was expected."""
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
    """Return how much faster the variants of the table are than the rule's, and from how many rows
    on torch's GEMM is faster."""
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
    """Return each arm's speed and memory, with its profile and the planner's errors where it has
    them."""
    lines = []
    for row in record["rows"]:
        name = f"train: {row['arm']}, {row['layers']} layers"
        if row["status"] != "ok":
            lines.append(Line(name, "-", "", row["status"]))
            continue
        memory = ""
        # A dry run on a CPU has no peak.
        if row["peak_bytes"] is not None:
            memory = f", peak {row['peak_bytes'] / GIB:.1f} GiB"
        speed = f"{row['tokens_per_s']:.0f} tokens/s"
        lines.append(Line(name, speed, f"{row['tflops']:.0f} TFLOP/s{memory}", "ok"))
        if "profile" in row:
            lines += of_profile(name, row["profile"])
        if "planned" in row:
            lines += of_planned(name, row)
    return lines


def of_profile(name: str, profile: dict[str, Any]) -> list[Line]:
    """Return the launches of a layer, and the gaps and waits of a step."""
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
    # Sorted by their time: the first three show where it goes.
    for kernel in profile["kernels"][:3]:
        share = f"{100 * kernel['share']:.0f} % of kernel time"
        lines.append(Line(f"{name}: {kernel['phase']}", share, kernel["name"][:60], ""))
    return lines


def of_planned(name: str, row: dict[str, Any]) -> list[Line]:
    """Return the planner's errors, in percent of what was measured."""
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
    """Return each arm's tokens per second, and its step over megalora's."""
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
    """Return each layout that ran on a shared GPU, with its deviations from float64."""
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


def of_long(record: dict[str, Any]) -> list[Line]:
    """Return each check of long rows, with the line that it printed."""
    lines = []
    for row in record["rows"]:
        name = f"long: {row['check']}"
        failed = row["status"].startswith("FAILED")
        # A failure says by itself what was exceeded; what was measured is beside it.
        verdict = "FAILED" if failed else row["status"]
        lines.append(Line(name, row["line"], row["status"] if failed else "", verdict))
    return lines + failures_of("long", [], record["not_reached"])


def of_calibration(record: dict[str, Any]) -> list[Line]:
    """Return the numbers of measured rates, and the host's time for a layer."""
    kinds = ("gemm", "grouped_gemm", "attention", "memory")
    counts = ", ".join(f"{len(record[kind])} {kind}" for kind in kinds)
    layer = record["overhead"]["layer_forward_s"] + record["overhead"]["layer_backward_s"]
    return [Line("calibration", counts, f"host {1e6 * layer:.0f} us a layer", "ok")]


def of_coded(record: dict[str, Any]) -> list[Line]:
    """Return the time of each way to compute with codes, over that of plain weights."""
    lines = []
    for row in record["rows"]:
        name = f"codes: {row['case']}: {row['arm']}"
        if row["status"] != "ok":
            lines.append(Line(name, "-", "", f"FAILED: {row['status']}"))
            continue
        beside = f"{number(row['over_plain'], 2)} times plain weights"
        lines.append(Line(name, f"{row['us']:.0f} us", beside, "ok"))
    return lines + failures_of("codes", [], record["not_reached"])


def of_layouts(record: dict[str, Any]) -> list[Line]:
    """Return each layout's speed, and the planner's errors for it."""
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
    """Return the outcome of each step of ``gpu_all.sh``."""
    lines = []
    for name, step in record["steps"].items():
        lines.append(Line(f"step: {name}", f"{step['seconds']:g} s", step["why"], step["result"]))
    return lines
