"""Draw a plan: memory and time of the first layouts of its table, in at most seven groups of parts.

Hues are Okabe and Ito's, which people with any kind of colour blindness can tell apart.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megalora.planner.cost import REFERENCE
from megalora.planner.decode_cost import DECODING
from megalora.planner.layout_table import short_name, speed_text
from megalora.planner.memory import AVERAGE, CONTEXT, DECODED, GIB, ROOM, START, gib_by_name
from megalora.planner.search import FULL, Plan, Planned

BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
SKY = "#56B4E9"
VERMILION = "#D55E00"
PURPLE = "#CC79A7"
YELLOW = "#F0E442"

Groups = dict[str, tuple[str, tuple[str, ...]]]
"""Name of a group -> its hue, and the parts that it adds up."""
MEMORY: Groups = {
    "frozen weights": (BLUE, ("weights", ROOM, DECODED)),
    "adapters, gradients, optimizer": (
        ORANGE,
        ("adapters", START, AVERAGE, "buffer padding", "gradients", "optimizer", "optimizer step"),
    ),
    "activations": (GREEN, ("activations", "rows", "pipeline")),
    "loss": (SKY, ("loss", "logits")),
    "one layer's backward": (VERMILION, ("workspace", "recomputed", "all-to-all")),
    "context": (PURPLE, (CONTEXT,)),
}
RECOMPUTATION = "recomputation, reference"
TIME: Groups = {
    "attention": (BLUE, ("attention",)),
    "experts, MLP": (ORANGE, ("experts", "mlp", DECODING)),
    "head, norms, optimizer": (GREEN, ("head", "other", "optimizer")),
    RECOMPUTATION: (SKY, (REFERENCE,)),
    "dispatch, communication": (
        VERMILION,
        ("dispatch", "pipeline transfers", "reduction", "context parallel attention"),
    ),
    "bubble": (PURPLE, ("bubble",)),
    "host": (YELLOW, ("host", "host behind waits")),
}


def grouped(parts: dict[str, float], groups: Groups) -> dict[str, float]:
    """Name of each group -> the sum of its parts, in the order of ``groups``."""
    found = dict.fromkeys(groups, 0.0)
    for part, value in parts.items():
        found[_group_of(part, groups)] += value
    return found


def _group_of(part: str, groups: Groups) -> str:
    # A part of the layer's forward that is run again, whatever it is.
    if part.startswith("recompute "):
        return RECOMPUTATION
    if part.startswith("tensor parallel "):
        return "dispatch, communication"
    for name, (_, parts) in groups.items():
        if part in parts:
            return name
    raise AssertionError(f"no group has the part {part!r}")


def title_of(plan: Plan, model: str, num_gpus: int) -> str:
    """What was planned: model, GPUs, batch, length and rank."""
    return (
        f"{model} on {num_gpus} x {plan.machine.name}: {plan.work.in_words}, LoRA rank"
        f" {plan.lora_rank}"
    )


def draw(plan: Plan, top: int, path: Path, title: str) -> None:
    """Draw two rows of stacked bars, one bar for each of the ``top`` first layouts, in the format
    that the suffix names."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed, and none is there on a login node
    import matplotlib.pyplot as plt

    shown = plan.layouts()[:top]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(15, 2.2 + 0.42 * len(shown)), layout="constrained", sharey=True
    )
    _draw_memory(left, plan, shown)
    _draw_time(right, plan, shown)
    names = [short_name(found.layout) for found in shown]
    left.set_yticks(range(len(names)), names, fontsize=9)
    left.invert_yaxis()  # the first layout on top; the axis is shared
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_memory(axes: Any, plan: Plan, shown: Sequence[Planned]) -> None:
    """GiB of the fullest rank at its peak, with lines at the device's memory and at ``FULL``."""
    # What is there at the peak: parts that are gone by then are no part of the bar.
    _bars(axes, MEMORY, [gib_by_name(found.memory.at_peak()) for found in shown])
    limit = plan.machine.memory_bytes / GIB
    axes.axvline(limit, color="black", linewidth=1.2)
    axes.axvline(FULL * limit, color="black", linewidth=0.8, linestyle="--")
    axes.set(
        xlabel=f"GiB on the fullest rank (lines: {100 * FULL:.0f} % and all of {limit:.0f} GiB)"
    )


def _draw_time(axes: Any, plan: Plan, shown: Sequence[Planned]) -> None:
    """Seconds of a step at the middle of assumed rates, with a whisker from the least to the most
    and the tokens per second beside it."""
    _bars(axes, TIME, [found.time.by_part() for found in shown])
    longest = 0.0
    for i, found in enumerate(shown):
        end = found.time.seconds
        if found.time.basis == "assumed":
            low, high = found.limits
            errors = [[end - low], [high - end]]
            axes.errorbar(end, i, xerr=errors, color="black", linewidth=1.2, capsize=4)
            end = high
        speed = f"  {speed_text(plan, found, '{:,.0f}'.format)} tokens/s/GPU"
        axes.text(end, i, speed, va="center", fontsize=8)
        longest = max(longest, end)
    axes.set(
        xlabel="predicted seconds of a step (whiskers: limits of assumed rates)",
        xlim=(0, 1.4 * longest),  # room for the text beside the bars
    )


def _bars(axes: Any, groups: Groups, bars: Iterable[dict[str, float]]) -> None:
    """Stacked horizontal bars, one for each dictionary of parts."""
    sums = [grouped(parts, groups) for parts in bars]
    starts = [0.0] * len(sums)
    for group, (hue, _) in groups.items():
        widths = [bar[group] for bar in sums]
        # A group that no bar has needs no place in the legend.
        if not any(widths):
            continue
        axes.barh(
            range(len(sums)), widths, left=starts, label=group, color=hue, height=0.7,
            edgecolor="white", linewidth=0.6,
        )  # fmt: skip
        # The next group begins where this one ends.
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
