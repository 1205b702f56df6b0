"""A run that learns from pairs: the margin of held-out pairs grows, and a step counts tokens of
experts once."""

from dataclasses import replace
from pathlib import Path

import pytest

from megalora.config import LoRAConfig, ObjectiveConfig, RunConfig
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.jsonl import read_jsonl
from tests.paired import pairs_of
from tests.parity.built import built, random_adapter
from tests.parity.runs import make_config, records
from tests.recipes.run import run_recipe

DPO = ObjectiveConfig(name="dpo", beta=0.3)


def dpo_config(tiny: Path, chats: Path, out: Path, **options) -> RunConfig:
    options = {"parallel": {}, "objective": DPO, "eval": 9, **options}
    return make_config(tiny, pairs_of(chats), out, **options)


def counted(config: RunConfig) -> tuple[int, int]:
    """(tokens that went to experts in a step, those of its rows times their choices); a rank
    function."""
    with built(config) as run:
        run.step(0, 1e-3, count_experts=True)
        assert run.expert_tokens is not None
        layers = len(run.model.shape.moe_layers)
        tokens = sum(len(row.tokens) - row.filler for row in run.batches.of_step(0))
        return int(run.expert_tokens.sum()), tokens * run.model.shape.top_k * layers


def test_tokens_of_experts_are_those_of_the_step(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """The reference's pass sends the same tokens once more."""
    ((found, expected),) = run_ranks(counted, 1, dpo_config(tiny, chats, tmp_path))
    assert found == expected > 0


def losses_of_a_step(config: RunConfig, weights: Path) -> list[float]:
    """The loss of one step, twice, without moving; a rank function."""
    with built(config, weights) as run:
        return [run.step(0, 0.0)[0] for _ in range(2)]


def test_dropout_acts_in_the_step_behind_its_reference(
    tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """The reference is found without; the model is in training again when the step begins."""
    lora = LoRAConfig(rank=4, alpha=12.0, dropout=0.5)
    random_adapter(tmp_path / "start.safetensors", lora, tiny)
    for dropout in (0.5, 0.0):
        config = dpo_config(tiny, chats, tmp_path, lora=replace(lora, dropout=dropout))
        ((first, second),) = run_ranks(losses_of_a_step, 1, config, tmp_path / "start.safetensors")
        assert (first != second) == (dropout > 0)


@pytest.mark.parametrize(
    "objective",
    [
        DPO,
        pytest.param(ObjectiveConfig(name="dpo", loss="ipo"), marks=pytest.mark.slow),
        pytest.param(ObjectiveConfig(name="simpo"), marks=pytest.mark.slow),
        pytest.param(ObjectiveConfig(name="orpo"), marks=pytest.mark.slow),
    ],
    ids=lambda objective: f"{objective.name} {objective.loss}",
)
def test_the_margin_of_held_out_pairs_grows(
    objective: ObjectiveConfig, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    config = dpo_config(
        tiny, chats, tmp_path / "run", objective=objective, parallel={"ep": 2}, steps=6, lr=2e-3
    )
    run_ranks(train, 2, config)
    margins = records(tmp_path / "run", "eval_margin")
    assert len(margins) == 2 and margins[1] > margins[0] + 0.02
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert steps[-1]["loss"] < steps[0]["loss"]
    if objective == DPO:
        # A fresh adapter is the base: nothing is preferred yet.
        assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert margins[0] == pytest.approx(0, abs=1e-5)
    for name in ("accuracy", "chosen_reward", "rejected_reward", "chosen_cross_entropy"):
        assert name in steps[0] and f"eval_{name}" in rows[0]


@pytest.mark.slow
def test_a_resumed_run_has_its_objective(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """Stopped after two of four steps: the losses of the run that went through."""
    through = dpo_config(tiny, chats, tmp_path / "through", steps=4)
    run_ranks(train, 1, through)
    half = dpo_config(tiny, chats, tmp_path / "half", steps=2)
    run_ranks(train, 1, half)
    on = replace(
        dpo_config(tiny, chats, tmp_path / "half", steps=4),
        checkpoint=replace(half.checkpoint, resume=True),
    )
    run_ranks(train, 1, on)
    assert records(tmp_path / "half", "loss") == pytest.approx(
        records(tmp_path / "through", "loss"), rel=1e-6
    )
    other = replace(on, objective=ObjectiveConfig(name="simpo"), train=replace(on.train, steps=5))
    with pytest.raises(Exception, match="objective.name=dpo, this run has simpo"):
        run_ranks(train, 1, other)


@pytest.mark.slow
def test_the_example(tmp_path: Path) -> None:
    """``recipes/dpo/run.sh`` with few steps, in a copy: it writes below its own folder."""
    shorter = {"steps: 30": "steps: 6", "eval_every: 10": "eval_every: 3"}
    printed = run_recipe("dpo", tmp_path, shorter)
    assert "verified: stock PEFT computes the same model" in printed
    margins = records(tmp_path / "runs" / "dpo" / "run", "eval_margin")
    assert margins == sorted(margins) and margins[-1] > 1
    assert (tmp_path / "runs" / "dpo" / "run" / "report.html").stat().st_size > 10_000
