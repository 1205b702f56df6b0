"""Lay plans out as tables: the fastest layouts and the user's own, and a line for each number of
GPUs."""

from collections.abc import Sequence
from dataclasses import dataclass

from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import GIB
from megalora.planner.own_layout import OwnLayout
from megalora.planner.search import FULL, Plan, Planned

MARK = {"measured": "", "interpolated": "~", "extrapolated": "^", "assumed": "?"}
"""How a time is known -> what stands behind it in the table."""
LEGEND = (
    "time: no mark measured, ~ interpolated, ^ extrapolated beyond the sizes calibrated, ? assumed."
    " GiB: formulas measured against tensors of CPU ranks; context and room assumed."
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
    rows = {"micro": own.train.micro_batch_size}
    # Where lengths are known all other layouts pack, and their column holds tokens.
    if plan.work.packing is not None:
        rows = {"row": own.train.micro_batch_tokens or f"micro {own.train.micro_batch_size}"}
    row.pop("micro", None)
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
    mark = MARK[found.time.basis]
    share = plan.share(found)
    warned = " !" if share > FULL else ""
    values = (
        f"{found.time.seconds:.3g}{mark}",
        f"{found.tokens_per_second(plan.work):,.0f}{mark}",
        f"{found.memory.peak_bytes / GIB:.1f}",
        f"{100 * share:.0f} %{warned}",
    )
    return dict(zip(FIGURES, values, strict=True))


def rows_of(layout: ParallelLayout) -> dict[str, int]:
    """What a row has room for, as a column of the table."""
    if layout.micro_batch_tokens is not None:
        return {"row": layout.micro_batch_tokens}
    return {"micro": layout.micro_batch_size}


def table(rows: Sequence[dict[str, object]]) -> str:
    """Rows of the same columns below their names; a column that a row lacks stays open."""
    # In the order of a row that has all of them.
    names = list(max(rows, key=len))
    cells = [tuple(names)]
    for row in rows:
        cells.append(tuple(str(row.get(name, UNKNOWN)) for name in names))
    return columns(cells)


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
            of_layout = figures(count.plan, best)
            mark = MARK[best.time.basis]
            speed = best.tokens_per_second(count.plan.work)
            hours = num_steps * best.time.seconds / 3600 * count.num_gpus
            row |= sizes(best.layout)
            row |= {
                "step s": of_layout["step s"],
                "tokens/s": f"{speed * count.num_gpus:,.0f}{mark}",
                "tokens/s/GPU": of_layout["tokens/s/GPU"],
                "GPU-hours": f"{hours:,.3g}{mark}",
                "GiB": of_layout["GiB"],
                "of GPU": of_layout["of GPU"],
            }
        row[YOURS] = _of_own(count)
        rows.append(row)
    return table(rows)


def _of_own(count: OfCount) -> str:
    """The user's layout in one cell: its tokens per second and GPU, or that it is out."""
    own = count.own
    if own.planned is None:
        return "not legal"
    if own.reason is not None:
        return "too big"
    return str(figures(count.plan, own.planned)["tokens/s/GPU"])


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
