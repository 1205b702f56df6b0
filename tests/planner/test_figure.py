"""Check the picture of a plan: every part is in one of at most seven groups, hues can be told apart
by the colour-blind, and what was planned is named."""

from pathlib import Path

import matplotlib
import pytest

from megalora.config import LoRAConfig, ParallelConfig
from megalora.planner.figure import MEMORY, RECOMPUTATION, TIME, draw, grouped, title_of
from megalora.planner.layout_table import short_name, speed_text
from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import GIB, gib_by_name
from megalora.planner.models import load_shape
from megalora.planner.search import Plan, evaluate
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload
from tests.planner.test_scenarios import H100, MODELS

OKABE_ITO = {
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
}  # fmt: skip
"""The eight of Okabe and Ito (2008)."""
WORK = Workload(sequence_length=16384, global_batch_size=64, imbalance=1.2)
LAYOUTS = (
    {"tp": 2, "cp": 2, "pp": 2, "vpp": 4, "ep": 2, "etp": 2, "recompute": "full"},
    {"ep": 8, "recompute": "selective"},
    {"tp": 8},
)
"""Between them layouts have every part of memory and time."""


@pytest.fixture(scope="module")
def plan() -> Plan:
    model = PlannedModel.of(load_shape(MODELS / "qwen3_30b_a3b.yaml"), LoRAConfig())
    found = []
    for sizes in LAYOUTS:
        parallel = {name: size for name, size in sizes.items() if name != "recompute"}
        layout = ParallelLayout(
            parallel=ParallelConfig(**parallel), num_ranks=32,
            recompute=sizes.get("recompute", "off"),
        )  # fmt: skip
        found.append(evaluate(model, 16, layout, WORK, H100))
    return Plan(WORK, H100, 16, sorted(found, key=lambda f: f.time.seconds), [])


def test_every_part_is_in_one_of_seven_groups(plan: Plan) -> None:
    seen = set()
    for found in plan.fitting:
        time = grouped(found.time.by_part(), TIME)
        assert sum(time.values()) == pytest.approx(found.time.seconds)
        memory = grouped(gib_by_name(found.memory.at_peak()), MEMORY)
        assert sum(memory.values()) * GIB == pytest.approx(found.memory.peak_bytes)
        # Whatever the peak is made of, all parts have a group.
        grouped(gib_by_name(found.memory.parts), MEMORY)
        seen |= {group for group, seconds in time.items() if seconds}
    assert seen == set(TIME)
    (again,) = (found for found in plan.fitting if found.layout.recompute == "full")
    parts = again.time.by_part()
    expected = sum(seconds for part, seconds in parts.items() if part.startswith("recompute "))
    assert grouped(parts, TIME)[RECOMPUTATION] == pytest.approx(expected)
    with pytest.raises(AssertionError, match="no group has the part 'new'"):
        grouped({"new": 1.0}, TIME)


@pytest.mark.parametrize("groups", [MEMORY, TIME])
def test_hues_can_be_told_apart(groups: dict[str, tuple[str, tuple[str, ...]]]) -> None:
    hues = [hue for hue, _ in groups.values()]
    assert len(hues) == len(set(hues)) <= 7
    assert set(hues) <= OKABE_ITO
    parts = [part for _, parts in groups.values() for part in parts]
    assert len(parts) == len(set(parts))


def test_the_picture_names_what_was_planned(plan: Plan, tmp_path: Path) -> None:
    title = title_of(plan, "a/model", 32)
    path = tmp_path / "deep" / "plan.svg"
    # Text as text, not as outlines of its letters.
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw(plan, 2, path, title)
    text = path.read_text()
    assert "a/model on 32 x H100 SXM 80 GB" in text
    for words in ("64 samples of 16,384 tokens a step", "LoRA rank 16"):
        assert words in text
    first, second, third = plan.layouts()
    for found in (first, second):
        assert short_name(found.layout) in text
        assert speed_text(plan, found, "{:,.0f}".format) in text
    assert short_name(third.layout) not in text
    for hue in (TIME["attention"][0], TIME["host"][0], MEMORY["activations"][0]):
        assert hue.lower() in text.lower()
