"""Losses of a score head, in float64 and sequence by sequence: of labels by transformers' own, and
of pairs."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from tests.oracles.training import SCORE, Oracle


def scores(oracle: Oracle, ids: Any, weights: dict[str, Tensor]) -> Tensor:
    """[C] scores of a sequence of tokens: the score head on the last of them."""
    row = torch.tensor(ids).long()[None]
    output = functional_call(
        oracle.model, weights, (row,), {"output_hidden_states": True}, tie_weights=False
    )
    # The last of them comes behind the final norm.
    return output.hidden_states[-1][0, -1].double() @ oracle.factors[SCORE].T


def classify_loss(oracle: Oracle, samples: list) -> Tensor:
    """Mean cross entropy of the samples' labels, by transformers' own loss."""
    merged = oracle.merged()
    rows = [scores(oracle, sample.input_ids[:-1], merged) for sample in samples]
    labels = torch.tensor([int(sample.value) for sample in samples])
    config = SimpleNamespace(
        problem_type="single_label_classification", num_labels=len(oracle.factors[SCORE])
    )
    return ForSequenceClassificationLoss(labels, torch.stack(rows), config)


def reward_loss(oracle: Oracle, samples: list, centre: float) -> Tensor:
    """Bradley-Terry with margins and the centring term, a mean over pairs."""
    merged = oracle.merged()
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        # Each sequence ends in the place that is scored, which is no token of it.
        chosen = scores(oracle, sample.input_ids[: sample.second - 1], merged)[0]
        rejected = scores(oracle, sample.input_ids[sample.second : -1], merged)[0]
        total = total + torch.log1p((rejected - chosen + sample.value).exp())
        total = total + centre * (chosen + rejected) ** 2
    return total / len(samples)
