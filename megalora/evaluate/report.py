"""Show an evaluation's result: lines, a table of examples, and a JSON record. No torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalora.evaluate.request import Plan

if TYPE_CHECKING:
    from megalora.evaluate.verdict import Judged, Kind, Verdict

EXAMPLES = 10
_WIDTHS = (28, 18, 24, 24)
"""Columns of the table of examples: question, expected answer, answers."""


@dataclass(frozen=True)
class _Column:
    """A number beside the loss."""

    key: str
    """Its name in ``Judged.others``."""
    title: str
    form: str = ".4f"
    """As ``format`` takes it."""
    width: int = 12


@dataclass(frozen=True)
class _Table:
    columns: tuple[_Column, ...]
    count: str
    """What the last column counts."""


_ACCURACY = _Column("accuracy", "accuracy", ".1%")
_TABLES: dict[str, _Table] = {
    "tokens": _Table((_Column("perplexity", "perplexity", ".4g"),), "target tokens"),
    "pairs": _Table((_ACCURACY, _Column("margin", "margin")), "pairs"),
    "rated": _Table(
        (
            _Column("kl", "kl"),
            _Column("good_reward", "good reward", width=13),
            _Column("bad_reward", "bad reward", width=13),
        ),
        "samples",
    ),
    "taught": _Table(
        (_Column("divergence", "divergence"), _Column("cross_entropy", "cross entropy", width=15)),
        "target tokens",
    ),
    "labels": _Table((_ACCURACY,), "samples"),
}
"""By what the loss is of (``verdict.Kind``)."""


def text_of(plan: Plan, verdict: "Verdict") -> str:
    """Lines for the user: the base first, then the adapter and what it changes."""
    lines = [verdict.data]
    if verdict.questions:
        lines.append(_asked(plan, verdict))
    # The base first, as what the adapter is held against.
    # "base" sorts behind "adapter".
    names = sorted(verdict.judged, reverse=True)
    if not verdict.asked:
        table = _TABLES[verdict.kind]
        head = f"{'':<8}{'loss':>10}"
        for column in table.columns:
            head += f"{column.title:>{column.width}}"
        lines.append(f"{head}{table.count:>15}")
    for name in names:
        lines.append(_line(name, verdict.judged[name], verdict))
    if verdict.asked:
        lines.append("no loss: a server gives answers alone; without --url it is computed here")
    lines += verdict.notes
    if cut := _cut(plan, verdict, names):
        lines.append(cut)
    if verdict.questions:
        lines += ["", *_examples(verdict, names, plan.request.rule)]
    return "\n".join(lines)


def _asked(plan: Plan, verdict: "Verdict") -> str:
    """Which rows are answered: those of the samples above, and no others; and by whom."""
    first = "the first " if plan.request.limit else "all "
    rows = f"answers: to the last question of {first}{len(verdict.questions):,} rows of these"
    if not verdict.asked:
        return rows
    # The base stands first, as below.
    ids = " and ".join(verdict.asked[name] for name in sorted(verdict.asked, reverse=True))
    return f"{rows}, by {ids} at {plan.request.url}"


def _line(name: str, one: "Judged", verdict: "Verdict") -> str:
    """A row of the table: the loss where there is one, and answers where there are any."""
    line = f"{name:<8}"
    if one.loss is not None:
        line += f"{one.loss:>10.4f}"
        # Perplexity is made of the loss, and no objective reports it.
        found = one.others
        if verdict.kind == "tokens":
            found = {"perplexity": one.perplexity}
        for column in _TABLES[verdict.kind].columns:
            # There may be no such thing: no bad answer, or no accuracy of values.
            cell = "none"
            if column.key in found:
                cell = format(found[column.key], column.form)
            line += f"{cell:>{column.width}}"
        line += f"{one.count:>15,}"
    if one.right:
        line += f"   {sum(one.right):,} of {len(one.right):,} right ({one.accuracy:.1%})"
    return line


def _cut(plan: Plan, verdict: "Verdict", names: list[str]) -> str:
    """A line about answers that are not whole; empty where all are."""
    # An answer that was cut may be wrong for that reason alone.
    cut = []
    for name in names:
        one = verdict.judged[name]
        if one.num_cut:
            cut.append(f"{one.num_cut:,} of {len(one.answers):,} by the {name}")
    if not cut:
        return ""
    limit = plan.sampling.max_new_tokens
    return f"cut at {limit:,} tokens (--max-new-tokens): {', '.join(cut)}"


def _examples(verdict: "Verdict", names: list[str], rule: str) -> list[str]:
    """A table of the first questions; + marks right answers, - wrong ones."""
    # The first row has the titles; widths are the same for all.
    rows: list[list[str]] = [["question", "expected", *names]]
    for number, question in enumerate(verdict.questions[:EXAMPLES]):
        cells = [question.asked, question.expected]
        for name in names:
            one = verdict.judged[name]
            # Fitted here: what is too long is cut at its beginning, where the mark stands.
            answer = _fit(one.answers[number], _WIDTHS[-1] - 2)
            cells.append(f"{'+' if one.right[number] else '-'} {answer}")
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
        "url": request.url,
        "served": verdict.asked or None,
        "dtype": plan.config.model.dtype,
        "rule": request.rule if verdict.questions else None,
        "sampling": request.sampling,
    }
    for name, one in verdict.judged.items():
        found[name] = {}
        if one.loss is not None:
            # Keys of JSON are written without spaces.
            counted = _TABLES[verdict.kind].count.replace(" ", "_")
            found[name] |= {"loss": one.loss, counted: one.count, **_others(one, verdict.kind)}
        if one.right:
            found[name] |= {
                "right": sum(one.right),
                "accuracy": one.accuracy,
                "cut": one.num_cut,
            }
    # All answers, of which the text shows the first ten.
    rows: list[dict[str, Any]] = []
    for number, question in enumerate(verdict.questions):
        row: dict[str, Any] = {"row": question.row, "expected": question.expected}
        for name, one in verdict.judged.items():
            row[name] = {"answer": one.answers[number], "right": one.right[number]}
        rows.append(row)
    found["answers"] = rows
    return found


def _others(one: "Judged", kind: "Kind") -> dict[str, Any]:
    """What a record says beside the loss."""
    if kind == "tokens":
        return {"perplexity": one.perplexity}
    if kind in ("pairs", "rated"):
        return {"preference": one.others}
    return dict(one.others)


def write_record(plan: Plan, verdict: "Verdict", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record_of(plan, verdict), indent=1) + "\n")
