"""Show each expert: how many tokens it had, and how large its adapter has become."""

from html import escape

import numpy as np

from megalora.report.adapter_norms import measure
from megalora.report.heat_map import even_edges, heat_map
from megalora.report.records import RunRecords
from megalora.report.tables import html_table
from megalora.train.expert_tokens import STARVED, entropy, starved

LOAD_EDGES = (STARVED, 0.25, 0.5, 0.75, 1.25, 1.5, 2.0, 3.0)
"""Bounds of colours, in equal shares; the darkest is starved, the middle one even."""
RECENT = 10
"""Records that the map adds up, the last ones."""


def expert_section(run: RunRecords) -> str:
    """Tokens per expert and layer over the last recorded steps, with entropy and starved share."""
    recorded = run.experts
    if recorded is None or not recorded.steps:
        return ""
    counts = recorded.counts[-RECENT:].sum(0)
    steps = recorded.steps[-RECENT:]
    with np.errstate(divide="ignore", invalid="ignore"):
        load = counts / counts.mean(-1, keepdims=True)
    title = f"Tokens over an equal share, steps {steps[0]} to {steps[-1]}"
    names = [str(layer) for layer in recorded.layers]
    picture = heat_map(title, load, LOAD_EDGES, names, unit="Rows are layers, columns experts:")
    rows: list[list[str]] = []
    evenness = entropy(counts)
    is_starved = starved(counts)
    for number, layer in enumerate(names):
        busiest = int(counts[number].argmax())
        rows.append(
            [
                layer,
                f"{evenness[number]:.4f}",
                f"{is_starved[number].mean():.1%}",
                f"{busiest} ({load[number, busiest]:.2f} shares)",
            ]
        )
    table = html_table(["layer", "entropy", "starved", "busiest expert"], rows)
    return (
        f'<div class="grid">{picture}</div><details><summary>entropy and starved experts by layer'
        f"</summary>{table}</details>"
    )


def adapter_section(run: RunRecords) -> str:
    """Norms of the newest checkpoint's adapter, by layer and expert, and by layer and
    projection."""
    if run.checkpoint is None:
        run.notes.append("no checkpoint, so no sizes of the adapter")
        return ""
    try:
        norms = measure(run.checkpoint, run.manifest)
    except ValueError as error:
        run.notes.append(str(error))
        return ""
    if norms.left_out:
        run.notes.append(
            f"{run.checkpoint.name}: {norms.left_out} tensors are in no layer or no factors of"
            " LoRA, and are not in the maps of the adapter"
        )
    maps: list[str] = []
    if norms.experts.size:
        names = [str(layer) for layer in norms.expert_layers]
        maps.append(
            heat_map(
                "Experts", norms.experts, even_edges(norms.experts), names,
                unit="Norm of scale B A; rows are layers, columns experts:",
            )
        )  # fmt: skip
    if norms.dense.size:
        names = [str(layer) for layer in norms.layers]
        maps.append(
            heat_map(
                "Other linears", norms.dense, even_edges(norms.dense), names, norms.projections,
                unit="Norm of scale B A; rows are layers:",
            )
        )  # fmt: skip
    if not maps:
        return ""
    what = f'<p class="muted">Checkpoint {escape(run.checkpoint.name)}</p>'
    return f'{what}<div class="grid">{"".join(maps)}</div>'
