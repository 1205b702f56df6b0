"""Show all results of ``gpu_all.sh`` in one table: by how much each goal is met or missed, and the
error of each prediction.

    python -m benchmarks.gpu_summary [FOLDER]

Where nothing has been measured, a row says so. A file that is not the record that its name
promises is rejected by name, with exit code 1; the others are shown.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import gpu_lines
from benchmarks.goals import EVERY, QUACK, Goal
from benchmarks.gpu_lines import NOT_YET, Line
from benchmarks.gpu_timing import number, table

KERNELS = "gpu_kernels.json"
TUNED = "gpu_kernels_tuned.json"
WIDEST_NAME = 110
"""Characters that the first cell of a row in the table may have."""
WIDEST = 70
"""Characters that its other cells may have."""
Records = dict[str, dict[str, Any]]


def by_how_much(goal: Goal, value: float) -> str:
    """Return by how many percent of its limit a value meets or misses a goal."""
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
    """Return what a goal asks for, as text."""
    sign = ">=" if goal.at_least else "<="
    return f"must {sign} {goal.must:g}, good {goal.good:g}"


READERS: dict[str, Callable[[dict[str, Any]], list[Line]]] = {
    "gpu_tests.json": gpu_lines.of_tests,
    "gpu_anchors.json": gpu_lines.of_anchors,
    KERNELS: gpu_lines.of_kernels,
    "gpu_tuned.json": gpu_lines.of_tune,
    TUNED: gpu_lines.of_kernels,
    "gpu_coded.json": gpu_lines.of_coded,
    "gpu_model.json": gpu_lines.of_model,
    "gpu_peers.json": gpu_lines.of_peers,
    "gpu_shared.json": gpu_lines.of_shared,
    "gpu_packed.json": gpu_lines.of_long,
    "gpu_cp.json": gpu_lines.of_long,
    "gpu_long.json": gpu_lines.of_long,
    "gpu_calibration.json": gpu_lines.of_calibration,
    "gpu_layouts.json": gpu_lines.of_layouts,
    "gpu_all.json": gpu_lines.of_steps,
}
"""Function that reads each file, in the order of the table."""


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
    """Return records by file, their rows, and a message for each file that is refused."""
    records: Records = {}
    lines: list[Line] = []
    refused = []
    for name, reader in READERS.items():
        path = folder / name
        if not path.is_file():
            # Goals without a value say so one by one; without gpu_all.json there is nothing to say.
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
