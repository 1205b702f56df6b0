"""The recipe of a classifier, with fewer steps."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.jsonl import read_jsonl
from tests.parity.runs import records

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_example_beats_the_commonest_label(tmp_path: Path) -> None:
    """In a copy, because it writes below its own folder."""
    (tmp_path / "recipes" / "classify").mkdir(parents=True)
    for name in ("run.sh", "train.yaml"):
        text = (ROOT / "recipes" / "classify" / name).read_text()
        text = text.replace("steps: 40", "steps: 20").replace("eval_every: 10", "eval_every: 20")
        (tmp_path / "recipes" / "classify" / name).write_text(text)
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "recipes/classify/run.sh"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "verified: stock PEFT computes the same model" in done.stdout
    labels = Counter(row["label"] for row in read_jsonl(tmp_path / "runs/classify/questions.jsonl"))
    assert labels.keys() == {"sum", "difference", "product"}
    commonest = max(labels.values()) / labels.total()
    before, after = records(tmp_path / "runs/classify/run", "eval_accuracy")
    assert before < commonest + 0.15 < 0.8 < after
