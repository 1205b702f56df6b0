"""A run that learns from a teacher: it comes nearer, however it is divided, stopped or evaluated,
and an unfit teacher is refused in a line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalora.adapters.write.card_objective import objective_line
from megalora.config import CheckpointConfig, ObjectiveConfig, ParallelConfig, RunConfig
from megalora.evaluate.judge import judge
from megalora.evaluate.report import record_of, text_of
from megalora.evaluate.request import Request, plan_of
from megalora.evaluate.verdict import Verdict
from megalora.model.second_model import plan_second
from megalora.preflight import check_teacher
from megalora.tiny import make_tiny
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.parity.built import built, random_adapter
from tests.parity.runs import make_config, records


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another family and other sizes than ``tiny``: dense, three layers."""
    folder = tmp_path_factory.mktemp("taught") / "teacher"
    return make_tiny(folder, arch="qwen3", seed=5, num_hidden_layers=3, hidden_size=64)


def taught(
    teacher: str | Path, tiny: Path, chats: Path, out: Path, *, parallel: Any = None, **options: Any
) -> RunConfig:
    of = {"temperature": 2.0, "divergence": "reverse", **options.pop("of", {})}
    objective = ObjectiveConfig(name="distill", teacher=str(teacher), **of)
    return make_config(tiny, chats, out, parallel or {}, objective=objective, **options)


def first_step(config: RunConfig, weights: Path) -> tuple[float, float, dict[str, float]]:
    """(loss, gradient norm, others) of a step; a rank function."""
    with built(config, weights) as run:
        return *run.step(0, 0.0), run.others


@pytest.mark.slow
def test_a_dense_teacher_beside_divided_experts(
    teacher: Path, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """Ranks that share out the student's experts are replicas of the teacher; its three layers
    need not be cut as the student's four."""
    found = []
    for world, parallel in ((1, {}), (2, {"ep": 2}), (4, {"tp": 2, "etp": 2, "pp": 2})):
        config = taught(teacher, tiny, chats, tmp_path, parallel=parallel)
        random_adapter(tmp_path / "start.safetensors", config.lora, tiny)
        found.append(run_ranks(first_step, world, config, tmp_path / "start.safetensors")[0])
    loss, norm, others = found[0]
    # At temperature 2 the loss is four times the distance.
    assert loss == pytest.approx(4 * others["divergence"], rel=1e-6) and loss > 0.1
    for other in found[1:]:
        assert other[0] == pytest.approx(loss, rel=1e-5)
        assert other[1] == pytest.approx(norm, rel=1e-4)
        assert other[2] == pytest.approx(others, rel=1e-5)


def judged(request: Request) -> Verdict:
    """A rank function."""
    return judge(plan_of(request))


@pytest.mark.slow
def test_a_run_comes_nearer_and_goes_on_in_another_layout(
    teacher: Path, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    through = taught(teacher, tiny, chats, tmp_path / "through", steps=6, lr=1e-2)
    checkpoint = CheckpointConfig(dir=str(tmp_path / "through"), every=3)
    run_ranks(train, 1, replace(through, checkpoint=checkpoint))
    distances = records(tmp_path / "through", "eval_divergence")
    assert distances[-1] < 0.9 * distances[0]
    # From the third step on, cut up.
    at = str(tmp_path / "through/step_000003")
    rest = taught(
        teacher, tiny, chats, tmp_path / "rest", steps=6, lr=1e-2, parallel={"tp": 2, "pp": 2}
    )
    rest = replace(rest, checkpoint=CheckpointConfig(dir=str(tmp_path / "rest"), resume=at))
    run_ranks(train, 4, rest)
    found = records(tmp_path / "rest", "loss")
    assert found == pytest.approx(records(tmp_path / "through", "loss")[3:], rel=1e-5)
    # ``megalora eval`` of the same held-out samples.
    request = Request(target=str(tmp_path / "through"))
    (verdict,) = run_ranks(judged, 1, request)
    plan = plan_of(request)
    one = verdict.judged["adapter"]
    assert one.loss == pytest.approx(records(tmp_path / "through", "eval_loss")[-1], rel=1e-5)
    assert one.others["divergence"] == pytest.approx(distances[-1], rel=1e-5)
    assert verdict.judged["base"].others["divergence"] == pytest.approx(distances[0], rel=1e-5)
    head = text_of(plan, verdict).splitlines()[1]
    assert head.split() == ["loss", "divergence", "cross", "entropy", "target", "tokens"]
    assert "divergence" in json.loads(json.dumps(record_of(plan, verdict)))["adapter"]
    # Another teacher in the middle of a run.
    other = make_tiny(tmp_path / "other", arch="qwen3", seed=6, num_hidden_layers=3)
    moved = replace(rest.objective, teacher=str(other))
    again = replace(rest, objective=moved, parallel=ParallelConfig())
    again = replace(again, checkpoint=CheckpointConfig(dir=str(tmp_path / "again"), resume=at))
    with pytest.raises(Exception, match=r"was trained with another teacher: objective.teacher="):
        run_ranks(train, 1, again)


@pytest.mark.slow
def test_a_model_is_no_distance_from_itself(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """A fresh adapter is the base: as a second model and without one."""
    start = tmp_path / "start.safetensors"
    for name in (str(tiny), "base"):
        config = taught(name, tiny, chats, tmp_path, of={"sft_weight": 0.5})
        random_adapter(start, config.lora, tiny)
        ((loss, _, others),) = run_ranks(step_of_fresh, 1, config)
        assert others["divergence"] == pytest.approx(0, abs=1e-7)
        assert loss == pytest.approx(0.5 * others["cross_entropy"], rel=1e-6)
        ((loss, _, others),) = run_ranks(first_step, 1, config, start)
        assert others["divergence"] > 0.01


def step_of_fresh(config: RunConfig) -> tuple[float, float, dict[str, float]]:
    """``first_step`` of an adapter as it is initialised; a rank function."""
    with built(config) as run:
        return *run.step(0, 0.0), run.others


def test_teachers_that_do_not_fit_are_refused(
    teacher: Path, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    small = make_tiny(tmp_path / "small", vocab_size=500, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"has another vocabulary than model.path=.*token \d+ is"):
        plan_second(ParallelConfig(), small, tiny)
    # The same tokens, and more rows of the embedding than there are tokens.
    tokenizer = (tiny / "tokenizer.json").read_bytes()
    (small / "tokenizer.json").write_bytes(tokenizer)
    with pytest.raises(ValueError, match=r"has 500 vocabulary entries and model.path=.* has 512"):
        plan_second(ParallelConfig(), small, tiny)
    (small / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"objective.teacher=.*small has no tokenizer.json"):
        plan_second(ParallelConfig(), small, tiny)
    with pytest.raises(ValueError, match=r"objective.teacher=.*tp=4 does not fit the model's 6"):
        plan_second(ParallelConfig(tp=4), teacher, tiny)
    shape, cut = plan_second(ParallelConfig(pp=2, ep=2), teacher, tiny)
    assert (shape.num_layers, cut.ep, cut.stage_layers) == (3, 1, (2, 1))
    config = taught(tmp_path / "nowhere", tiny, chats, tmp_path)
    with pytest.raises(ValueError, match=r"objective.teacher=.*nowhere: no such folder"):
        check_teacher(config, tiny)


def test_the_card_names_the_teacher() -> None:
    options = {"name": "distill", "teacher": "org/large", "divergence": "jsd", "beta": 0.3}
    said = objective_line({**options, "temperature": 2.0, "sft_weight": 0.1})
    assert said == "distill, `org/large`, jsd, temperature 2, beta 0.3, sft_weight 0.1"
