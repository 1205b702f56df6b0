"""Lay plans out as tables: the fastest layouts and the user's own, and a line for each number of
GPUs."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import GIB
from megalora.planner.own_layout import OwnLayout
from megalora.planner.search import FULL, Plan, Planned

MARK = {"measured": "", "interpolated": "~", "extrapolated": "^", "assumed": "?"}
"""How a time is known -> what stands behind it in the table."""
LEGEND = (
    "time: no mark measured, ~ interpolated, ^ extrapolated beyond the sizes calibrated, ? assumed,"
    " a range.\nGiB: formulas measured against tensors of CPU ranks; context and room assumed."
)
YOURS = "yours"
"""Label of the row of the config's own layout."""
UNKNOWN = "-"


def layout_table(plan: Plan, top: int, own: OwnLayout | None = None) -> str:
    """One line for each of the ``top`` fastest layouts, and one for the config's own."""
    rows: list[dict[str, object]] = []
    for i, found in enumerate(plan.layouts()[:top], 1):
        rows.append({"": i, **sizes(found.layout), **figures(plan, found)})
    if own is not None:
        rows.append({"": YOURS, **_row_of_own(plan, own)})
    return table(rows)


def stages_lines(plan: Plan, top: int, own: OwnLayout | None = None) -> str | None:
    """Layers of every part of the model in the rows of ``layout_table`` that divide it unequally;
    None where none does."""
    layouts = [found.layout.parallel for found in plan.layouts()[:top]]
    named = [(f"pp {p.pp} vpp {p.vpp}", p.stage_layers) for p in layouts]
    if own is not None:
        named.append((YOURS, own.parallel.stage_layers))
    # Rows of the same stages and chunks are divided alike.
    divided = {name: short_sizes(sizes) for name, sizes in named if sizes is not None}
    if not divided:
        return None
    words = [f"{name} {sizes}" for name, sizes in divided.items()]
    text = f"layers of stages (or chunks, in the order of tokens) not equal: {', '.join(words)}"
    return textwrap.fill(text, width=100, break_long_words=False)


def short_sizes(sizes: Sequence[int]) -> str:
    """``23/24/24/23``, or ``5/6x14/5`` where more than three parts in a row are alike."""
    words: list[str] = []
    for size, alike in groupby(sizes):
        number = len(list(alike))
        words.extend([str(size)] * number if number <= 3 else [f"{size}x{number}"])
    return "/".join(words)


def _row_of_own(plan: Plan, own: OwnLayout) -> dict[str, object]:
    """The sizes of the user's layout; figures as far as it is legal, no time where it does not
    fit."""
    row = _own_sizes(plan, own)
    found = own.planned
    if found is None:
        return row | dict.fromkeys(FIGURES, UNKNOWN)
    row |= figures(plan, found)
    if own.reason is not None:
        row |= dict.fromkeys(FIGURES[:2], UNKNOWN)
    return row


def _own_sizes(plan: Plan, own: OwnLayout) -> dict[str, object]:
    """The sizes of the user's layout, which may not fill the ranks there are."""
    p = own.parallel
    row: dict[str, object] = {"tp": p.tp, "cp": p.cp, "pp": p.pp, "vpp": p.vpp}
    row |= {"dp": UNKNOWN, "ep": p.ep, "etp": p.etp}
    if own.layout is not None:
        row = sizes(own.layout)
    # Where lengths are known all other layouts pack, and their column holds tokens; else samples.
    # What the file has of the other kind says so.
    micro = own.train.micro_batch_size
    tokens = own.train.micro_batch_tokens
    if plan.work.packing is not None:
        rows = {"row": tokens or f"micro {micro}"}
    else:
        rows = {"micro": f"row {tokens}" if tokens else micro}
    for name in ("micro", "row", "recompute"):
        row.pop(name, None)
    return row | rows | {"recompute": own.train.recompute}


FIGURES = ("step s", "tokens/s/GPU", "GiB", "of GPU")
"""Columns of what is predicted of a layout: time, then memory."""


def sizes(layout: ParallelLayout) -> dict[str, object]:
    """A layout's sizes as columns."""
    p = layout.parallel
    return {
        "tp": p.tp,
        "cp": p.cp,
        "pp": p.pp,
        "vpp": p.vpp,
        "dp": layout.dp,
        "ep": p.ep,
        "etp": p.etp,
        **rows_of(layout),
        "recompute": layout.recompute,
    }


def figures(plan: Plan, found: Planned) -> dict[str, object]:
    """What is predicted of a layout, as the columns of ``FIGURES``."""
    share = plan.share(found)
    warned = " !" if share > FULL else ""
    values = (
        seconds_text(found),
        speed_text(plan, found, "{:,.0f}".format),
        f"{found.memory.peak_bytes / GIB:.1f}",
        f"{100 * share:.0f} %{warned}",
    )
    return dict(zip(FIGURES, values, strict=True))


def in_words(found: Planned, values: Sequence[float], shown: Callable[[float], str]) -> str:
    """A value that follows from the seconds of a step, with the mark of how these are known; the
    least and the most of ``values`` where they are assumed."""
    mark = MARK[found.time.basis]
    low = shown(min(values))
    high = shown(max(values))
    return f"{low}{mark}" if low == high else f"{low}-{high}{mark}"


def limits_of(found: Planned) -> tuple[float, ...]:
    """Seconds to show: the limits where rates are assumed, else those of the step."""
    return found.limits if found.time.basis == "assumed" else (found.time.seconds,)


def seconds_text(found: Planned) -> str:
    """Seconds of a step."""
    return in_words(found, limits_of(found), "{:.3g}".format)


def speed_text(plan: Plan, found: Planned, shown: Callable[[float], str], num_gpus: int = 1) -> str:
    """Tokens per second of ``num_gpus`` GPUs."""
    speeds = []
    for seconds in limits_of(found):
        speeds.append(num_gpus * found.tokens_per_second(plan.work, seconds))
    return in_words(found, speeds, shown)


def rows_of(layout: ParallelLayout) -> dict[str, int]:
    """What a row has room for, as a column of the table."""
    if layout.micro_batch_tokens is not None:
        return {"row": layout.micro_batch_tokens}
    return {"micro": layout.micro_batch_size}


def table(rows: Sequence[dict[str, object]], words: Sequence[int] = (0,)) -> str:
    """Rows of the same columns below their names; a column that a row lacks stays open. Columns of
    ``words`` are flush left."""
    # In the order of a row that has all of them.
    names = list(max(rows, key=len))
    cells = [tuple(names)]
    for row in rows:
        cells.append(tuple(str(row.get(name, UNKNOWN)) for name in names))
    return columns(cells, words)


@dataclass(frozen=True)
class OfCount:
    """What is planned for one number of GPUs."""

    num_gpus: int
    plan: Plan
    own: OwnLayout


def count_table(counts: Sequence[OfCount], num_steps: float) -> str:
    """One line for each number of GPUs: the choice, how fast all of them are together and how many
    GPU-hours ``num_steps`` take."""
    rows: list[dict[str, object]] = []
    for count in counts:
        row: dict[str, object] = {"GPUs": count.num_gpus}
        if count.plan.fitting:
            best = count.plan.best()
            gpu_hours = []
            for seconds in limits_of(best):
                gpu_hours.append(num_steps * seconds / 3600 * count.num_gpus)
            of_layout = figures(count.plan, best)
            row |= {
                "layout": short_name(best.layout),
                "step s": of_layout["step s"],
                "tokens/s": speed_text(count.plan, best, _thousands, count.num_gpus),
                "GPU-hours": in_words(best, gpu_hours, _three_digits),
                "GiB": of_layout["GiB"],
                "of GPU": of_layout["of GPU"],
            }
        row[YOURS] = _of_own(count)
        rows.append(row)
    return table(rows, words=(0, 1))


def _of_own(count: OfCount) -> str:
    """The user's layout in one cell: its speed beside the choice's, or that it is out."""
    own = count.own
    if own.planned is None:
        return "not legal"
    if own.reason is not None:
        return "too big"
    best = count.plan.best()
    return f"{100 * best.time.seconds / own.planned.time.seconds:.0f} %"


def _thousands(value: float) -> str:
    """Three digits or more: ``982``, ``15.3k``, ``1,204k``."""
    if value < 1000:
        return f"{value:.0f}"
    return f"{value / 1000:.1f}k" if value < 100_000 else f"{value / 1000:,.0f}k"


def _three_digits(value: float) -> str:
    """Three digits of a small number, whole ones of a large one."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def short_name(layout: ParallelLayout) -> str:
    """A layout's sizes other than 1: ``tp2 pp2 vpp47 ep8 micro4 full3+off``."""
    p = layout.parallel
    sizes = {"tp": p.tp, "cp": p.cp, "pp": p.pp, "vpp": p.vpp, "dp": layout.dp, "ep": p.ep}
    sizes |= {"etp": p.etp, **rows_of(layout)}
    words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
    if layout.recompute != "off":
        words.append(str(layout.recompute))
    return " ".join(words) or "1 rank"


def columns(rows: Sequence[tuple[str, ...]], words: Sequence[int] = (0,)) -> str:
    """Rows padded to the widest cell of each column: ``words`` flush left, numbers flush right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(cell.ljust(width) if i in words else cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
