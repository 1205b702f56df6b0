"""Benchmark configs of other objectives than next-token loss: what the samples are, and a step of
each for real."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megalora import host
from megalora.bench.command import check_teacher, predicted
from megalora.bench.flops import flops_per_token
from megalora.bench.rows import BenchOptions, load_rows
from megalora.bench.samples import full_samples
from megalora.bench.steps import measure_layout
from megalora.bench.timers import Timeline
from megalora.cli.main import main
from megalora.config import LoRAConfig, ObjectiveConfig, RunConfig
from megalora.data.batch import flat_row
from megalora.lora.select import resolve
from megalora.planner.gpus import GPUS
from megalora.planner.models import shape_in
from tests.distributed.ranks import run_ranks
from tests.paired import labelled_of, pairs_of
from tests.parity.runs import make_config
from tests.planner.test_hardware import calibration

CLASSIFY = ObjectiveConfig(name="classify", labels=["none", "one", "two"])
REWARD = ObjectiveConfig(name="reward")
DPO = ObjectiveConfig(name="dpo")
KTO = ObjectiveConfig(name="kto")
DISTILL = ObjectiveConfig(name="distill", teacher="base", sft_weight=0.1)
LENGTH = 41
ROOT = Path(__file__).parents[2]
# Rates of the dtype that the configs train in.
H100 = replace(GPUS["h100"], dtype="float32")


def config_of(base: Path, chats: Path, objective: ObjectiveConfig, **options) -> RunConfig:
    options = {"parallel": {}, "micro_batch_size": 2, "global_batch_size": 4, **options}
    config = make_config(base, chats, base.with_name("run"), objective=objective, **options)
    return replace(config, data=replace(config.data, max_length=LENGTH))


@pytest.mark.parametrize("objective", [CLASSIFY, REWARD, DPO, KTO], ids=lambda o: o.name)
def test_samples_are_what_the_objective_learns(
    objective: ObjectiveConfig, tiny: Path, chats: Path
) -> None:
    """Every sequence of ``max_length`` tokens; with a score head the last of them is scored, else
    it is only a label."""
    _, split = full_samples(config_of(tiny, chats, objective), 100, natural=False)
    assert len(split.samples) == 4
    row = flat_row(list(split.samples), filler=split.samples[0].input_ids)
    inputs = LENGTH if objective.num_scores else LENGTH - 1
    sequences = 4 * objective.sequences
    assert row.ends == tuple(inputs * number for number in range(sequences + 1))
    assert row.targets == [1 if objective.num_scores else inputs] * sequences
    if objective.num_scores:
        places = torch.nonzero(row.loss_mask)[:, 0].tolist()
        assert places == [end - 1 for end in row.ends[1:]]
    expected = {"classify": (0, 1, 2, 0), "kto": (0, 1, 0, 1)}
    assert row.values == expected.get(objective.name, (0,) * sequences)


def test_pairs_of_natural_text_have_something_to_learn(tiny: Path, chats: Path) -> None:
    """Pieces of text, some of which lie in a question."""
    config = config_of(tiny, pairs_of(chats), DPO)
    _, split = full_samples(config, 100, natural=True)
    assert split.source == str(pairs_of(chats))
    for sample in split.samples:
        (chosen, of_chosen), (rejected, of_rejected) = sample.sequences
        assert len(chosen) == len(rejected) == LENGTH
        assert of_chosen[1:].any() and of_rejected[1:].any()
        assert (chosen != rejected).any()


def test_flops_of_a_score_head(tiny: Path, chats: Path) -> None:
    """By hand: lm_head's products go, the head's three come."""
    plain = config_of(tiny, chats, ObjectiveConfig())
    shape = shape_in(plain)
    adapted = resolve(plain.lora, shape)
    scored = replace(shape, num_scores=3)
    found = flops_per_token(scored, adapted, 64).model
    without = flops_per_token(shape, adapted, 64).model - 4 * shape.vocab * shape.hidden
    assert found == without + 6 * 3 * shape.hidden


@pytest.mark.parametrize("objective", [CLASSIFY, DPO], ids=lambda o: o.name)
def test_a_prediction_has_a_part_for_passes_before(
    objective: ObjectiveConfig, tiny: Path, chats: Path
) -> None:
    found = predicted(config_of(tiny, chats, objective), 1, H100)
    assert sum(found.parts.values()) == pytest.approx(found.step_seconds)
    assert (found.parts["reference"] > 0) == (objective.num_references > 0)


def test_a_block_that_is_one_part_has_what_is_nested_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a clock that is set by hand: layers run in a reference's pass, too."""
    now = 0.0
    monkeypatch.setattr(host.Stopwatch, "mark", lambda: now)
    monkeypatch.setattr(host, "seconds_between", lambda begin, end: end - begin)
    timeline = Timeline()
    timeline.start()
    with timeline.whole("reference"):
        now += 2
        with timeline.around("attention"):
            now += 3
        now += 4
    with timeline.around("attention"):
        now += 5
    found = timeline.seconds()
    assert found["reference"] == 9 and found["attention"] == 5 and sum(found.values()) == 14


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "sizes"),
    [
        (CLASSIFY, {"tp": 2}),
        (REWARD, {"pp": 2}),
        (DPO, {"pp": 2}),
        (KTO, {"ep": 2}),
        (DISTILL, {"pp": 2}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_for_real(objective: ObjectiveConfig, sizes: dict, tiny: Path, chats: Path) -> None:
    """Random weights know nothing: each loss is near that of chance."""
    if objective.teacher is not None:
        objective = replace(objective, teacher=str(tiny))
    options = {"parallel": sizes, "lora": LoRAConfig(rank=4), "lr": 1e-6}
    config = config_of(tiny, chats, objective, **options)
    m, _ = run_ranks(measure_layout, 2, config, BenchOptions(steps=1, warmup=2, weights="random"))
    chance = {"classify": math.log(3), "reward": math.log(2), "dpo": math.log(2), "kto": 0.5}
    # How far two models are that know nothing is not told by a formula.
    if objective.name in chance:
        assert m.loss == pytest.approx(chance[objective.name], abs=0.3)
    assert m.sequence_length == LENGTH - objective.unread_tokens
    per_step = 4 * objective.sequences * LENGTH
    assert m.tokens_per_second_per_gpu == pytest.approx(per_step / m.step_seconds / 2)
    flops = flops_per_token(shape_in(config), resolve(config.lora, shape_in(config)),
                            m.sequence_length)  # fmt: skip
    per_step = 4 * objective.sequences * m.sequence_length
    assert m.model_tflops == pytest.approx(per_step * flops.model / m.step_seconds / 2 / 1e12)
    # Passes before the step's own are a part of their own, and no others.
    has_passes = objective.num_references > 0 or objective.teacher is not None
    assert (m.parts["reference"] > 0) == has_passes
    assert sum(m.parts.values()) <= m.marked_step_seconds + 1e-9


def test_logits_of_a_file_cannot_be_asked(tiny: Path, chats: Path, tmp_path: Path) -> None:
    (tmp_path / "logits.json").write_text("{}")
    config = config_of(tiny, chats, replace(DISTILL, teacher=str(tmp_path)))
    with pytest.raises(ValueError, match="has logits of the samples of a data set"):
        check_teacher(config)
    check_teacher(config_of(tiny, chats, DISTILL))


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(["objective.name=classify", "objective.num_labels=3"], marks=pytest.mark.long),
        ["objective.name=dpo"],
        pytest.param(
            ["objective.name=distill", "objective.teacher=base", "objective.sft_weight=0.1"],
            marks=pytest.mark.long,
        ),
    ],
    ids=["classify", "dpo", "distill"],
)
def test_the_command(objective: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of its own, beside a prediction whose bytes are those of the tensors."""
    monkeypatch.chdir(ROOT)
    machine = tmp_path / "machine.json"
    machine.write_text(json.dumps(calibration()))
    small = ["data.max_length=33", "train.global_batch_size=2", "lora.rank=2"]
    with pytest.raises(SystemExit) as ended:
        main(["bench", "configs/bench/cpu.yaml", *small, *objective, "--gpu", str(machine),
              "--layouts", "micro=1", "--steps", "1", "--out", str(tmp_path / "out")])  # fmt: skip
    assert ended.value.code == 0
    (row,) = load_rows(tmp_path / "out" / "results.json")
    assert row.measured and row.predicted
    assert row.predicted.peak_bytes == pytest.approx(max(row.measured.peak_bytes), rel=0.1)


@pytest.mark.slow
def test_a_score_head_of_real_text(tiny: Path, chats: Path) -> None:
    config = config_of(tiny, labelled_of(chats), CLASSIFY)
    options = BenchOptions(steps=1, warmup=2, routing="natural")
    (m,) = run_ranks(measure_layout, 1, config, options)
    assert m.tokens == str(labelled_of(chats)) and m.weights == "real"
