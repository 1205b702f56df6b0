"""A whole run whose completions are conversations, judged by functions of the user's."""

import subprocess
import sys
from pathlib import Path

import pytest

from megalora.data.tokenizer import load_tokenizer
from megalora.tiny import make_tiny
from tests.jsonl import read_jsonl, write_jsonl

CONFIG = """
model: {path: base, dtype: float32}
lora: {rank: 8, alpha: 16}
objective: {name: grpo}
data: {train: sums.jsonl, max_length: 160}
rl:
  rewards: {"mine.py:digits": 1.0}
  environment: "mine.py:rollout"
  group_size: 4
  max_new_tokens: 40
train: {steps: 3, global_batch_size: 16, micro_batch_tokens: 512, lr: 5.0e-3}
checkpoint: {dir: run}
"""
MINE = """
async def rollout(client, row):
    for turn in range(3):
        reply = await client.generate()
        if not reply.ended:
            break
        client.add(f"<result>{turn}</result>")
    return {"turns": 0.01 * turn}

def digits(prompt, completion, row):
    return sum(char.isdigit() for char in completion) / max(len(completion), 1)
"""


@pytest.mark.slow
def test_training_reads_what_the_engine_sampled(tmp_path: Path) -> None:
    """Random completions, whose text becomes other tokens: log-probabilities of engine and model
    are still those of the same tokens."""
    make_tiny(tmp_path / "base")
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "mine.py").write_text(MINE)
    rows = [{"prompt": f"What is {number} + 2?", "completion": "2"} for number in range(32)]
    write_jsonl(tmp_path / "sums.jsonl", rows)
    subprocess.run([sys.executable, "-m", "megalora", "rl", "run.yaml"], cwd=tmp_path, check=True)
    run = tmp_path / "run"
    gaps = [record["engine_gap_max"] for record in read_jsonl(run / "metrics.jsonl")]
    assert len(gaps) == 3 and max(gaps) < 1e-5
    tokenizer = load_tokenizer(tmp_path / "base")
    num_given = 0
    num_others = 0
    for path in (run / "rollouts").glob("step_*.jsonl"):
        for record in read_jsonl(path):
            ids = record["completion_ids"]
            for logprob, learned in zip(record["logprobs"], record["mask"], strict=True):
                assert (logprob is not None) == bool(learned)
            num_given += record["mask"].count(0)
            num_others += tokenizer.encode(tokenizer.decode(ids)) != ids
            rewards = record["rewards"]
            total = rewards["turns"] + rewards["mine.py:digits"]
            assert record["reward"] == pytest.approx(total, abs=1e-12)
    # Without either the test would show nothing.
    assert num_given > 10 and num_others > 10
