"""The recipe of a classifier, with fewer steps."""

from collections import Counter
from pathlib import Path

import pytest

from tests.jsonl import read_jsonl
from tests.parity.runs import records
from tests.recipes.run import run_recipe


@pytest.mark.slow
def test_the_example_beats_the_commonest_label(tmp_path: Path) -> None:
    """In a copy, because it writes below its own folder."""
    shorter = {"steps: 40": "steps: 20", "eval_every: 10": "eval_every: 20"}
    printed = run_recipe("classify", tmp_path, shorter)
    assert "verified: stock PEFT computes the same model" in printed
    labels = Counter(row["label"] for row in read_jsonl(tmp_path / "runs/classify/questions.jsonl"))
    assert labels.keys() == {"sum", "difference", "product"}
    commonest = max(labels.values()) / labels.total()
    before, after = records(tmp_path / "runs/classify/run", "eval_accuracy")
    assert before < commonest + 0.15 < 0.8 < after
