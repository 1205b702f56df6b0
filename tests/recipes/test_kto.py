"""The recipe of labelled answers, with fewer steps."""

from pathlib import Path

import pytest

from tests.jsonl import read_jsonl
from tests.parity.runs import records
from tests.recipes.run import run_recipe


@pytest.mark.long
def test_the_example_tells_good_from_bad_held_out_answers(tmp_path: Path) -> None:
    shorter = {"steps: 30": "steps: 8", "eval_every: 10": "eval_every: 4"}
    printed = run_recipe("kto", tmp_path, shorter)
    assert "verified: stock PEFT computes the same model" in printed
    labels = [row["label"] for row in read_jsonl(tmp_path / "runs/kto/rated.jsonl")]
    assert labels.count(True) == labels.count(False) == 200
    good = records(tmp_path / "runs/kto/run", "eval_good_reward")
    bad = records(tmp_path / "runs/kto/run", "eval_bad_reward")
    margins = [g - b for g, b in zip(good, bad, strict=True)]
    # A fresh adapter is the base, and each evaluation sees the two farther apart.
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert margins[0] < margins[1] < margins[2] and margins[2] > 0.3
