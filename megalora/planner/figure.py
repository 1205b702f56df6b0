"""A plan as a picture: memory and time of the fastest layouts, part by part."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalora.planner.search import FULL, GIB, Plan, Planned

COLOURS = [f"C{i}" for i in range(10)] + ["gold", "navy", "lime", "tan", "black"]


def draw(plan: Plan, top: int, path: Path, title: str) -> None:
    """Two rows of stacked bars, one bar for each of the ``top`` fastest layouts, as PNG or what the
    suffix says."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = plan.layouts()[:top]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(15, 1.6 + 0.5 * len(shown)), layout="constrained", sharey=True
    )
    names = [_name(found) for found in shown]
    memory = [
        {part.name: part.num_bytes / GIB for part in found.memory.at_peak()} for found in shown
    ]
    _bars(left, names, memory)
    limit = plan.machine.memory_bytes / GIB
    left.axvline(limit, color="black", linewidth=1.2)
    left.axvline(FULL * limit, color="black", linewidth=0.8, linestyle="--")
    left.set(
        xlabel=f"GiB on the fullest rank (lines: {100 * FULL:.0f} % and all of {limit:.0f} GiB)",
        title="memory",
    )
    _bars(right, names, [{part.name: part.seconds for part in found.time.parts} for found in shown])
    for i, found in enumerate(shown):
        right.text(
            found.time.seconds,
            i,
            f" {found.tokens_per_second(plan.work):,.0f} tokens/s/GPU",
            va="center",
            fontsize=8,
        )
    right.set(
        xlabel="seconds of a step (predicted)",
        title="time",
        xlim=(0, 1.3 * max(f.time.seconds for f in shown)),
    )
    left.invert_yaxis()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _name(found: Planned) -> str:
    p = found.layout.parallel
    layout = found.layout
    sizes = {
        "tp": p.tp,
        "pp": p.pp,
        "vpp": p.vpp,
        "dp": layout.dp,
        "ep": p.ep,
        "etp": p.etp,
        "micro": layout.micro_batch_size,
    }
    shown = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "1 rank"
    return shown + ("" if layout.recompute == "off" else f"\nrecompute {layout.recompute}")


def _bars(axes: Any, names: Sequence[str], values: Sequence[dict[str, float]]) -> None:
    """Parts that are nowhere a hundredth of their bar are added up as the rest."""
    parts = list(dict.fromkeys(name for row in values for name in row))
    small = [n for n in parts if all(row.get(n, 0.0) < 0.01 * sum(row.values()) for row in values)]
    rows = [{**{n: row.get(n, 0.0) for n in parts if n not in small},
             "the rest": sum(row.get(n, 0.0) for n in small)} for row in values]  # fmt: skip
    starts = [0.0] * len(rows)
    for i, part in enumerate(rows[0]):
        widths = [row[part] for row in rows]
        axes.barh(range(len(rows)), widths, left=starts, label=part,
                  color=COLOURS[i % len(COLOURS)] if part != "the rest" else "lightgray",
        height=0.7)  # fmt: skip
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.06), ncols=5, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
