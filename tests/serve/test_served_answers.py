"""Answers of vLLM itself in an evaluation against those of our own model, token for token."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalora.evaluate import judge, served
from megalora.evaluate.request import Request, plan_of
from megalora.serve.server import Server
from megalora.serve.vllm import Client
from tests.distributed.ranks import run_ranks
from tests.serve.adapters import ATTENTION, EXPERTS, make_adapter

pytestmark = pytest.mark.vllm
type Tokens = dict[str, list[list[int]]]
"""Of every answer, by who gave it."""


class Watched:
    """In place of ``judge_answers``: keeps the tokens that it is given."""

    def __init__(self, module: Any) -> None:
        self.judge = module.judge_answers
        self.tokens: list[list[list[int]]] = []

    def __call__(self, plan: Any, split: Any, questions: Any, tokens: Any, tokenizer: Any) -> Any:
        self.tokens.append(tokens)
        return self.judge(plan, split, questions, tokens, tokenizer)


def ours(request: Request) -> tuple[Tokens, Any]:
    """A rank function."""
    watched = Watched(judge)
    judge.judge_answers = watched
    verdict = judge.judge(plan_of(request))
    return dict(zip(("adapter", "base"), watched.tokens, strict=True)), verdict


def test_greedy_answers_are_those_of_generate(
    client: Client,
    server: Server,
    tiny: Path,
    chats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_adapter(tmp_path / "adapter", tiny, 3, target_modules=[*ATTENTION, *EXPERTS])
    request = Request(
        target=str(folder), base=str(tiny), data=str(chats), generate=True, limit=12,
        rule="last-number", sampling={"max_new_tokens": 10}, overrides=["model.dtype=float32"],
    )  # fmt: skip
    client.load("sums", folder)
    watched = Watched(served)
    monkeypatch.setattr(served, "judge_answers", watched)
    cases = [(request, "sums", *run_ranks(ours, 1, request)[0])]
    # One more end: a token that stands in the middle of the base's first answer. And the adapter
    # is named by its folder.
    base = with_stop_token(tiny, tmp_path / "base", cases[0][2]["base"][0][4])
    ending = replace(request, base=str(base))
    cases.append((ending, str(folder), *run_ranks(ours, 1, ending)[0]))
    for asked, target, found, verdict in cases:
        watched.tokens.clear()
        out = tmp_path / "eval.json"
        of_server = replace(asked, target=target, url=server.url, overrides=[], out=str(out))
        served.evaluate_served(of_server, print)
        assert dict(zip(("adapter", "base"), watched.tokens, strict=True)) == found
        record = json.loads(out.read_text())
        for who, judged in verdict.judged.items():
            assert record[who]["right"] == sum(judged.right)
            assert record[who]["cut"] == judged.num_cut
    whole, ended = (found for _, _, found, _ in cases)
    assert whole["adapter"] != whole["base"]
    assert (len(whole["base"][0]), len(ended["base"][0])) == (10, 5)


def with_stop_token(tiny: Path, base: Path, token: int) -> Path:
    """A copy of the model in which this token ends an answer, too."""
    shutil.copytree(tiny, base)
    path = base / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token_id": [config["eos_token_id"], token]}))
    return base
