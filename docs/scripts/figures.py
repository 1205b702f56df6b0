"""Draw the pictures of README and of docs/rl.md as SVG: the path of an adapter, the quickstart's
loss, and the reward of ``make quickstart-rl``."""

import itertools
import json
from pathlib import Path
from xml.sax.saxutils import escape

RECORD = Path(__file__).parents[2] / "benchmarks/results/quickstart.json"
"""What a run of the quickstart printed and wrote (docs/scripts/quickstart.py)."""
REWARDS = RECORD.with_name("quickstart_rl.json")
"""Rewards of a run of ``make quickstart-rl`` (docs/scripts/quickstart_rl.py)."""

# Colours of GitHub's light theme, where README is read.
INK = "#1f2328"
MUTED = "#59636e"
LINE = "#8c959f"
BLUE = "#0969da"
ORANGE = "#bc4c00"
FONT = "font-family='Helvetica, Arial, sans-serif'"

# ---- the path of an adapter ----------------------------------------------------------------------

BOX_HEIGHT = 104
TOP = 22
"""Pixels from the upper edge to the first row of boxes."""
STEPS = (
    (12, 172, "Base and data", ("Hugging Face folder", "chats.jsonl, Parquet, hub"), "#ddf4ff"),
    (222, 172, "megalora plan", ("memory and time of", "every legal layout"), "#ddf4ff"),
    (432, 192, "megalora train", ("Megatron-Core:", "TP, PP, VPP, EP, ETP, DP"), "#fff8c5"),
    (662, 172, "step_N/", ("a PEFT adapter folder", "and training_state/"), "#dafbe1"),
)
"""Boxes from left to right: x and width in pixels, title, lines below it, colour."""
ENDS = (
    ("stock PEFT", "megalora verify"),
    ("vLLM", "megalora serve"),
    ("merged base", "megalora merge"),
)
"""Where a checkpoint can go, and the command that does it."""
CHECKS = (
    (
        222,
        "checked on the way",
        (
            "before step 1: one layer of each kind, embedding and head equal transformers'",
            "after step 1: every adapter had a gradient · every 100 steps: replicas are bit-equal",
            "when served: the engine repeats the training side's log-probabilities, or serve fails",
        ),
    ),
)
"""Notes below the boxes: x in pixels, heading, lines."""


def path_svg() -> str:
    """The path from a base model to a served adapter."""
    middle = TOP + BOX_HEIGHT / 2
    parts = []
    for number, (x, width, title, lines, colour) in enumerate(STEPS):
        parts.append(_box(x, TOP, width, BOX_HEIGHT, colour))
        parts.append(_text(x + width / 2, TOP + 36, title, size=16, weight="bold"))
        for row, line in enumerate(lines):
            parts.append(_text(x + width / 2, TOP + 62 + 19 * row, line, colour=MUTED))
        # An arrow leaves 4 pixels behind a box and 6 before the next, so that its tip stays clear.
        if number + 1 < len(STEPS):
            parts.append(_arrow(x + width + 4, middle, STEPS[number + 1][0] - 6, middle))
    # From the right edge of the last box, arrows fan out to the three places a checkpoint can go.
    right = STEPS[-1][0] + STEPS[-1][1]
    for number, (title, command) in enumerate(ENDS):
        # Boxes of 52 pixels with 14 between them; the arrow points at the middle of a box.
        y = TOP - 12 + 66 * number
        parts.append(_arrow(right + 4, middle, 880, y + 26))
        parts.append(_box(886, y, 142, 52, "#f6f8fa"))
        parts.append(_text(957, y + 22, title, size=14, weight="bold"))
        parts.append(_text(957, y + 41, command, size=12, colour=MUTED))
    for x, heading, lines in CHECKS:
        parts.append(_text(x, 160, heading, size=13, weight="bold", anchor="start"))
        for row, line in enumerate(lines):
            y = 181 + 19 * row
            parts.append(_text(x, y, line, size=13, colour=MUTED, anchor="start"))
    title = "From a base model and data over plan and train to an adapter for PEFT and vLLM"
    return _svg(1040, 236, title, parts)


# ---- curves over steps --------------------------------------------------------------------------

LEFT, RIGHT, UPPER, LOWER = 60, 600, 20, 200
"""Edges of the plot in pixels."""
HIGHEST_LOSS = 7
"""Loss at the upper edge; the lower one is 0."""
FEW = 5
"""Rewards of which a mean is drawn: the prompts of a single step are 16 of 100."""


def loss_svg() -> str:
    """Training loss of the quickstart by step, evaluation loss as dots."""
    record = json.loads(RECORD.read_text())
    last = record["train"][-1][0]

    def point(step: float, loss: float) -> tuple[float, float]:
        return _point(step / last, loss / HIGHEST_LOSS)

    parts = _axes(HIGHEST_LOSS, 1, last)
    parts.append(_curve(list(itertools.starmap(point, record["train"])), BLUE))
    for step, loss in record["eval"]:
        x, y = point(step, loss)
        parts.append(f"<circle cx='{x}' cy='{y}' r='4.5' fill='{ORANGE}'/>")
        parts.append(_text(x + 8, y - 8, f"{loss:.2f}", size=12, colour=ORANGE, anchor="start"))
    parts.append(_text(RIGHT, UPPER + 22, "training loss", colour=BLUE, anchor="end"))
    parts.append(_text(RIGHT, UPPER + 42, "evaluation loss", colour=ORANGE, anchor="end"))
    parts.append(_text((LEFT + RIGHT) / 2, LOWER + 38, "step", size=12, colour=MUTED))
    return _svg(640, 246, "Loss of the quickstart by step", parts)


def reward_svg() -> str:
    """Mean reward of each step of ``make quickstart-rl``, and means of its first and last steps."""
    rewards = json.loads(REWARDS.read_text())["rewards"]
    last = len(rewards)
    parts = _axes(5, 0.2, last)
    points = []
    for step, reward in enumerate(rewards, 1):
        points.append(_point(step / last, reward))
    parts.append(_curve(points, BLUE))
    for first in (0, last - FEW):
        mean = sum(rewards[first : first + FEW]) / FEW
        ends = [_point((first + 1) / last, mean), _point((first + FEW) / last, mean)]
        parts.append(_curve(ends, ORANGE))
        # Below the line, where the curve is not.
        middle = (ends[0][0] + ends[1][0]) / 2
        parts.append(_text(middle, ends[0][1] + 40, f"{mean:.2f}", size=12, colour=ORANGE))
    parts.append(_text(RIGHT, LOWER - 22, "mean reward of a step", colour=BLUE, anchor="end"))
    label = f"mean of the first and last {FEW} steps"
    parts.append(_text(RIGHT, LOWER - 5, label, colour=ORANGE, anchor="end"))
    parts.append(_text((LEFT + RIGHT) / 2, LOWER + 38, "step", size=12, colour=MUTED))
    return _svg(640, 246, "Mean reward of make quickstart-rl by step", parts)


def _point(along: float, up: float) -> tuple[float, float]:
    """Pixels of a place in the plot; both are shares of its width and height."""
    x = LEFT + (RIGHT - LEFT) * along
    # In SVG, y grows downwards: 0 lies at LOWER.
    y = LOWER - (LOWER - UPPER) * up
    # A tenth of a pixel: more digits only make the file longer.
    return round(x, 1), round(y, 1)


def _axes(num_lines: int, between: float, last: int) -> list[str]:
    """Lines with their values from 0 to ``num_lines * between``, and a number each 10 steps."""
    parts = []
    for number in range(num_lines + 1):
        _, y = _point(0, number / num_lines)
        # 7, and 0.8: as many digits as a step between two lines has.
        label = f"{number * between:.3g}"
        parts.append(f"<path d='M{LEFT} {y}H{RIGHT}' stroke='#d1d9e0' stroke-width='1'/>")
        parts.append(_text(LEFT - 10, y + 4, label, size=12, colour=MUTED, anchor="end"))
    for step in range(0, last + 1, 10):
        x, _ = _point(step / last, 0)
        parts.append(_text(x, LOWER + 18, str(step), size=12, colour=MUTED))
    return parts


def _curve(points: list[tuple[float, float]], colour: str) -> str:
    corners = " ".join(itertools.starmap("{},{}".format, points))
    return f"<polyline points='{corners}' fill='none' stroke='{colour}' stroke-width='2'/>"


# ---- pieces of SVG -------------------------------------------------------------------------------


def _svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """A whole picture on white, so that it can be read on a dark page too."""
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}'"
        f" width='{width}' height='{height}' role='img'>"
    )
    # The arrow head is defined once, as a triangle of 8 x 8, and named by every arrow.
    tip = "<path d='M0 0L8 4L0 8z' fill='" + LINE + "'/>"
    marker = (
        "<defs><marker id='tip' markerWidth='8' markerHeight='8' refX='7' refY='4'"
        f" orient='auto' markerUnits='userSpaceOnUse'>{tip}</marker></defs>"
    )
    ground = f"<rect width='{width}' height='{height}' rx='8' fill='#ffffff'/>"
    # Screen readers read the title aloud in the place of the picture.
    lines = [head, f"<title>{escape(title)}</title>", marker, ground, *parts, "</svg>", ""]
    return "\n".join(lines)


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    size = f"x='{x}' y='{y}' width='{width}' height='{height}'"
    return f"<rect {size} rx='8' fill='{colour}' stroke='{LINE}'/>"


def _arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    way = f"M{x} {y}L{to_x} {to_y}"
    return f"<path d='{way}' stroke='{LINE}' stroke-width='2' marker-end='url(#tip)'/>"


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 13,
    weight: str = "normal",
    colour: str = INK,
    anchor: str = "middle",
) -> str:
    place = f"x='{x}' y='{y}' font-size='{size}' font-weight='{weight}'"
    return f"<text {place} fill='{colour}' text-anchor='{anchor}' {FONT}>{escape(text)}</text>"
