"""Calibration for a config: it measures what the config's plan asks for, the best layouts first."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megalora.bench import calibrate as calibration
from megalora.bench import clock, overhead
from megalora.bench.calibrate_config import ForConfig
from megalora.config import DataConfig, LoRAConfig, ModelConfig, RunConfig, TrainConfig
from megalora.planner.question import PlanOptions, Question
from megalora.planner.search import search
from tests.distributed.ranks import run_ranks

HARDLY_ANY_S = 1e-6
RANKS = 2


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A small MoE in float32, rows of 40 tokens: sizes that are nowhere in the grid."""
    path = tmp_path / "model.yaml"
    sizes = {"num_hidden_layers": 2, "hidden_size": 40, "vocab_size": 88, "head_dim": 20}
    path.write_text(OmegaConf.to_yaml(OmegaConf.create({**overhead.TINY, **sizes})))
    return RunConfig(
        model=ModelConfig(path=str(path), dtype="float32"),
        data=DataConfig(train="random", max_length=40),
        lora=LoRAConfig(rank=3),
        train=TrainConfig(steps=1, global_batch_size=4),
    )


def _calibrate(out: Path, config: RunConfig | None, budget_seconds: float) -> list[str]:
    clock.ON_CPU = clock.Effort(1e-9, 1e-9, most_in_a_row=1, min_samples=1, max_samples=1)
    overhead.layer_overhead = lambda dtype: {
        "layer_forward_s": 1e-9, "layer_backward_s": 1e-9, "step_s": 1e-9
    }  # fmt: skip
    said: list[str] = []
    asked = None if config is None else ForConfig(config)
    calibration.calibrate(
        out, dtype="float32", budget_seconds=budget_seconds, config=asked, say=said.append
    )
    return said


def bases(config: RunConfig, file: Path) -> list[str]:
    """How the times of the plan's rows are known by a calibration."""
    question = Question.of(config, PlanOptions(gpus=[RANKS], gpu=str(file)))
    plan = search(question.shape, config.lora, RANKS, question.work, question.machine)
    return [part.basis for found in plan.fitting for part in found.time.parts]


@pytest.mark.slow
def test_no_time_of_the_plan_is_extrapolated(config: RunConfig, tmp_path: Path) -> None:
    grid = tmp_path / "grid.json"
    own = tmp_path / "own.json"
    run_ranks(_calibrate, RANKS, grid, None, HARDLY_ANY_S)
    said, other = run_ranks(_calibrate, RANKS, own, config, 600.0)
    assert "extrapolated" in bases(config, grid)
    assert set(bases(config, own)) <= {"measured", "interpolated"}
    assert not other and not any(line.startswith("left out") for line in said)
    # The model's own product of q, k and v, of all tokens of a sample.
    rows = json.loads(own.read_text())["gemm"]
    assert any((row["rows"], row["outputs"], row["inputs"]) == (40, 80, 40) for row in rows)


def test_what_time_leaves_out_is_said(config: RunConfig, tmp_path: Path) -> None:
    said, _ = run_ranks(_calibrate, RANKS, tmp_path / "x.json", config, HARDLY_ANY_S)
    (line,) = [line for line in said if line.startswith("left out")]
    assert "left out for lack of time: " in line and "first needed by its layout 1;" in line
    # What is there can be read, and plans something.
    assert bases(replace(config), tmp_path / "x.json")
