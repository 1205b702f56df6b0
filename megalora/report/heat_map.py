"""Draw a table of numbers as a heat map in SVG: rows are layers, columns experts or projections.

Cells of one colour are one path, and neighbours in a row one rectangle: 48 layers of 128 experts
take 60 KB.
"""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from megalora.report.axis import brief
from megalora.report.colours import CIVIDIS

LEFT = 34
RIGHT = 352
TOP = 4
ROW = (5.0, 14.0)
"""Least and largest height of a row."""


def levels_of(values: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """int ``[R, C]``: how many of the ascending edges a value has reached; -1 for NaN."""
    found = np.searchsorted(np.asarray(edges), values, side="right")
    return np.where(np.isnan(values), -1, found)


def even_edges(values: np.ndarray) -> list[float]:
    """Edges that divide [0, largest value] into as many equal parts as there are colours."""
    largest = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
    number = len(CIVIDIS)
    return [largest * i / number for i in range(1, number)] if largest else []


def heat_map(
    title: str,
    values: np.ndarray,
    edges: Sequence[float],
    rows: Sequence[str],
    columns: Sequence[str] = (),
    unit: str = "",
) -> str:
    """A figure of ``values`` ``[R, C]``, NaN for what is not there.

    Args:
        edges: ascending; a value below the first has the darkest colour.
        columns: names to write below; few, or none.
    """
    num_rows, num_columns = values.shape
    row = min(max((RIGHT - LEFT) / num_columns, ROW[0]), ROW[1])
    bottom = TOP + row * num_rows
    # Names of columns stand upright.
    height = bottom + (6 * max((len(name) for name in columns), default=0) + 14)
    scale = f"translate({LEFT} {TOP}) scale({(RIGHT - LEFT) / num_columns:.5f} {row:.5f})"
    parts = [
        f'<figure class="heat"><h3>{escape(title)}</h3>',
        f'<svg viewBox="0 0 360 {height:.0f}" role="img" aria-label="{escape(title)}">',
        f'<g transform="{scale}" shape-rendering="crispEdges">',
    ]
    levels = levels_of(values, edges)
    for level in range(len(edges) + 1):
        path = _path(levels == level)
        if path:
            parts.append(f'<path class="h{level}" d="{path}"/>')
    parts.append("</g>")
    parts.append(
        f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}"'
        f' height="{bottom - TOP:.1f}"/>'
    )
    parts += _names(rows, columns, row, bottom)
    parts.append(f"</svg>{_legend(edges, unit)}</figure>")
    return "\n".join(parts)


def _path(mask: np.ndarray) -> str:
    """Rectangles, one unit high, of what is true in each row."""
    pieces: list[str] = []
    # A border of False, so that every run begins and ends.
    padded = np.pad(mask.astype(np.int8), ((0, 0), (1, 1)))
    for number, changes in enumerate(np.diff(padded, axis=1)):
        starts = np.flatnonzero(changes == 1)
        ends = np.flatnonzero(changes == -1)
        for start, end in zip(starts, ends, strict=True):
            pieces.append(f"M{start} {number}h{end - start}v1h-{end - start}z")
    return "".join(pieces)


def _names(rows: Sequence[str], columns: Sequence[str], row: float, bottom: float) -> list[str]:
    parts: list[str] = []
    # A line of text needs 12 units.
    every = math.ceil(12 / row)
    for number in range(0, len(rows), every):
        at = TOP + (number + 0.5) * row
        parts.append(
            f'<text x="{LEFT - 4}" y="{at:.1f}" dy="4" text-anchor="end">'
            f"{escape(rows[number])}</text>"
        )
    for number, name in enumerate(columns):
        at = LEFT + (number + 0.5) * (RIGHT - LEFT) / len(columns)
        parts.append(
            f'<text transform="translate({at + 4:.1f} {bottom + 4:.1f}) rotate(90)">'
            f"{escape(name)}</text>"
        )
    return parts


def _legend(edges: Sequence[float], unit: str) -> str:
    """A swatch for each colour with the values that it stands for."""
    bounds = [brief(edge) for edge in edges]
    texts: list[str] = []
    for level in range(len(edges) + 1):
        if not edges:
            text = "0"
        elif level == 0:
            text = f"below {bounds[0]}"
        elif level == len(edges):
            text = f"{bounds[-1]} and more"
        else:
            text = f"{bounds[level - 1]} to {bounds[level]}"
        swatch = f'<svg viewBox="0 0 24 12" aria-hidden="true"><rect class="h{level}" '
        texts.append(f'<span>{swatch}width="24" height="12"/></svg> {text}</span>')
    return f'<figcaption class="key">{escape(unit)} {" ".join(texts)}</figcaption>'
