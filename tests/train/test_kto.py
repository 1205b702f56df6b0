"""A run that learns from labelled answers: good ones gain on bad ones, however it is divided,
stopped or evaluated."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megalora.config import ObjectiveConfig, RunConfig
from megalora.evaluate.judge import judge
from megalora.evaluate.report import record_of, text_of
from megalora.evaluate.request import Request, plan_of
from megalora.evaluate.verdict import Verdict
from megalora.planner.cost import step_time
from megalora.planner.gpus import GPUS
from megalora.planner.layouts import ParallelLayout
from megalora.planner.models import load_shape
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.jsonl import read_jsonl, write_jsonl
from tests.paired import pairs_of, rated_of
from tests.parity.built import built, random_adapter
from tests.parity.runs import make_config, records

KTO = ObjectiveConfig(name="kto", beta=0.3)
ROOT = Path(__file__).parents[2]


def kto_config(chats: Path, tiny: Path, out: Path, **options) -> RunConfig:
    options = {"parallel": {}, "objective": KTO, "eval": 9, **options}
    return make_config(tiny, chats, out, **options)


def rated_pairs(chats: Path, out: Path) -> Path:
    """Chosen answers are good and rejected ones bad."""
    rows = []
    for row in read_jsonl(pairs_of(chats)):
        for side in ("chosen", "rejected"):
            rows.append({"messages": row[side], "label": side == "chosen"})
    write_jsonl(out / "rated.jsonl", rows)
    return out / "rated.jsonl"


def steps(config: RunConfig, weights: Path) -> tuple[float, float, dict[str, float], int]:
    """(loss, gradient norm, others, tokens of the mismatched rows) of a step; a rank function."""
    with built(config, weights) as run:
        rows = run.batches.mismatched_of_step(0)
        tokens = sum(len(row.tokens) - row.filler for row in rows)
        return *run.step(0, 0.0), run.others, tokens


@pytest.mark.slow
def test_the_estimate_is_of_the_global_batch(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """The same number whatever shares a rank or a row, and above zero here: it is in the loss."""
    found = []
    for world, options in (
        (1, {"micro_batch_size": 8}),
        (2, {"micro_batch_size": 1}),
        (2, {"micro_batch_tokens": 255, "micro_batch_size": 1, "parallel": {"ep": 2}}),
    ):
        config = kto_config(rated_of(chats), tiny, tmp_path, data_seed=2, **options)
        random_adapter(tmp_path / "start.safetensors", config.lora, tiny)
        ranks = run_ranks(steps, world, config, tmp_path / "start.safetensors")
        found.append((*ranks[0][:3], sum(rank[3] for rank in ranks)))
    (loss, norm, others, tokens), *rest = found
    assert others["kl"] > 0.05 and tokens > 100
    assert abs(others["good_reward"]) > 0.01 and "bad_reward" in others
    for other in rest:
        assert other[0] == pytest.approx(loss, rel=1e-5)
        assert other[1] == pytest.approx(norm, rel=1e-4)
        assert other[2] == pytest.approx(others, rel=1e-4) and other[3] == tokens


def judged(request: Request) -> Verdict:
    """A rank function."""
    return judge(plan_of(request))


@pytest.mark.slow
def test_good_answers_gain_on_bad_ones(tiny: Path, chats: Path, tmp_path: Path) -> None:
    source = rated_pairs(chats, tmp_path)
    config = kto_config(
        source, tiny, tmp_path / "run", parallel={"ep": 2}, steps=8, lr=2e-3, eval=20
    )
    run_ranks(train, 2, config)
    good = records(tmp_path / "run", "eval_good_reward")
    bad = records(tmp_path / "run", "eval_bad_reward")
    # A fresh adapter is the base: every term is a half.
    assert records(tmp_path / "run", "loss")[0] == pytest.approx(0.5, abs=1e-6)
    assert good[0] == pytest.approx(0, abs=1e-5) and records(tmp_path / "run", "kl")[0] < 1e-5
    assert good[1] - bad[1] > 0.05
    losses = records(tmp_path / "run", "eval_loss")
    assert losses[1] < losses[0] - 0.005
    # ``megalora eval`` of the same held-out samples.
    request = Request(target=str(tmp_path / "run"))
    (verdict,) = run_ranks(judged, 1, request)
    found = verdict.judged["adapter"]
    assert found.loss == pytest.approx(losses[-1], rel=1e-5) and found.count == 20
    for name, value in found.others.items():
        own = records(tmp_path / "run", f"eval_{name}")[-1]
        assert value == pytest.approx(own, rel=1e-4, abs=1e-5), name
    plan = plan_of(request)
    header, first, second = text_of(plan, verdict).splitlines()[1:4]
    assert header.split() == ["loss", "kl", "good", "reward", "bad", "reward", "samples"]
    assert first.split()[:2] == ["base", "0.5000"] and second.split()[-1] == "20"
    record = json.loads(json.dumps(record_of(plan, verdict)))
    assert record["adapter"]["preference"] == found.others and record["base"]["samples"] == 20


@pytest.mark.slow
def test_a_resumed_run_and_one_of_good_answers_alone(
    tiny: Path, chats: Path, tmp_path: Path
) -> None:
    through = kto_config(rated_of(chats), tiny, tmp_path / "through", steps=4)
    run_ranks(train, 1, through)
    run_ranks(train, 1, kto_config(rated_of(chats), tiny, tmp_path / "half", steps=2))
    on = kto_config(rated_of(chats), tiny, tmp_path / "half", steps=4, parallel={"tp": 2, "pp": 2})
    run_ranks(train, 4, replace(on, checkpoint=replace(on.checkpoint, resume=True)))
    for key in ("loss", "kl"):
        expected = records(tmp_path / "through", key)
        assert records(tmp_path / "half", key) == pytest.approx(expected, rel=1e-4, abs=1e-5), key
    # Of bad answers, of which there are none, nothing is reported.
    rows = [{**row, "label": True} for row in read_jsonl(rated_of(chats))]
    write_jsonl(tmp_path / "good.jsonl", rows)
    good = kto_config(tmp_path / "good.jsonl", tiny, tmp_path / "good", steps=3, lr=2e-3)
    run_ranks(train, 1, good)
    assert records(tmp_path / "good", "good_reward")
    assert not records(tmp_path / "good", "bad_reward")
    assert not records(tmp_path / "good", "eval_bad_reward")
    # Its estimate is above 0, so that an evaluation by itself can tell matched answers from others.
    estimate = records(tmp_path / "good", "eval_kl")[-1]
    (verdict,) = run_ranks(judged, 1, Request(target=str(tmp_path / "good")))
    assert estimate > 1e-3
    assert verdict.judged["adapter"].others["kl"] == pytest.approx(estimate, rel=1e-3)


def test_three_passes_are_planned() -> None:
    """As long as three of DPO's reference over the same tokens."""
    shape = load_shape(ROOT / "configs" / "models" / "qwen3_30b_a3b.yaml")
    config = make_config(Path("base"), Path("x.jsonl"), Path("out"), {}, objective=KTO)
    model = PlannedModel.of(shape, config.lora)
    layout = ParallelLayout(parallel=replace(config.parallel, ep=8), num_ranks=8)
    work = Workload.of(config)
    times = []
    for references in (1, work.references):
        planned = step_time(model, layout, replace(work, references=references), GPUS["h100"])
        times.append(planned["reference"])
    assert times[1] == pytest.approx(3 * times[0]) and times[0] > 0
