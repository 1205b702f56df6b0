"""Answers while training are those of transformers and PEFT for the checkpoint of that step, and
training goes on as if nobody had asked."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megalora.config import CheckpointConfig, RunConfig
from megalora.data.questions import read_questions
from megalora.data.splits import load_data
from megalora.evaluate.judge import judge
from megalora.evaluate.request import Request, plan_of
from megalora.generate.options import stop_tokens
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.distributed.test_checkpoint import same_files
from tests.generate.models import their_answers
from tests.jsonl import read_jsonl
from tests.parity.runs import make_config

LIMIT = 6


def asking(config: RunConfig, out: Path, **log: Any) -> RunConfig:
    """The same run with answers, and a checkpoint wherever it evaluates."""
    return replace(
        config,
        checkpoint=CheckpointConfig(dir=str(out), every=2),
        log=replace(config.log, sample_tokens=LIMIT, **log),
    )


def run_twice(
    base: Path, chats: Path, folder: Path, parallel: dict[str, int], num_ranks: int,
    steps: int = 4, **options: Any,
) -> RunConfig:  # fmt: skip
    """Train without and with answers, dropout in both; what does not depend on the clock must be
    the same, bit for bit. Returns the config with answers."""
    config = make_config(base, chats, folder, parallel, steps=steps, eval_every=2, **options)
    config = replace(config, lora=replace(config.lora, dropout=0.1))
    plain = asking(config, folder / "plain")
    asked = asking(config, folder / "asked", samples=3)
    for one in (plain, asked):
        run_ranks(train, num_ranks, one)
    records = []
    for name in ("plain", "asked"):
        rows = read_jsonl(folder / name / "metrics.jsonl")
        for row in rows:
            row.pop("tokens_per_second", None)
            row.pop("memory_gib", None)
        records.append(rows)
    assert records[0] == records[1]
    evaluated = [row["step"] for row in records[0] if "eval_loss" in row]
    assert evaluated == list(range(0, steps + 1, 2))
    for step in evaluated[1:]:
        one = folder / f"plain/step_{step:06d}"
        other = folder / f"asked/step_{step:06d}"
        same_files(one, other)
        # Every rank's generators, which draw the dropout masks.
        for rank in one.glob("training_state/rank_*"):
            assert rank.read_bytes() == (other / "training_state" / rank.name).read_bytes()
    experts = [(folder / name / "expert_tokens.bin").read_bytes() for name in ("plain", "asked")]
    assert experts[0] == experts[1]
    assert not (folder / "plain/answers.jsonl").exists()
    return asked


def held_out_questions(config: RunConfig) -> list[Any]:
    tokenizer: Any = AutoTokenizer.from_pretrained(config.model.path)
    _, held_out = load_data(config.data, tokenizer)
    assert held_out is not None
    return read_questions(config.data, held_out, tokenizer, 3)


def check_answers(config: RunConfig) -> list[dict[str, Any]]:
    """Against transformers' own ``generate`` with the adapter of stock PEFT; returns the
    records."""
    base = Path(config.model.path)
    run = Path(config.checkpoint.dir)
    questions = held_out_questions(config)
    records = read_jsonl(run / "answers.jsonl")
    assert [record["step"] for record in records] == list(range(0, config.train.steps + 1, 2))  # type: ignore[operator]
    prompts = [question.tokens for question in questions]
    for record in records:
        step = record["step"]
        adapter = run / f"step_{step:06d}" if step else None
        theirs = their_answers(base, prompts, LIMIT, adapter)
        assert [answer["tokens"] for answer in record["answers"]] == [t for t, _ in theirs]
        for answer, question in zip(record["answers"], questions, strict=True):
            assert (answer["asked"], answer["expected"]) == (question.asked, question.expected)
            assert answer["ended"] == (answer["tokens"][-1] in stop_tokens(base))
    # The training has changed what is said, or these tests would show nothing.
    assert records[0]["answers"] != records[-1]["answers"]
    return records


def judged(request: Request) -> Any:
    """A rank function."""
    return judge(plan_of(request))


def test_answers_are_the_checkpoint_s_and_change_nothing(
    tiny: Path, chats: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = run_twice(tiny, chats, tmp_path, {}, 1, steps=2, lr=3e-2)
    records = check_answers(config)
    said = capfd.readouterr().out
    flat = " ".join(records[1]["answers"][0]["answer"].split())
    assert f"-> {flat}" in said and "answer 3 at step 2: " in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "num_ranks", "options"),
    [
        ({"tp": 2, "ep": 2}, 4, {"recompute": "selective"}),
        pytest.param({"tp": 2, "etp": 2}, 2, {"recompute": "full"}, marks=pytest.mark.long),
        ({"ep": 2}, 2, {"micro_batch_size": 1, "micro_batch_tokens": 300}),
    ],
    ids=["tp2-ep2-selective", "tp2-etp2-full", "dp2-ep2-packed"],
)
def test_in_other_layouts(
    parallel: dict[str, int], num_ranks: int, options: dict[str, Any],
    tiny: Path, chats: Path, tmp_path: Path,
) -> None:  # fmt: skip
    check_answers(run_twice(tiny, chats, tmp_path, parallel, num_ranks, lr=3e-2, **options))


@pytest.mark.slow
def test_the_answers_of_eval_and_of_a_resumed_run(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """``megalora eval --generate`` without data answers the rows that were held out; a run that
    goes back to step 2 answers step 4 anew, and keeps what it answered before."""
    config = make_config(tiny, chats, tmp_path, {}, steps=4, eval_every=2, lr=3e-2)
    config = asking(config, tmp_path / "run", samples=3)
    run_ranks(train, 1, config)
    records = read_jsonl(tmp_path / "run/answers.jsonl")
    request = Request(
        target=str(tmp_path / "run/step_000002"), generate=True, limit=3, rule="exact",
        sampling={"max_new_tokens": LIMIT},
    )  # fmt: skip
    verdict = run_ranks(judged, 1, request)[0]
    for by, step in (("base", 0), ("adapter", 1)):
        answers = [answer["answer"] for answer in records[step]["answers"]]
        assert verdict.judged[by].answers == answers
    back = replace(
        config, checkpoint=replace(config.checkpoint, resume=str(tmp_path / "run/step_000002"))
    )
    run_ranks(train, 1, back)
    assert read_jsonl(tmp_path / "run/answers.jsonl") == records


@pytest.mark.slow
def test_messages_of_the_user_s_own(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """Without evaluation data: at the start and at the end, as transformers' template asks. A token
    of the first answer ends it."""
    texts = ["What is 6 times 7?", "Name a colour."]
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    prompts = []
    for text in texts:
        message = [{"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True
        )
        prompts.append(encoded["input_ids"])
    third = their_answers(tiny, prompts, LIMIT)[0][0][2]
    base = shutil.copytree(tiny, tmp_path / "base")
    path = base / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "eos_token_id": [settings["eos_token_id"], third]}))
    config = make_config(base, chats, tmp_path, {}, steps=1, data={"eval": None})
    run_ranks(train, 1, asking(config, tmp_path / "run", samples=texts))
    records = read_jsonl(tmp_path / "run/answers.jsonl")
    assert [record["step"] for record in records] == [0, 1]
    found = records[0]["answers"]
    assert [answer["tokens"] for answer in found] == [
        tokens for tokens, _ in their_answers(base, prompts, LIMIT)
    ]
    assert found[0]["ended"] and len(found[0]["tokens"]) <= 3
    assert [answer["asked"] for answer in found] == texts
