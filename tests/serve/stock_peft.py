"""Compute what an adapter should say with stock transformers and PEFT, one token sequence at a time
and without a cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

ATOL = 5e-5
"""Largest error of a log-probability: float32 through 4 layers errs by some 2^-24 * 100 of the
largest logit, 5, and vLLM sums in other orders."""


def stock_model(base: Path, adapter: Path | None = None) -> Any:
    """The base, or the base with PEFT's adapter beside it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval()


@torch.no_grad()
def logprobs(model: Any, tokens: Sequence[int]) -> list[float]:
    """Log-probability of each of ``tokens[1:]``, given those before it."""
    # [tokens, vocabulary], in float64 so that the sum over the vocabulary adds no error.
    rows = torch.log_softmax(model(torch.tensor([[*tokens]])).logits[0].double(), dim=-1)
    # Row i predicts token i + 1.
    following = torch.tensor(tokens[1:], dtype=torch.int64)
    return rows[:-1].gather(1, following[:, None])[:, 0].tolist()


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The most probable ``count`` tokens after a prompt, one after the other."""
    tokens = [*prompt]
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def assert_close(found: list[float], expected: list[float]) -> None:
    """Compare log-probabilities of an engine with those of this file."""
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=ATOL)
