"""Make the rows of the comparison: check that losses agree, compute ratios of steps taken in one
round, and show the table."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from benchmarks.gpu_timing import number, table
from benchmarks.peer_worker import Sample

BASE_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
"""Largest relative difference of the first loss, which is the base's. Rounding gives 1e-7 in
float32."""
STEP_LIMIT = {torch.float32: 2e-3, torch.bfloat16: 5e-2}
"""Largest difference of a later loss, as a share of the whole fall of the loss. Rounding gives 1e-5
in float32; an alpha of half or twice the size gives 0.3 and more."""
GOALS = {"bridge per expert": 1.5, "peft": 3.0}
"""How many times as long as megalora's a step should take on a CPU."""
TIMES = ("over_megalora", "step_ms", "passes_ms", "rounds", "peak_bytes")
"""Fields of a row that mean something only where the arms compute the same."""


def check_losses(
    rows: Mapping[str, Mapping[str, Any]], names: Iterable[str], reference: str, dtype: torch.dtype
) -> list[str]:
    """What is wrong with the losses of the arms ``names``, a sentence each; empty where they agree
    with the reference's."""
    wrong = []
    want = rows[reference]["losses"]
    fall = want[0] - want[-1]
    # Differences are measured by the fall, so without one nothing can be judged.
    if not math.isfinite(fall) or fall <= 0:
        return [f"{reference}: the loss does not fall: {want}"]
    for name in names:
        row = rows[name]
        # Written so that NaN, which is not less than anything, is a difference too.
        if not abs(row["losses"][0] - want[0]) <= BASE_LIMIT[dtype] * abs(want[0]):
            wrong.append(
                f"{name}: the first loss, the base's, is {row['losses'][0]}, {reference}'s"
                f" {want[0]}"
            )
        elif row["same_factors"]:
            if differ(row["losses"], want, STEP_LIMIT[dtype] * fall):
                wrong.append(f"{name}: losses {row['losses']} differ from {reference}'s {want}")
        # Other factors train another way; that they train is all that can be asked.
        elif not row["losses"][-1] < row["losses"][0]:
            wrong.append(f"{name}: the loss does not fall: {row['losses']}")
    return wrong


def differ(ours: Sequence[float], theirs: Sequence[float], limit: float) -> bool:
    """Whether a loss differs from the other side's by more than ``limit``; NaN does."""
    return any(not abs(a - b) <= limit for a, b in zip(ours, theirs, strict=True))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    tenths = values
    # Quantiles need two values.
    if len(values) > 1:
        tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p10": tenths[0], "p90": tenths[-1]}


def ratios(taken: Sequence[Sample], reference: Sequence[Sample]) -> dict[str, Any]:
    """How many times as long as the reference's step, round by round, in each of the four
    measures."""
    over = {}
    for field in fields(Sample):
        # Within a round: what slows the machine down for a while slows both steps of it.
        of_rounds = []
        # An arm that failed on the way has fewer rounds.
        for ours, theirs in zip(taken, reference, strict=False):
            of_rounds.append(getattr(ours, field.name) / getattr(theirs, field.name))
        over[field.name] = spread(of_rounds)
    return {"rounds": len(taken), "over_megalora": over}


def timed(taken: Sequence[Sample]) -> dict[str, Any]:
    """Milliseconds, for devices whose times mean something."""
    return {
        "step_ms": spread([1e3 * sample.step for sample in taken]),
        "passes_ms": spread([1e3 * sample.passes for sample in taken]),
    }


def without_times(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a comparison whose arms do not agree."""
    kept = []
    for row in rows:
        without = dict(row)
        for name in TIMES:
            without.pop(name, None)
        kept.append(without)
    return kept


def show(case: Mapping[str, Any], dry: bool) -> str:
    """The table of one shape; below it why an arm has no numbers, and whether goals are met."""
    title = (
        f"\n{case['shape']}: {case['num_hidden_layers']} layers, hidden {case['hidden_size']},"
        f" {case['num_experts']} experts of {case['moe_intermediate_size']}, top"
        f" {case['num_experts_per_tok']}, {case['tokens']} tokens ({case['rows_per_expert']:.0f}"
        f" rows per expert), rank {case['rank']}"
    )
    if case["wrong"]:
        title += "\nNo times, because losses differ:"
        for line in case["wrong"]:
            title += f"\n  {line}"
        return title
    header = (
        "arm", "step / megalora", "10-90 %", "processor time", "fwd+bwd", "peak MiB", "adapters",
        "loss", "same factors",
    )  # fmt: skip
    lines = []
    remarks = []
    for row in case["rows"]:
        if row["status"] == "ok" and "over_megalora" in row:
            lines.append(_line(row))
            remarks.append(f"  {row['arm']}: {row['note']}")
        else:
            remarks.append(f"  {row['arm']}: {row['status']}")
    if dry:
        remarks.append("  times mean nothing: a dry run")
    else:
        remarks += _goals(case["rows"])
    return "\n".join([title, table(header, lines), *remarks])


def _line(row: Mapping[str, Any]) -> tuple[object, ...]:
    over = row["over_megalora"]
    step = over["step"]
    return (
        row["arm"],
        number(step["median"], 2),
        f"{step['p10']:.2f}-{step['p90']:.2f}",
        number(over["step_cpu"]["median"], 2),
        number(over["passes"]["median"], 2),
        number(row["peak_bytes"] / 2**20, 1),
        f"{row['adapter_parameters']:,}",
        "{:.4f} to {:.4f}".format(row["losses"][0], row["losses"][-1]),
        "yes" if row["same_factors"] else "no",
    )


def _goals(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Whether each peer takes as many times as long as the goal says."""
    lines = []
    for row in rows:
        if row["arm"] in GOALS and "over_megalora" in row:
            goal = GOALS[row["arm"]]
            found = row["over_megalora"]["step"]["median"]
            verdict = "met" if found >= goal else "missed"
            lines.append(f"  goal: {row['arm']} takes {goal} times as long: {verdict}, {found:.2f}")
    return lines
