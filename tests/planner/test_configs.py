"""Check that the ready-made configs can run, and that their comments predict what the planner says
today."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megalora.config.file import load_config
from megalora.model.fields import model_shape
from megalora.planner.crossings import crossings_of
from megalora.planner.gpus import find_machine
from megalora.planner.layouts import ParallelLayout, check
from megalora.planner.models import find_architecture, held_by_config
from megalora.planner.question import PlanOptions
from megalora.planner.report import config_text
from megalora.planner.search import FULL, Plan, evaluate
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload

# Files are named MODEL_RANKSxGPU_LENGTHk.yaml.
FOLDER = Path(__file__).parents[2] / "configs" / "sft"
READY = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "template.yaml")


def test_all_that_were_promised() -> None:
    names = {path.stem for path in READY}
    for model, counts in (("qwen3_30b_a3b", (8, 16)), ("qwen3_235b_a22b", (16, 64, 256))):
        for count in counts:
            assert f"{model}_{count}xh100_4k" in names
            assert f"{model}_{count}xh100_32k" in names
    assert names >= {"qwen3_30b_a3b_1xh100_4k", "qwen3_30b_a3b_1xh200_32k"}
    assert "qwen3_30b_a3b_8xh100_128k" in names
    # Of frozen weights that stay codes.
    assert names >= {
        "qwen3_30b_a3b_fp8_1xh100_32k", "qwen3_30b_a3b_nf4_1xrtx4090_1k",
        "qwen3_235b_a22b_fp8_8xh100_4k", "qwen3_235b_a22b_nf4_8xh100_4k",
        "qwen3_235b_a22b_fp8_4xh200_4k", "qwen3_235b_a22b_nf4_4xh200_4k",
    }  # fmt: skip


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_a_config_is_what_the_planner_writes(path: Path) -> None:
    found = re.search(r"_(\d+)x([a-z]+\d+)_(\d+)k$", path.stem)
    assert found is not None
    ranks = int(found[1])
    config = load_config(path)
    config.check_world(ranks)
    assert config.data.max_length == 1024 * int(found[3])
    machine = find_machine(found[2])
    # With the measured table of that GPU, as the command has it.
    crossings = crossings_of(machine.name)
    work = replace(Workload.of(config, PlanOptions.imbalance), crossings=crossings)
    hf = find_architecture(config.model.path)
    shape = model_shape(hf)
    work = replace(work, held=held_by_config(config.model, hf))
    layout = ParallelLayout.of(config, ranks)
    check(shape, layout, work)
    planned = evaluate(PlannedModel.of(shape, config.lora), config.lora.rank, layout, work, machine)
    plan = Plan(work, machine, config.lora.rank, [planned], [])
    # The comments hold the predicted memory and seconds: a change of the planner shows here.
    assert path.read_text() == config_text(config, plan, planned), "make configs writes them anew"
    # A layout that fills the memory is a last resort, and none to recommend.
    assert plan.share(planned) <= FULL
