"""``megalora eval`` of classifiers and reward models, against stock PEFT on transformers'
``...ForSequenceClassification``."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megalora.adapters.write.form import write_adapter
from megalora.config import LoRAConfig
from megalora.evaluate.judge import judge
from megalora.evaluate.report import record_of, text_of
from megalora.evaluate.request import Request, plan_of
from megalora.evaluate.verdict import Verdict
from megalora.hf.json_file import read_hf_config
from megalora.model.fields import model_shape
from tests.distributed.ranks import run_ranks
from tests.jsonl import read_jsonl, write_jsonl
from tests.paired import labelled_of, pairs_of
from tests.parity.built import random_factors
from tests.peft_warnings import IGNORED
from tests.refused_commands import Said, refused

__all__ = ["refused"]  # a fixture

pytestmark = IGNORED
LAYOUTS = [
    (1, []),
    pytest.param(4, ["parallel.tp=2", "parallel.ep=2"], marks=pytest.mark.slow),
    pytest.param(2, ["parallel.pp=2"], marks=pytest.mark.slow),
    pytest.param(3, [], marks=pytest.mark.slow),
    pytest.param(2, ["parallel.cp=2"], marks=pytest.mark.slow),
]
"""(ranks, layout); three ranks are data parallel, of which one has fewer samples."""
IDS = ["alone", "tp2-ep2", "pp2", "dp3", "cp2"]


def head_of(folder: Path, base: Path, num_scores: int) -> Path:
    """A random adapter of attention and experts with a head of so many scores, as PEFT loads it."""
    shape = replace(model_shape(read_hf_config(base)), num_scores=num_scores)
    adapted, factors = random_factors(LoRAConfig(rank=4, alpha=12.0), base, num_scores=num_scores)
    folder.mkdir()
    write_adapter(folder, adapted, shape, factors, str(base))
    return folder


@torch.no_grad()
def theirs(adapter: Path, base: Path, conversations: list[Any], num_labels: int) -> Tensor:
    """[N, C] float32: scores of conversations, one by one, by transformers and PEFT."""
    # PEFT draws a head before it loads one.
    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    model.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    scores = []
    for messages in conversations:
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        scores.append(model(input_ids=ids["input_ids"]).logits[0])
    return torch.stack(scores)


def judged(request: Request) -> Verdict:
    """A rank function."""
    return judge(plan_of(request))


def written(folder: Path, text: str) -> str:
    """A config of this objective."""
    path = folder / "config.yaml"
    path.write_text(
        "model: {path: ., dtype: float32}\ndata: {train: .}\n"
        f"train: {{steps: 1}}\nobjective: {text}\n"
    )
    return str(path)


@pytest.mark.parametrize(("num_ranks", "layout"), LAYOUTS, ids=IDS)
def test_a_classifier(
    num_ranks: int, layout: list[str], tiny: Path, chats: Path, tmp_path: Path
) -> None:
    adapter = head_of(tmp_path / "adapter", tiny, 3)
    rows = read_jsonl(labelled_of(chats))[:20]
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, rows)
    scores = theirs(adapter, tiny, [row["messages"] for row in rows], 3)
    labels = torch.tensor([row["label"] for row in rows])
    request = Request(
        target=str(adapter), data=str(data), nproc=num_ranks, overrides=layout,
        config=written(tmp_path, "{name: classify, labels: [none, one, two]}"),
    )  # fmt: skip
    right = int((scores.argmax(1) == labels).sum())
    assert 0 < right < 20
    for verdict in run_ranks(judged, num_ranks, request):
        # A base has no score head.
        assert list(verdict.judged) == ["adapter"]
        found = verdict.judged["adapter"]
        # float32 on both sides: cross entropies of about 1, of scores that differ by 1e-5.
        assert found.loss == pytest.approx(F.cross_entropy(scores, labels).item(), abs=3e-5)
        assert found.others == {"accuracy": pytest.approx(right / 20)}
        assert found.count == 20
    plan = plan_of(request)
    lines = text_of(plan, verdict).splitlines()
    assert lines[1].split() == ["loss", "accuracy", "samples"]
    assert lines[2].split() == ["adapter", f"{found.loss:.4f}", f"{right / 20:.1%}", "20"]
    common = int(labels.bincount().argmax())
    share = (labels == common).float().mean().item()
    name = ["none", "one", "two"][common]
    assert lines[3] == f"the commonest label, {name}, is that of {share:.1%} of these samples"
    record = json.loads(json.dumps(record_of(plan, verdict)))
    assert record["adapter"] == {"loss": found.loss, "samples": 20, "accuracy": right / 20}
    assert "base" not in record


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "layout"), LAYOUTS[:3], ids=IDS[:3])
def test_a_reward_model(
    num_ranks: int, layout: list[str], tiny: Path, chats: Path, tmp_path: Path
) -> None:
    adapter = head_of(tmp_path / "adapter", tiny, 1)
    rows = read_jsonl(pairs_of(chats))[:20]
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, rows)
    chosen = theirs(adapter, tiny, [row["chosen"] for row in rows], 1)[:, 0]
    rejected = theirs(adapter, tiny, [row["rejected"] for row in rows], 1)[:, 0]
    margins = torch.tensor([row["margin"] for row in rows])
    request = Request(
        target=str(adapter), data=str(data), nproc=num_ranks, overrides=layout,
        config=written(tmp_path, "{name: reward}"),
    )  # fmt: skip
    right = int((chosen > rejected).sum())
    assert 0 < right < 20
    loss = -F.logsigmoid(chosen - rejected - margins).mean()
    for verdict in run_ranks(judged, num_ranks, request):
        found = verdict.judged["adapter"]
        assert found.loss == pytest.approx(loss.item(), abs=3e-5)
        assert found.others == {
            "accuracy": pytest.approx(right / 20),
            "margin": pytest.approx((chosen - rejected).mean().item(), abs=3e-5),
            "chosen_reward": pytest.approx(chosen.mean().item(), abs=3e-5),
            "rejected_reward": pytest.approx(rejected.mean().item(), abs=3e-5),
        }
        assert list(verdict.judged) == ["adapter"] and found.count == 20
    lines = text_of(plan_of(request), verdict).splitlines()
    assert lines[1].split() == ["loss", "accuracy", "margin", "pairs"]
    assert len(lines) == 3


@pytest.mark.slow
def test_values_have_no_accuracy(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """One label: the squared error of a number."""
    adapter = head_of(tmp_path / "adapter", tiny, 1)
    rows = read_jsonl(labelled_of(chats))[:12]
    rows = [{**row, "label": row["label"] - 0.5} for row in rows]
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, rows)
    scores = theirs(adapter, tiny, [row["messages"] for row in rows], 1)[:, 0]
    values = torch.tensor([row["label"] for row in rows])
    request = Request(
        target=str(adapter), data=str(data),
        config=written(tmp_path, "{name: classify, num_labels: 1}"),
    )  # fmt: skip
    (verdict,) = run_ranks(judged, 1, request)
    found = verdict.judged["adapter"]
    assert found.loss == pytest.approx(F.mse_loss(scores, values).item(), rel=1e-4)
    lines = text_of(plan_of(request), verdict).splitlines()
    assert lines[2].split() == ["adapter", f"{found.loss:.4f}", "none", "12"]
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("num_scores", "words", "message"),
    [
        (3, "", "a classifier or reward model, of which objective.name=sft reads nothing. Say how"
         " its 3 scores are judged: objective.name=classify objective.num_labels=3, with rows of"
         " text and label"),
        (1, "", "objective.num_labels=1, with rows of text and label, or objective.name=reward"),
        (3, "{name: classify, num_labels: 2}",
         "objective.name=classify is judged by a score head of 2, and this one has 3 scores"),
        (3, "{name: reward}", "is judged by a score head of 1, and this one has 3 scores"),
        (0, "{name: reward}", "is judged by a score head of 1, and there is none in it"),
        (3, "{name: classify, num_labels: 3}", "--generate: a score head stands in place of"),
    ],
)  # fmt: skip
def test_refusals(
    num_scores: int, words: str, message: str, tiny: Path, chats: Path, tmp_path: Path,
    refused: Said,
) -> None:  # fmt: skip
    target = head_of(tmp_path / "adapter", tiny, num_scores) if num_scores else tiny
    said = ["eval", str(target), "--data", str(chats)]
    if words:
        said += ["--config", written(tmp_path, words)]
    if "--generate" in message:
        said.append("--generate")
    assert message in refused(*said)
