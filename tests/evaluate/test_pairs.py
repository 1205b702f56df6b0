"""``megalora eval`` of a run that learned from pairs: its held-out pairs, and their margin."""

import json
from pathlib import Path

import pytest

from megalora.config import ObjectiveConfig
from megalora.evaluate.judge import judge
from megalora.evaluate.report import record_of, text_of
from megalora.evaluate.request import Request, plan_of
from megalora.evaluate.verdict import Verdict
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.jsonl import read_jsonl, write_jsonl
from tests.paired import pairs_of
from tests.parity.runs import make_config, records


def judged(request: Request) -> Verdict:
    """A rank function."""
    return judge(plan_of(request))


def test_the_run_s_held_out_pairs(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """Rows that could be read as conversations, too, of which training leaves one pair out."""
    rows = read_jsonl(pairs_of(chats))[:24]
    rows[5]["rejected"] = rows[5]["chosen"]
    pairs = tmp_path / "pairs.jsonl"
    write_jsonl(pairs, [{**row, "messages": row["chosen"]} for row in rows])
    objective = ObjectiveConfig(name="dpo", beta=0.3)
    config = make_config(
        tiny, pairs, tmp_path / "run", {}, objective=objective, eval=6, steps=3, lr=2e-3
    )
    run_ranks(train, 1, config)
    (verdict,) = run_ranks(judged, 1, Request(target=str(tmp_path / "run")))
    found = verdict.judged["adapter"]
    # What the run itself has said of the same pairs at its end.
    assert found.loss == pytest.approx(records(tmp_path / "run", "eval_loss")[-1], rel=1e-5)
    for name, value in found.others.items():
        own = records(tmp_path / "run", f"eval_{name}")[-1]
        assert value == pytest.approx(own, rel=1e-4, abs=1e-5), name
    assert found.count == 6 and found.others["margin"] > 0.01
    base = verdict.judged["base"]
    assert base.loss == pytest.approx(0.693147, abs=1e-5)
    assert base.others["margin"] == pytest.approx(0, abs=1e-5)
    plan = plan_of(Request(target=str(tmp_path / "run")))
    header, first, second = text_of(plan, verdict).splitlines()[1:4]
    assert header.split() == ["loss", "accuracy", "margin", "pairs"]
    assert first.split()[0] == "base" and second.split()[-1] == "6"
    record = json.loads(json.dumps(record_of(plan, verdict)))
    assert record["adapter"]["preference"] == found.others
    assert record["adapter"]["pairs"] == 6
