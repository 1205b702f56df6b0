"""Logits that were written before training: the same distances as from the teacher itself, under
any layout, and refused where they belong to something else."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalora.config import ParallelConfig, RunConfig
from megalora.data.logits_header import HEADER, read_header_of
from megalora.data.splits import load_data
from megalora.data.tokenizer import load_tokenizer
from megalora.data.top_logits import TopLogits, find_samples
from megalora.hf.vocabulary import tokens_digest
from megalora.preflight import check_teacher
from megalora.tiny import make_tiny
from megalora.train.logits_command import LogitsRequest
from megalora.train.loop import train
from megalora.train.write_logits import write_logits
from tests.distributed.ranks import run_ranks
from tests.parity.built import random_adapter
from tests.parity.runs import records
from tests.train.test_distill import first_step, taught


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("kept") / "teacher", seed=5, num_hidden_layers=2)


def write(config: RunConfig, out: Path, k: int) -> None:
    """A rank function."""
    write_logits(config, out, k)


def learning_from(config: RunConfig, teacher: Path) -> RunConfig:
    return replace(config, objective=replace(config.objective, teacher=str(teacher)))


@pytest.mark.slow
def test_nearly_all_tokens_teach_as_the_teacher_does(
    teacher: Path, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """All but one: the rest is that one."""
    config = taught(teacher, tiny, chats, tmp_path, of={"sft_weight": 0.1})
    random_adapter(tmp_path / "start.safetensors", config.lora, tiny)
    run_ranks(write, 1, config, tmp_path / "logits", 511)
    expected = run_ranks(first_step, 1, config, tmp_path / "start.safetensors")[0]
    kept = learning_from(config, tmp_path / "logits")
    found = run_ranks(first_step, 1, kept, tmp_path / "start.safetensors")[0]
    assert expected[2]["divergence"] > 0.05
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1] == pytest.approx(expected[1], rel=1e-5)
    assert found[2] == pytest.approx(expected[2], rel=1e-6)


@pytest.mark.slow
def test_written_and_read_under_any_layout(
    teacher: Path, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    config = taught(teacher, tiny, chats, tmp_path)
    random_adapter(tmp_path / "start.safetensors", config.lora, tiny)
    run_ranks(write, 1, config, tmp_path / "alone", 12)
    cut = replace(config, parallel=ParallelConfig(tp=2, pp=2))
    run_ranks(write, 4, cut, tmp_path / "cut", 12)
    packed = replace(config.train, micro_batch_tokens=256, micro_batch_size=1)
    replicas = replace(config, train=packed, parallel=ParallelConfig(ep=2))
    run_ranks(write, 2, replicas, tmp_path / "packed", 12)
    found: list[Any] = []
    for name, world, layout, train_section in (
        ("alone", 1, {}, config.train),
        ("cut", 1, {}, config.train),
        ("packed", 2, {"cp": 2}, packed),
        ("alone", 4, {"tp": 2, "pp": 2}, config.train),
        ("alone", 2, {}, packed),
    ):
        of = replace(config, parallel=ParallelConfig(**layout), train=train_section)
        of = learning_from(of, tmp_path / name)
        found.append(run_ranks(first_step, world, of, tmp_path / "start.safetensors")[0])
    loss, norm, others = found[0]
    assert others["divergence"] > 0.02
    for other in found[1:]:
        assert other[0] == pytest.approx(loss, rel=2e-5)
        assert other[1] == pytest.approx(norm, rel=1e-4)
        assert other[2] == pytest.approx(others, rel=2e-5)


@pytest.mark.slow
def test_a_run_comes_nearer_by_a_file_and_knows_it_again(
    teacher: Path, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    config = taught(teacher, tiny, chats, tmp_path / "run", steps=5, lr=1e-2)
    run_ranks(write, 1, config, tmp_path / "logits", 40)
    config = learning_from(config, tmp_path / "logits")
    run_ranks(train, 1, config)
    distances = records(tmp_path / "run", "eval_divergence")
    assert distances[-1] < 0.95 * distances[0]
    header = read_header_of(tmp_path / "logits")
    assert header.sets["train"]["samples"] + header.sets["eval"]["samples"] == 96
    # Other data, and another length limit, make other samples.
    for data in ({"seed": 1}, {"max_length": 40, "too_long": "truncate_right"}):
        moved = replace(config, data=replace(config.data, **data))
        train_split, _ = load_data(moved.data, load_tokenizer(tiny), objective=moved.objective)
        with pytest.raises(ValueError, match=r"has logits of other samples \(75 of .*chats"):
            find_samples(tmp_path / "logits", train_split.samples, train_split.source)


def test_what_is_joined_keeps_its_dtypes() -> None:
    one = TopLogits(np.int32([[3, 1]]), np.float32([[-0.1, -3]]), np.float32([-4]))
    joined = TopLogits.joined([one, one], 2)
    assert joined.ids.dtype == np.int32 and joined.ids.tolist() == [[3, 1], [3, 1]]
    assert joined.rest.dtype == np.float32 and joined.logprobs.shape == (2, 2)
    assert TopLogits.joined([], 2).ids.shape == (0, 2)


def test_logits_of_something_else_are_refused(tiny: Path, chats: Path, tmp_path: Path) -> None:
    folder = tmp_path / "logits"
    folder.mkdir()
    good = {
        "k": 12, "temperature": 2.0, "vocab": 512, "teacher": "t", "weights": "w",
        "tokens": tokens_digest(tiny, "model.path"), "sets": {}, "format": 1,
    }  # fmt: skip
    config = taught(folder, tiny, chats, tmp_path)

    def refusal(**changed: Any) -> str:
        (folder / HEADER).write_text(json.dumps({**good, **changed}))
        with pytest.raises(ValueError) as raised:
            check_teacher(config, tiny)
        return str(raised.value)

    assert "has logits of 500 vocabulary entries, and model.path=" in refusal(vocab=500)
    assert "was written with another tokenizer than that of model.path=" in refusal(tokens="other")
    assert "objective.temperature=2: the logits of" in refusal(temperature=1.0)
    assert "512 tokens of each place: it must be from 1 to 511" in refusal(k=512)
    assert "format 2, and this megalora reads 1" in refusal(format=2)
    assert "damaged" in refusal(surplus=1)


def test_only_a_model_is_asked(tiny: Path, chats: Path, tmp_path: Path) -> None:
    def refusal(config: RunConfig, k: int = 8) -> str:
        with pytest.raises(ValueError) as raised:
            LogitsRequest(config, tmp_path / "out", k).check()
        return str(raised.value)

    config = taught(tiny, tiny, chats, tmp_path)
    assert "objective.teacher=base" in refusal(
        taught("base", tiny, chats, tmp_path, of={"sft_weight": 0.1})
    )
    assert "--k must be from 1 to 1024, got 0" in refusal(config, 0)
    cut = replace(config, parallel=ParallelConfig(cp=2))
    assert "needs parallel.cp=1, got 2" in refusal(cut)
    (tmp_path / HEADER).write_text("{}")
    assert "is a folder of logits, not a model" in refusal(learning_from(config, tmp_path))
