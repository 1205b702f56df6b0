"""Draw a plan: memory and time of the fastest layouts, part by part."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalora.planner.layout_table import rows_of
from megalora.planner.memory import GIB, gib_by_name
from megalora.planner.search import FULL, Plan, Planned

# C0 to C9 are matplotlib's own cycle; the longest breakdown has more than ten parts.
COLOURS = [
    "C0", "C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9",
    "gold", "navy", "lime", "tan", "black",
]  # fmt: skip
REST = "the rest"
SMALL = 0.01
"""A part smaller than this share of every bar has no colour of its own: it goes to ``REST``."""


def draw(plan: Plan, top: int, path: Path, title: str) -> None:
    """Draw two rows of stacked bars, one bar for each of the ``top`` fastest layouts, in the format
    that the suffix names."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed, and none is there on a login node
    import matplotlib.pyplot as plt

    shown = plan.layouts()[:top]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(15, 1.6 + 0.5 * len(shown)), layout="constrained", sharey=True
    )
    names = [_name(found) for found in shown]
    _draw_memory(left, plan, shown, names)
    _draw_time(right, plan, shown, names)
    left.invert_yaxis()  # the fastest layout on top; the axis is shared
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_memory(axes: Any, plan: Plan, shown: Sequence[Planned], names: Sequence[str]) -> None:
    """GiB of the fullest rank at its peak, with lines at the device's memory and at ``FULL``."""
    # What is there at the peak: parts that are gone by then are no part of the bar.
    _bars(axes, names, [gib_by_name(found.memory.at_peak()) for found in shown])
    limit = plan.machine.memory_bytes / GIB
    axes.axvline(limit, color="black", linewidth=1.2)
    axes.axvline(FULL * limit, color="black", linewidth=0.8, linestyle="--")
    axes.set(
        xlabel=f"GiB on the fullest rank (lines: {100 * FULL:.0f} % and all of {limit:.0f} GiB)",
        title="memory",
    )


def _draw_time(axes: Any, plan: Plan, shown: Sequence[Planned], names: Sequence[str]) -> None:
    """Seconds of a step, with the tokens per second beside each bar."""
    _bars(axes, names, [found.time.by_part() for found in shown])
    for i, found in enumerate(shown):
        speed = f" {found.tokens_per_second(plan.work):,.0f} tokens/s/GPU"
        axes.text(found.time.seconds, i, speed, va="center", fontsize=8)
    longest = shown[-1].time.seconds  # the fastest come first
    axes.set(
        xlabel="seconds of a step (predicted)",
        title="time",
        xlim=(0, 1.3 * longest),  # room for the text beside the bars
    )


def _name(found: Planned) -> str:
    """A layout's sizes other than 1, and on a second line what is recomputed."""
    p = found.layout.parallel
    layout = found.layout
    sizes = {
        "tp": p.tp,
        "cp": p.cp,
        "pp": p.pp,
        "vpp": p.vpp,
        "dp": layout.dp,
        "ep": p.ep,
        "etp": p.etp,
        **rows_of(layout),
    }
    shown = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "1 rank"
    if layout.recompute != "off":
        shown += f"\nrecompute {layout.recompute}"
    return shown


def _bars(axes: Any, names: Sequence[str], bars: Sequence[dict[str, float]]) -> None:
    """Stacked horizontal bars, one for each name, from the values of its parts."""
    is_large: dict[str, bool] = {}
    for bar in bars:
        least = SMALL * sum(bar.values())
        for part, value in bar.items():
            is_large[part] = is_large.get(part, False) or value >= least
    large = [part for part in is_large if is_large[part]]
    starts = [0.0] * len(bars)
    for i, part in enumerate([*large, REST]):
        widths = []
        for bar in bars:
            if part == REST:
                widths.append(sum(value for name, value in bar.items() if not is_large[name]))
            else:
                widths.append(bar.get(part, 0.0))
        colour = "lightgray" if part == REST else COLOURS[i % len(COLOURS)]
        axes.barh(range(len(bars)), widths, left=starts, label=part, color=colour, height=0.7)
        # The next part begins where this one ends.
        for row, width in enumerate(widths):
            starts[row] += width
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.06), ncols=5, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
