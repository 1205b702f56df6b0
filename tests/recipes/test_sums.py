"""The recipe that learns sums by vLLM: its base, and its curve. The run itself is in
``tests/serve/test_quickstart_rl.py``."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.sums import base, curve
from tests.jsonl import read_jsonl

ROOT = Path(__file__).parents[2]


def test_the_script_names_what_there_is() -> None:
    script = (ROOT / "recipes/sums/run.sh").read_text()
    assert subprocess.run(["bash", "-n", ROOT / "recipes/sums/run.sh"], check=False).returncode == 0
    modules = re.findall(r"python -m ([\w.]+)", script)
    assert modules == ["recipes.sums.base", "recipes.sums.curve"]
    assert "bash recipes/sums/run.sh" in (ROOT / "Makefile").read_text()
    # Folders of the script and of the config are the same.
    config = (ROOT / "recipes/sums/train.yaml").read_text()
    assert set(re.findall(r"runs/sums/(\S+?)[,}\s]", config)) == {"base", "prompts.jsonl", "run"}


def test_the_curve_says_where_a_run_began_and_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"step": 0, "eval_loss": 1.0})]
    for step, reward in enumerate([0.5, 0.4, 0.6, 0.5, 0.5, 0.0, 0.7, 0.8, 0.9, 0.8, 0.8]):
        lines.append(json.dumps({"step": step + 1, "reward": reward}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    curve.main(tmp_path)
    assert "0.50 in the first 5 steps, 0.80 in the last 5\n" in capsys.readouterr().out
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_base_is_right_half_of_the_time(tmp_path: Path) -> None:
    base.main(tmp_path)
    rows = read_jsonl(tmp_path / "prompts.jsonl")
    assert len(rows) == 100
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    prompts = []
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}]
        prompts.append(
            tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        )
    # Two digits have one length: no prompt needs padding.
    tokens = torch.tensor(prompts)
    torch.manual_seed(0)
    sampled = model.generate(
        tokens.repeat_interleave(4, 0), do_sample=True, top_k=0, max_new_tokens=12
    )
    right = 0
    for place, answer in enumerate(sampled[:, tokens.shape[1] :]):
        text = tokenizer.decode(answer, skip_special_tokens=True)
        right += text == rows[place // 4]["completion"]
    # Neither hopeless nor solved: groups of eight have both.
    assert 0.35 < right / len(sampled) < 0.7
