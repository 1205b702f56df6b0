"""Losses and answers against stock transformers and PEFT, in several layouts, and against the
evaluation of training."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalora.config import LoRAConfig
from megalora.config.file import save_config
from megalora.data.questions import Question
from megalora.data.splits import load_split
from megalora.evaluate.judge import judge
from megalora.evaluate.report import record_of, text_of
from megalora.evaluate.request import Request, plan_of
from megalora.evaluate.verdict import Judged, Verdict
from tests.distributed.ranks import run_ranks
from tests.jsonl import read_jsonl
from tests.parity.built import built, random_factors
from tests.parity.runs import make_config
from tests.serve.adapters import ATTENTION, EXPERTS, make_adapter

TARGETS = [*ATTENTION, *EXPERTS]


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose answers differ from the base's."""
    return make_adapter(
        tmp_path_factory.mktemp("judged") / "adapter", tiny, seed=3, target_modules=TARGETS
    )


def judged(request: Request) -> Verdict:
    """A rank function."""
    return judge(plan_of(request))


@torch.no_grad()
def of_stock_peft(
    base: Path, adapter: Path | None, chats: Path, rows: int
) -> tuple[float, int, list[list[int]]]:
    """(mean cross entropy, target tokens, tokens of greedy answers to the first ``rows``), sample
    by sample."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    total = 0.0
    count = 0
    samples = load_split(str(chats), tokenizer, format="auto", max_length=4096).samples
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids).long()
        mask = torch.from_numpy(sample.loss_mask)[1:]
        losses = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total += losses[mask].double().sum().item()
        count += int(mask.sum())
    answers = []
    for row in read_jsonl(chats)[:rows]:
        ids = tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        text = model.generate(**ids, max_new_tokens=6, do_sample=False)
        answers.append(text[0, ids["input_ids"].shape[1] :].tolist())
    return total / count, count, answers


@pytest.fixture(scope="module")
def ending(tiny: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same base with one more stop token in ``generation_config.json``, the third of its answer
    to the first row: without it no answer would end before its sixth."""
    base = tmp_path_factory.mktemp("judged") / "base"
    shutil.copytree(tiny, base)
    third = of_stock_peft(tiny, None, chats, 1)[2][0][2]
    path = base / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token_id": [config["eos_token_id"], third]}))
    return base


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [(1, []), (4, ["parallel.tp=2", "parallel.ep=2"]), (3, [])],
    ids=["alone", "tp2-ep2", "dp3"],
)
def test_stock_peft_s_losses_and_answers(
    num_ranks: int, layout: list[str], ending: Path, folder: Path, chats: Path
) -> None:
    request = Request(
        target=str(folder), base=str(ending), data=str(chats), nproc=num_ranks, generate=True,
        limit=5, rule="exact", sampling={"max_new_tokens": 6},
        overrides=["model.dtype=float32", *layout],
    )  # fmt: skip
    verdicts = run_ranks(judged, num_ranks, request)
    tokenizer: Any = AutoTokenizer.from_pretrained(ending)
    for name, adapter in (("base", None), ("adapter", folder)):
        loss, count, tokens = of_stock_peft(ending, adapter, chats, 5)
        # Some answer of the base ends early.
        assert adapter or min(map(len, tokens)) < 6
        answers = [tokenizer.decode(answer, skip_special_tokens=True) for answer in tokens]
        for verdict in verdicts:
            ours = verdict.judged[name]
            # float32 on both sides, of some thousand tokens.
            assert ours.loss == pytest.approx(loss, rel=2e-6)
            assert ours.count == count
            assert ours.answers == answers
    assert verdicts[0].judged["base"].answers != verdicts[0].judged["adapter"].answers
    assert [question.expected for question in verdicts[0].questions] == [
        row["messages"][-1]["content"] for row in read_jsonl(chats)[:5]
    ]


def evaluated_in_training(config: Any, weights: Path) -> float:
    with built(config, weights) as run:
        return run.stepper.evaluate(run.batches.of_eval())[0]


@pytest.mark.slow
def test_the_loss_of_training_s_own_evaluation(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """The samples that the run held out; with pipeline stages, under which losses run too."""
    lora = LoRAConfig(rank=4, alpha=8.0, target_modules=TARGETS)
    folder = make_adapter(tmp_path / "run/step_000005", tiny, 3, target_modules=TARGETS)
    # The same draws as the folder's, by the seed, as training holds them.
    weights = tmp_path / "weights.safetensors"
    save_file(random_factors(lora, tiny, 3)[1], weights)
    config = make_config(tiny, chats, tmp_path / "run", {}, lora=lora)
    save_config(config, tmp_path / "run/config.yaml")
    expected = run_ranks(evaluated_in_training, 1, config, weights)[0]
    request = Request(target=str(folder), nproc=2, overrides=["parallel.pp=2"])
    for verdict in run_ranks(judged, 2, request):
        assert verdict.judged["adapter"].loss == pytest.approx(expected, rel=2e-6)
        assert verdict.data.endswith(" in the loss)")
        assert "(held out): 21 samples" in verdict.data


@pytest.mark.long
def test_the_command(tiny: Path, folder: Path, chats: Path, tmp_path: Path) -> None:
    """Two ranks; the base alone has no adapter beside it."""
    out = tmp_path / "sub" / "eval.json"
    common = [sys.executable, "-m", "megalora", "eval"]
    options = ["--data", f"{chats}[:8]", "model.dtype=float32", "--out", str(out)]
    generating = ["--generate", "--limit", "3", "--max-new-tokens", "3", "--nproc", "2"]
    done = subprocess.run(
        [*common, str(folder), *options, *generating], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "the first 3 by last-number, + right, - wrong:" in done.stdout
    record = json.loads(out.read_text())
    assert record["adapter_folder"] == str(folder)
    assert [row["row"] for row in record["answers"]] == [1, 2, 3]
    assert record["adapter"]["loss"] != record["base"]["loss"]
    done = subprocess.run([*common, str(tiny), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone = json.loads(out.read_text())
    assert alone["base"]["loss"] == pytest.approx(record["base"]["loss"], rel=2e-6)
    assert "adapter" not in alone


def verdict_of(rights: int) -> Verdict:
    """Twelve made-up questions, of which the adapter answers so many."""
    questions = [Question(n, f"What is {n}?", f"= {n}", [1]) for n in range(1, 13)]
    answers = [f"so = {n}" if n <= rights else "no" for n in range(1, 13)]
    right = [n <= rights for n in range(1, 13)]
    return Verdict(
        "rows.jsonl: 12 samples",
        questions,
        {
            "adapter": Judged(0.5, 100, answers, right, num_cut=2),
            "base": Judged(2.0, 100, [f"? {'x ' * 40}end"] + ["?"] * 11, [False] * 12),
        },
    )


def test_the_table_has_ten_examples_and_the_base_first(tiny: Path, chats: Path) -> None:
    plan = plan_of(Request(target=str(tiny), data=str(chats), generate=True))
    verdict = verdict_of(3)
    lines = text_of(plan, verdict).splitlines()
    assert lines[1] == "answers: to the last question of all 12 rows of these"
    del lines[1]
    assert lines[2].split(maxsplit=4) == [
        "base", "2.0000", "7.389", "100", "0 of 12 right (0.0%)",
    ]  # fmt: skip
    assert lines[3].split(maxsplit=4) == [
        "adapter", "0.5000", "1.649", "100", "3 of 12 right (25.0%)",
    ]  # fmt: skip
    # The base's answers are all whole.
    assert lines.pop(4) == "cut at 256 tokens (--max-new-tokens): 2 of 12 by the adapter"
    assert lines[5] == "the first 10 by last-number, + right, - wrong:"
    assert [cell.strip() for cell in lines[6].split("|")] == [
        "question", "expected", "base", "adapter",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[9].split("|")] == [
        "What is 3?", "= 3", "- ?", "+ so = 3",
    ]  # fmt: skip
    # A long answer is cut at its beginning, and keeps its mark.
    assert lines[7].split("|")[2].startswith(" - ...") and "x end | + so = 1" in lines[7]
    assert len(lines) == 17
    record = record_of(plan, verdict)
    assert record["adapter"] == {
        "loss": 0.5, "perplexity": pytest.approx(1.6487, abs=1e-4), "target_tokens": 100,
        "right": 3, "accuracy": 0.25, "cut": 2,
    }  # fmt: skip
    assert len(record["answers"]) == 12
    # Without generation neither a table nor a rule.
    alone = replace(verdict, questions=[], judged={"base": Judged(800.0, 5)})
    assert "inf" in text_of(plan, alone)
    assert record_of(plan, alone)["rule"] is None
