"""Make the base that the run begins with: a tiny random model, trained whole on sums (plain
transformers) until about half of what it samples is right.

    python -m recipes.sums.base FOLDER        # FOLDER/base and FOLDER/prompts.jsonl
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalora.progress_bar import no_progress_bar
from megalora.tiny import make_tiny

STEPS = 80
"""After 200 steps 98 % of the answers are right, and rewards have little left to teach."""
WARMUP = 20
BATCH = 32
LR = 3e-3
IGNORED = -100
"""Label of a token without a loss."""


def main(folder: Path, steps: int = STEPS) -> None:
    random_model = folder / "random"
    make_tiny(random_model)
    rows = sums()
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "prompts.jsonl").write_text("".join(lines))
    with no_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(random_model)
        loss = train_whole(model, tokenizer, rows, steps)
        for made in (model, tokenizer):
            made.save_pretrained(folder / "base")
    print(f"{folder / 'base'}: trained whole for {steps} steps of {BATCH} sums, loss {loss:.3f}")


def sums() -> list[dict[str, str]]:
    """All questions on two digits, and their answers."""
    rows = []
    for a in range(10):
        for b in range(10):
            rows.append({"prompt": f"What is {a} + {b}?", "completion": f"{a} + {b} = {a + b}"})
    return rows


def train_whole(model: Any, tokenizer: Any, rows: list[dict[str, str]], steps: int) -> float:
    """Train every weight on answers; returns the last step's loss."""
    drawn = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP)
    )
    loss = torch.zeros(())
    for _ in range(steps):
        tokens, labels = batch_of(drawn.choices(rows, k=BATCH), tokenizer)
        # Padding stands behind the tokens, where causal attention does not see it.
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return loss.item()


def batch_of(rows: list[dict[str, str]], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """``[rows, longest]`` tokens and labels; only answers have a loss."""
    width = 0
    encoded = []
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        encoded.append((prompt, [*answer, tokenizer.eos_token_id]))
    width = max(len(prompt) + len(answer) for prompt, answer in encoded)
    tokens = torch.full((len(rows), width), tokenizer.eos_token_id)
    labels = torch.full((len(rows), width), IGNORED)
    for place, (prompt, answer) in enumerate(encoded):
        end = len(prompt) + len(answer)
        tokens[place, :end] = torch.tensor([*prompt, *answer])
        labels[place, len(prompt) : end] = torch.tensor(answer)
    return tokens, labels


if __name__ == "__main__":
    main(Path(sys.argv[1]))
