"""Show what the model answered while it trained: each question with its answers, step by step."""

from html import escape
from typing import Any

from megalora.report.records import RunRecords
from megalora.report.tables import html_table

MOST_STEPS = 6
"""A table has the first step and the last ones: what came of it counts more than every step of the
way."""


def answer_section(run: RunRecords) -> str:
    """A table for each question of ``log.samples``; empty for a run that asked none."""
    if not run.answers:
        return ""
    steps = sorted(run.answers)
    shown = steps
    note = ""
    if len(steps) > MOST_STEPS:
        shown = [steps[0], *steps[1 - MOST_STEPS :]]
        left_out = len(steps) - len(shown)
        note = f'<p class="muted">{left_out:,} steps between are in answers.jsonl alone.</p>'
    # All steps have the same questions.
    parts: list[str] = []
    for number, first in enumerate(run.answers[steps[-1]]):
        rows: list[list[str]] = []
        for step in shown:
            answers = run.answers[step]
            if number < len(answers):
                rows.append([f"step {step}", _text(answers[number], "answer")])
        if expected := _text(first, "expected"):
            rows.append(["in the data", expected])
        parts.append(f"<p>{escape(_text(first, 'asked'))}</p>{html_table([], rows)}")
    return f"{note}{''.join(parts)}"


def _text(answer: dict[str, Any], key: str) -> str:
    """A part of a record, in which a damaged file may have anything."""
    return str(answer.get(key, ""))
