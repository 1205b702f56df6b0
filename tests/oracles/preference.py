"""Losses of preferences, in float64 and sequence by sequence: DPO over pairs, KTO over answers that
are good or bad."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from tests.oracles.training import Oracle


def sequence_logprobs(oracle: Oracle, sample: Any, weights: dict[str, Tensor]) -> list[Tensor]:
    """Log-probabilities of the target tokens of each of a sample's sequences."""
    # A pair is two sequences, one behind the other.
    cut = sample.second or len(sample.input_ids)
    found = []
    for part in (slice(cut), slice(cut, None)):
        ids = torch.tensor(sample.input_ids[part]).long()
        mask = torch.tensor(sample.loss_mask[part])
        if not len(ids):
            continue
        output = functional_call(oracle.model, weights, (ids[None, :-1],), tie_weights=False)
        logprobs = output.logits[0].double().log_softmax(-1)
        # Position i predicts token i + 1, and counts where that token is a target.
        own = logprobs.gather(1, ids[1:, None])[:, 0]
        found.append(own[mask[1:]])
    return found


def dpo_loss(oracle: Oracle, samples: list, beta: float) -> Tensor:
    """DPO's loss, a mean over pairs (Rafailov et al. 2023)."""
    merged = oracle.merged()
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        chosen, rejected = [part.sum() for part in sequence_logprobs(oracle, sample, merged)]
        with torch.no_grad():
            reference = [part.sum() for part in sequence_logprobs(oracle, sample, oracle.reference)]
        delta = (chosen - reference[0]) - (rejected - reference[1])
        total = total - F.logsigmoid(beta * delta)
    return total / len(samples)


def gain(oracle: Oracle, sample: Any, weights: dict[str, Tensor]) -> Tensor:
    """By how much a sequence is likelier than in the reference; log."""
    (logprobs,) = sequence_logprobs(oracle, sample, weights)
    with torch.no_grad():
        (reference,) = sequence_logprobs(oracle, sample, oracle.reference)
    return logprobs.sum() - reference.sum()


def kto_loss(
    oracle: Oracle, samples: list, beta: float, good_weight: float = 1.0, bad_weight: float = 1.0
) -> Tensor:
    """KTO's loss, a mean over answers that are good or bad (Ethayarajh et al. 2024)."""
    merged = oracle.merged()
    moved = 0.0
    with torch.no_grad():
        for place, sample in enumerate(samples):
            other = samples[(place + 1) % len(samples)]
            moved += gain(oracle, mismatched(sample, other), merged).item() / len(samples)
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        lead = gain(oracle, sample, merged) - max(moved, 0.0)
        if sample.value == 1:
            total = total + good_weight * (1 - torch.sigmoid(beta * lead))
        else:
            total = total + bad_weight * (1 - torch.sigmoid(-beta * lead))
    return total / len(samples)


def mismatched(sample: Any, other: Any) -> Any:
    """The prompt of one sample and the answer of another, which begins with what is learned."""
    prompt = sample.input_ids[: first_learned(sample)].tolist()
    begin = first_learned(other)
    answer = other.input_ids[begin:].tolist()
    learned = [False] * len(prompt) + other.loss_mask[begin:].tolist()
    return SimpleNamespace(input_ids=prompt + answer, loss_mask=learned, second=0)


def first_learned(sample: Any) -> int:
    """Place of the first token in the loss."""
    return next(place for place, learned in enumerate(sample.loss_mask) if place and learned)
