"""Build our model on the ranks of a world, generate with it, and let transformers and stock PEFT do
the same."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from megalora.generate.generate import generate
from megalora.generate.options import Sampling
from megalora.generate.sequences import Answer
from tests.parity.built import built
from tests.parity.runs import make_config
from tests.serve.adapters import tokens_of

LENGTHS = (9, 1, 14, 5, 3)
"""Prompts of one batch, a single token among them."""


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    return [tokens_of(seed, length) for seed, length in enumerate(lengths, 1)]


def our_answers(
    base: Path,
    chats: Path,
    out: Path,
    parallel: dict[str, int],
    calls: list[dict[str, Any]],
    weights: Path | None = None,
    lora: Any = None,
) -> list[list[Answer]]:
    """A rank function: the answers of each call of ``generate``."""
    found = []
    with built(make_config(base, chats, out, parallel, lora=lora), weights) as run:
        for call in calls:
            options = dict(call)
            asked = options.pop("prompts", prompts())
            sampling = Sampling(**options.pop("sampling"))
            found.append(generate(run.model, asked, sampling, **options))
    return found


@torch.no_grad()
def their_answers(
    base: Path, asked: list[list[int]], max_new_tokens: int, adapter: Path | None = None
) -> list[tuple[list[int], list[float]]]:
    """(tokens, log-probabilities) of transformers' own greedy ``generate``, prompt by prompt, and
    of one pass over prompt and answer without a cache."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    found = []
    for tokens in asked:
        text = model.generate(
            input_ids=torch.tensor([tokens]), max_new_tokens=max_new_tokens, do_sample=False
        )
        # Position p predicts token p + 1.
        logprobs = F.log_softmax(model(text).logits[0, :-1], -1)
        answer = text[0, len(tokens) :]
        of_answer = logprobs[len(tokens) - 1 :].gather(1, answer[:, None])[:, 0]
        found.append((answer.tolist(), of_answer.tolist()))
    return found
