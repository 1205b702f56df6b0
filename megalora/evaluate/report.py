"""Show an evaluation's result: lines, a table of examples, and a JSON record. No torch."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalora.evaluate.request import Plan

if TYPE_CHECKING:
    from megalora.evaluate.judge import Verdict

EXAMPLES = 10
_WIDTHS = (28, 18, 24, 24)
"""Columns of the table of examples: question, expected answer, answers."""


def text_of(plan: Plan, verdict: "Verdict") -> str:
    """Lines for the user: the base first, then the adapter and what it changes."""
    lines = [verdict.data]
    if verdict.questions:
        lines.append(_asked(plan, verdict))
    lines.append(f"{'':<8}{'loss':>10}{'perplexity':>12}{'target tokens':>15}")
    # The base first, as what the adapter is held against.
    # "base" sorts behind "adapter".
    names = sorted(verdict.judged, reverse=True)
    for name in names:
        one = verdict.judged[name]
        line = f"{name:<8}{one.loss:>10.4f}{one.perplexity:>12.4g}{one.num_tokens:>15,}"
        if one.right:
            line += f"   {sum(one.right):,} of {len(one.right):,} right ({one.accuracy:.1%})"
        lines.append(line)
    if verdict.questions:
        lines += ["", *_examples(verdict, names, plan.request.rule)]
    return "\n".join(lines)


def _asked(plan: Plan, verdict: "Verdict") -> str:
    """Which rows are answered: those of the samples above, and no others."""
    first = "the first " if plan.request.limit else "all "
    return f"answers: to the last question of {first}{len(verdict.questions):,} rows of these"


def _examples(verdict: "Verdict", names: list[str], rule: str) -> list[str]:
    """A table of the first questions; + marks right answers, - wrong ones."""
    rows: list[list[str]] = [["question", "expected", *names]]
    for number, question in enumerate(verdict.questions[:EXAMPLES]):
        cells = [question.asked, question.expected]
        for name in names:
            one = verdict.judged[name]
            cells.append(f"{'+' if one.right[number] else '-'} {one.answers[number]}")
        rows.append(cells)
    lines = []
    for row in rows:
        cells = [_fit(cell, width) for cell, width in zip(row, _WIDTHS, strict=False)]
        lines.append(" | ".join(cells).rstrip())
    return [f"the first {len(rows) - 1} by {rule}, + right, - wrong:", *lines]


def _fit(text: str, width: int) -> str:
    """One line of exactly this width; the end counts, as answers end with the result."""
    # Line breaks in an answer would tear the table apart.
    flat = " ".join(text.split())
    if len(flat) > width:
        flat = f"...{flat[len(flat) - width + 3 :]}"
    return flat.ljust(width)


def record_of(plan: Plan, verdict: "Verdict") -> dict[str, Any]:
    """What ``--out`` writes: what was asked, and all that was found."""
    request = plan.request
    found: dict[str, Any] = {
        "evaluation": request.target,
        "adapter_folder": str(plan.adapter) if plan.adapter else None,
        "base_folder": str(plan.base),
        "config": str(plan.config_file) if plan.config_file else None,
        "data": verdict.data,
        "source": request.data,
        "dtype": plan.config.model.dtype,
        "rule": request.rule if verdict.questions else None,
        "sampling": request.sampling,
    }
    for name, one in verdict.judged.items():
        found[name] = {
            "loss": one.loss,
            "perplexity": one.perplexity,
            "target_tokens": one.num_tokens,
        }
        if one.right:
            found[name] |= {"right": sum(one.right), "accuracy": one.accuracy}
    rows: list[dict[str, Any]] = []
    for number, question in enumerate(verdict.questions):
        row: dict[str, Any] = {"row": question.row, "expected": question.expected}
        for name, one in verdict.judged.items():
            row[name] = {"answer": one.answers[number], "right": one.right[number]}
        rows.append(row)
    found["answers"] = rows
    return found


def write_record(plan: Plan, verdict: "Verdict", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record_of(plan, verdict), indent=1) + "\n")
