"""Put the page together: one HTML file that needs no script, no network and no other file."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from megalora.paths import prepare_file
from megalora.report.answers import answer_section
from megalora.report.chart import Curve, chart
from megalora.report.colours import MOST_RUNS, SERIES, style
from megalora.report.experts import adapter_section, expert_section
from megalora.report.records import RunRecords, flat, read_run
from megalora.report.tables import html_table, run_table

CHARTS = (
    ("Loss (nats per target token, or per pair)", "loss"),
    ("Pairs whose chosen answer has the higher reward (share)", "accuracy"),
    ("Reward of the chosen less that of the rejected answer", "margin"),
    ("Reward of chosen answers", "chosen_reward"),
    ("Reward of rejected answers", "rejected_reward"),
    ("Reward of good answers", "good_reward"),
    ("Reward of bad answers", "bad_reward"),
    ("Distance from the reference, estimated (nats)", "kl"),
    ("Reward, mean of completions", "reward"),
    ("Reward, standard deviation", "reward_std"),
    ("Tokens of a completion", "completion_tokens"),
    ("Completions that the length limit has cut, share", "truncated"),
    ("Groups whose rewards are all alike, share", "groups_alike"),
    ("Age of completions, largest (steps)", "staleness_max"),
    ("Ratio to the proximal policy", "ratio"),
    ("Tokens whose gradient a clip took (share)", "clipped_share"),
    ("Tokens that were not dropped (share)", "kept_share"),
    ("Weight for the mismatch with the engine", "mismatch_weight"),
    ("Entropy of the next token (nats)", "entropy"),
    ("Log-ratio of the engine to the model, mean without signs (nats)", "engine_gap"),
    ("Log-ratio of the engine to the model, largest (nats)", "engine_gap_max"),
    ("Divergence of the model from the engine, k3 (nats)", "engine_k3"),
    ("Divergence from the teacher (nats per target token)", "divergence"),
    ("Cross entropy (nats per target token)", "cross_entropy"),
    ("Cross entropy of chosen answers (nats per target token)", "chosen_cross_entropy"),
    ("Unevenness of experts (1: all alike), mean of layers and sequences", "balance_loss"),
    ("Learning rate", "lr"),
    ("Gradient norm before clipping", "grad_norm"),
    ("Tokens per second", "tokens_per_second"),
    ("Memory of the first rank, most so far (GiB)", "memory_gib"),
    ("Slots that hold a token (share)", "slots_used"),
    ("Entropy of tokens over experts (1: all alike), mean of layers", "expert_entropy"),
    ("Starved experts (share with under a tenth of an equal part)", "starved_experts"),
)
"""Title of each chart, and the quantity of ``metrics.jsonl`` that it shows."""


def write_report(folders: Sequence[Path], out: Path | None, *, samples: bool = True) -> Path:
    """Write the page of some runs; returns its path.

    Args:
        folders: run folders.
        out: the file; None for ``report.html`` in the one run's folder, or here for several.
        samples: whether the page has the first samples of the data, and answers to questions of it.

    Raises:
        ValueError: a folder is not a run's, there are too many, or the file cannot be written.
    """
    if len(folders) > MOST_RUNS:
        raise ValueError(
            f"a page shows {MOST_RUNS} runs at most, in colours that everybody can tell apart; got"
            f" {len(folders)}"
        )
    if len(set(folders)) < len(folders):
        raise ValueError("the same run folder is named twice")
    runs = [read_run(folder) for folder in folders]
    if out is None:
        out = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    prepare_file(out)
    # Text of a damaged sample may hold half of a character, which UTF-8 cannot.
    out.write_bytes(page(runs, samples=samples).encode("utf-8", errors="replace"))
    return out


def page(runs: Sequence[RunRecords], *, samples: bool = True) -> str:
    """The page as HTML. Everything that a run folder says is escaped."""
    names = names_of(runs)
    title = escape(f"Training report: {', '.join(names)}")
    sections = [
        _summary(runs, names),
        _curves(runs, names),
        _for_each(runs, names, "Tokens per expert and layer", expert_section),
        _for_each(runs, names, "Size of the adapter", adapter_section),
    ]
    if samples:
        sections.append(_for_each(runs, names, "Answers while it trained", answer_section))
        sections.append(_for_each(runs, names, "Samples of the data", _samples))
    sections.append(_configuration(runs, names))
    sections.append(_for_each(runs, names, "Environment", _environment))
    sections.append(_for_each(runs, names, "What is missing", _notes))
    # The policy lets no browser fetch anything, whatever a run folder holds.
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style()}</style></head>
<body><h1>{title}</h1>
{"".join(sections)}
</body></html>
"""


def names_of(runs: Sequence[RunRecords]) -> list[str]:
    """A name for each run: its folder's, with the one above where two have the same."""
    short = [run.name for run in runs]
    if len(set(short)) == len(short):
        return short
    return [f"{run.folder.resolve().parent.name}/{run.name}" for run in runs]


def _section(title: str, body: str) -> str:
    """A section; nothing where there is nothing in it."""
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>\n" if body else ""


def _for_each(
    runs: Sequence[RunRecords],
    names: Sequence[str],
    title: str,
    part: Callable[[RunRecords], str],
) -> str:
    """A section with a part for each run that has something to show."""
    parts: list[str] = []
    for run, name in zip(runs, names, strict=True):
        body = part(run)
        if body:
            # One run needs no heading of its own.
            heading = f"<h3>{escape(name)}</h3>" if len(runs) > 1 else ""
            parts.append(f"{heading}{body}")
    return _section(title, "\n".join(parts))


def _summary(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    key = ""
    if len(runs) > 1:
        swatches: list[str] = []
        for number, name in enumerate(names):
            line = f'<line class="line {SERIES[number]}" x1="0" x2="40" y1="6" y2="6"/>'
            picture = f'<svg viewBox="0 0 40 12" aria-hidden="true">{line}</svg>'
            swatches.append(f"<span>{picture} {escape(name)}</span>")
        key = f'<p class="key">{" ".join(swatches)}</p>'
    return _section("Summary", key + run_table(runs, names))


def _curves(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    charts: list[str] = []
    for title, quantity in CHARTS:
        curves: list[Curve] = []
        for number, (run, name) in enumerate(zip(runs, names, strict=True)):
            if quantity in run.series:
                curves.append(Curve(number, f"{name}: {quantity}", run.series[quantity]))
            # Evaluations are seen beside what they evaluate.
            evaluated = f"eval_{quantity}"
            if evaluated in run.series:
                evaluations = run.series[evaluated]
                curves.append(Curve(number, f"{name}: {evaluated}", evaluations, dots=True))
        if curves:
            charts.append(chart(title, curves))
    note = '<p class="muted">Dots are evaluations; a band spans the values of merged steps.</p>'
    return _section("Curves", f'{note}<div class="grid">{"".join(charts)}</div>' if charts else "")


def _samples(run: RunRecords) -> str:
    parts: list[str] = []
    for number, sample in enumerate(run.samples, start=1):
        counts = f"{sample.get('in_loss', '?')} of {sample.get('tokens', '?')} tokens"
        parts.append(f"<p>Sample {number}: {escape(counts)} in the loss, underlined here</p><pre>")
        for part in sample.get("parts", []):
            # Text and whether it is in the loss; what is not that is of another version.
            if isinstance(part, list) and len(part) == 2:
                text = escape(str(part[0]))
                parts.append(f"<mark>{text}</mark>" if part[1] else text)
        parts.append("</pre>")
    return "".join(parts)


def _configuration(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    body = ""
    if len(runs) > 1:
        options = [flat(run.config) for run in runs]
        rows: list[list[str]] = []
        for key in sorted(set().union(*options)):
            values = [of_run.get(key, "") for of_run in options]
            if len(set(values)) > 1:
                rows.append([key, *values])
        if rows:
            body = html_table(["differs", *names], rows)
    for run, name in zip(runs, names, strict=True):
        if run.config_text:
            body += (
                f"<details><summary>{escape(name)}/config.yaml</summary>"
                f"<pre>{escape(run.config_text)}</pre></details>"
            )
    return _section("Configuration", body)


def _environment(run: RunRecords) -> str:
    rows = [[str(key), str(value)] for key, value in run.environment.items()]
    return html_table([], rows) if rows else ""


def _notes(run: RunRecords) -> str:
    items = [f"<li>{escape(note)}</li>" for note in run.notes]
    return f'<ul class="muted">{"".join(items)}</ul>' if items else ""
