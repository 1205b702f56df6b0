"""What an adapter should say: stock transformers and PEFT, one token sequence at a time, no
cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def stock_model(base: Path, adapter: Path | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, str(adapter)) if adapter else model).eval()


@torch.no_grad()
def logprobs(model: Any, tokens: Sequence[int]) -> list[float]:
    """Of ``tokens[1:]``."""
    rows = torch.log_softmax(model(torch.tensor([[*tokens]])).logits[0].double(), dim=-1)
    return [rows[i, token].item() for i, token in enumerate(tokens[1:])]


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    tokens = [*prompt]
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
