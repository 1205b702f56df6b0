"""Write tables of the page: any rows of text, and the one that sums up each run."""

from collections.abc import Sequence
from html import escape
from statistics import median
from typing import Any

from megalora.report.axis import brief
from megalora.report.records import RunRecords


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where the screen is narrow; all text is escaped."""
    lines: list[str] = []
    if head:
        cells = "".join(f"<th>{escape(text)}</th>" for text in head)
        lines.append(f"<tr>{cells}</tr>")
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(text)}</td>" for text in rest)
        lines.append(f"<tr><th>{escape(first)}</th>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def run_table(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    """What one wants to know first of each run, a column each."""
    columns = [_facts(run) for run in runs]
    keys = list(dict.fromkeys(key for facts in columns for key in facts))
    rows: list[list[str]] = []
    for key in keys:
        rows.append([key, *(facts.get(key, "") for facts in columns)])
    return html_table(["", *names], rows)


def _facts(run: RunRecords) -> dict[str, str]:
    """Name -> value in words; what a run has not recorded is left out."""
    facts: dict[str, str] = {}
    loss = run.series.get("loss")
    if loss:
        total = run.option("train.steps")
        of_total = f" of {total}" if total else ""
        facts["steps"] = f"{loss.steps[-1]}{of_total}"
        facts["training loss"] = f"{loss.values[0]:.4f} to {loss.values[-1]:.4f}"
    evaluations = run.series.get("eval_loss")
    if evaluations:
        best = min(evaluations.values)
        at = evaluations.steps[evaluations.values.index(best)]
        facts["eval loss"] = f"{evaluations.values[0]:.4f} to {evaluations.values[-1]:.4f}"
        facts["best eval loss"] = f"{best:.4f} at step {at}"
    speed = run.series.get("tokens_per_second")
    if speed:
        facts["tokens per second, median"] = brief(median(speed.values))
    memory = run.series.get("memory_gib")
    if memory:
        facts["memory of the first rank"] = f"{max(memory.values):.2f} GiB"
    for name, option in (("base", "model.path"), ("data", "data.train"), ("rank", "lora.rank")):
        value: Any = run.option(option)
        if value is not None:
            facts[name] = str(value)
    layout = run.config.get("parallel")
    if isinstance(layout, dict):
        sizes = [f"{key}={size}" for key, size in layout.items() if size != 1]
        facts["layout"] = " ".join(sizes) or "one rank, or data parallel alone"
    for name, key in (("device", "device"), ("ranks", "ranks")):
        if key in run.environment:
            facts[name] = str(run.environment[key])
    return facts
