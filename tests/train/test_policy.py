"""A run that learns from rollouts: completions with higher rewards become likelier, however the run
is divided or stopped."""

from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch

from megalora.adapters.export import export
from megalora.config import ObjectiveConfig, RunConfig
from megalora.config.policy import PolicyConfig
from megalora.evaluate.request import Request, plan_of
from megalora.planner.question import PlanOptions, Question
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.jsonl import read_jsonl, write_jsonl
from tests.paired import rollouts_of
from tests.parity.built import built, random_adapter
from tests.parity.runs import make_config, records


def grpo(**policy: Any) -> ObjectiveConfig:
    return ObjectiveConfig(name="grpo", policy=PolicyConfig(**policy))


def grpo_config(tiny: Path, source: Path, out: Path, **options: Any) -> RunConfig:
    options = {"parallel": {}, "objective": grpo(), "eval": 9, **options}
    return make_config(tiny, source, out, **options)


def steps(config: RunConfig, weights: Path) -> tuple[float, float, dict[str, float]]:
    """(loss, gradient norm, others) of the second step, which is off the policy of the first; a
    rank function."""
    with built(config, weights) as run:
        run.stepper.kept["start"] = {p: p.detach().clone() for p in run.model.parameters}
        run.step(0, 3e-3)
        return *run.step(1, 0.0), run.others


@pytest.mark.parametrize(
    ("policy", "reference"),
    [
        pytest.param(
            {"proximal": "start", "mismatch": "sequence", "mismatch_action": "mask",
             "advantage_std": "batch", "clip_low": 0.05, "clip_high": 0.1, "dual_clip": 1.2},
            "base", marks=pytest.mark.slow,
        ),
        pytest.param(
            {"loss": "gmpo", "kl_coef": 0.2, "kl": "k2", "drop_gap": 0.0005}, "start",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"loss": "vespo", "proximal": "start", "mismatch": "token", "kl_coef": 0.1,
             "reduction": "constant", "reduction_length": 40}, "base",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["clip", "gmpo", "vespo"],
)  # fmt: skip
def test_a_step_is_the_same_however_it_is_divided(
    policy: dict[str, Any], reference: Any, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    objective = ObjectiveConfig(name="grpo", policy=PolicyConfig(**policy), reference=reference)
    layouts: list[tuple[int, dict[str, Any]]] = [
        (1, {"micro_batch_size": 8}),
        (2, {"micro_batch_tokens": 255, "micro_batch_size": 1, "parallel": {"cp": 2, "ep": 2}}),
        (2, {"micro_batch_size": 1}),
        (4, {"micro_batch_size": 2, "parallel": {"tp": 2, "pp": 2, "ep": 2}}),
    ]
    found = []
    for world, options in layouts:
        config = grpo_config(tiny, rollouts_of(chats), tmp_path, objective=objective, **options)
        random_adapter(tmp_path / "start.safetensors", config.lora, tiny)
        found.append(run_ranks(steps, world, config, tmp_path / "start.safetensors")[0])
    (loss, norm, others), *rest = found
    assert others["engine_gap_max"] > others["engine_gap"] > 0.1 and others["entropy"] > 1
    assert abs(others["ratio"] - 1) > 1e-3
    for other in rest:
        # A mean of advantages that cancel.
        assert other[0] == pytest.approx(loss, rel=1e-5, abs=1e-5)
        assert other[1] == pytest.approx(norm, rel=1e-4)
        assert other[2] == pytest.approx(others, rel=1e-4, abs=1e-6)


def values_of_step(config: RunConfig) -> list[list[tuple[int, float]]]:
    """(first token, advantage) of each sequence of each row of this rank; a rank function."""
    with built(config) as run:
        found = []
        for row in run.batches.of_step(0):
            starts = [int(row.tokens[end]) for end in row.ends[: row.num_sequences]]
            found.append(list(zip(starts, row.values, strict=True)))
        return found


def test_a_deviation_is_of_the_whole_batch(tiny: Path, tmp_path: Path) -> None:
    """Of eight rollouts of twelve, on two ranks in four rows."""
    rows = []
    for i in range(12):
        # The first token tells which rollout it is.
        ids = {"prompt_ids": [100 + i], "completion_ids": [7, 8], "logprobs": [-1, -1]}
        rows.append({**ids, "reward": float(i * i % 7), "group": i % 3})
    write_jsonl(tmp_path / "rollouts.jsonl", rows)
    objective = grpo(advantage_std="batch")
    config = grpo_config(
        tiny, tmp_path / "rollouts.jsonl", tmp_path, objective=objective, eval=1,
        data={"eval": None}, parallel={"ep": 2},
    )  # fmt: skip
    ranks = run_ranks(values_of_step, 2, config)
    found = {}
    for of_rank in ranks:
        assert len(of_rank) == 2
        for of_row in of_rank:
            found |= dict(of_row)
    assert len(found) == 8
    rewards = [row["reward"] for row in rows]
    deviation = stdev(rewards[first - 100] for first in found) + 1e-4
    for first, advantage in found.items():
        baseline = mean(rewards[(first - 100) % 3 :: 3])
        expected = (rewards[first - 100] - baseline) / deviation
        assert advantage == pytest.approx(expected, abs=1e-9)


def write_digits(path: Path, num: int, seed: int) -> Path:
    """Rollouts of eight tokens, which are rewarded where they are below 64; without
    log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(num):
        # Prompts and rewards in turns that do not coincide.
        reward = i // 8 % 2
        first = 0 if reward else 64
        ids = torch.randint(first, first + 64, (8,), generator=generator).tolist()
        rows.append({"prompt_ids": [256 + i % 8, 9], "completion_ids": ids, "reward": reward})
    write_jsonl(path, rows)
    return path


@pytest.mark.slow
def test_rewarded_tokens_become_likelier(tiny: Path, tmp_path: Path) -> None:
    """Off the policy: the surrogate of held-out rollouts falls, which it cannot where a sign is
    wrong."""
    source = write_digits(tmp_path / "rollouts.jsonl", 128, seed=0)
    objective = grpo(proximal="start", entropy=False)
    config = grpo_config(
        tiny, source, tmp_path / "run", objective=objective, steps=8, lr=5e-3, eval=32,
        parallel={"ep": 2}, global_batch_size=16,
    )  # fmt: skip
    run_ranks(train, 2, config)
    before, after = records(tmp_path / "run", "eval_loss")
    assert after < before - 0.02
    # A fresh adapter is its own start: every ratio is 1, so that only advantages are left.
    ratios = records(tmp_path / "run", "ratio")
    assert ratios[0] == pytest.approx(1, abs=1e-6) and abs(ratios[-1] - 1) > 0.01
    row = read_jsonl(tmp_path / "run" / "metrics.jsonl")[1]
    # Nobody knows the engine's log-probabilities here, and no entropy was asked for.
    assert "clipped_share" in row and not {"engine_gap", "entropy", "kl"} & row.keys()
    export(tmp_path / "run" / "step_000008", tmp_path / "out")
    assert "grpo, loss clip" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_a_resumed_run_compares_with_the_same_start(
    tiny: Path, chats: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"objective": grpo(proximal="start"), "lr": 3e-3}
    through = grpo_config(tiny, rollouts_of(chats), tmp_path / "through", steps=4, **options)
    run_ranks(train, 1, through)
    half = grpo_config(tiny, rollouts_of(chats), tmp_path / "half", steps=2, **options)
    run_ranks(train, 1, half)
    on = grpo_config(
        tiny, rollouts_of(chats), tmp_path / "half", steps=4, parallel={"tp": 2, "pp": 2}, **options
    )
    on = replace(on, checkpoint=replace(on.checkpoint, resume=True))
    run_ranks(train, 4, on)
    for key in ("loss", "ratio", "engine_gap_max"):
        expected = records(tmp_path / "through", key)
        assert records(tmp_path / "half", key) == pytest.approx(expected, rel=1e-4, abs=1e-5), key
    # Advantages are part of what a run is trained on.
    other = replace(on, objective=grpo(proximal="start", advantage_std="none"))
    other = replace(other, train=replace(on.train, steps=5))
    with pytest.raises(Exception, match="was trained on other tokens"):
        run_ranks(train, 4, other)
    with pytest.raises(ValueError, match="grpo learns from rollouts, and eval has conversations"):
        plan_of(Request(target=str(tmp_path / "half")))


def test_what_knows_of_no_rollouts_says_so(tiny: Path, chats: Path, tmp_path: Path) -> None:
    config = grpo_config(tiny, rollouts_of(chats), tmp_path)
    with pytest.raises(ValueError, match="objective.name=grpo is not planned yet: neither the ent"):
        Question.of(config, PlanOptions(gpus=[8], gpu="h100"))


@pytest.mark.slow
def test_tokens_of_another_model_are_refused(tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt_ids": [1], "completion_ids": [i, 90_000], "reward": i} for i in (5, 6)]
    write_jsonl(tmp_path / "rollouts.jsonl", rows)
    config = grpo_config(
        tiny, tmp_path / "rollouts.jsonl", tmp_path / "run", objective=grpo(proximal="current"),
        eval=1, global_batch_size=2,
    )  # fmt: skip
    with pytest.raises(Exception, match="has token ids beyond the model's 512, up to 90,000"):
        run_ranks(train, 1, config)
