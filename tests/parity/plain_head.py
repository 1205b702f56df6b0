"""The head with whole logits: Megatron's own output layer and loss, in place of ``project``."""

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megalora.model.head import Outputs, Wanted
from megalora.model.vocab_logits import logprob
from megalora.train import step


def project_plainly(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: Wanted,
    compute_language_model_loss: Any, **_: Any,
) -> Outputs:  # fmt: skip
    """Log-probabilities of the target tokens, after computing those of every token of the row."""
    assert list(context.want.values()) == [logprob], "whole logits give log-probabilities alone"
    logits, _ = output_layer(hidden_states, weight=output_weight)
    length, num_rows, _ = logits.shape
    positions = context.positions
    if positions is None:
        positions = torch.arange(length * num_rows, device=logits.device)
    # Any token will do where none is asked about.
    labels = torch.zeros(num_rows * length, dtype=torch.int64, device=logits.device)
    labels[positions] = context.targets
    losses = compute_language_model_loss(labels.view(num_rows, length), logits)
    return {"logprob": -losses.flatten()[positions]}


def with_whole_logits() -> Any:
    """A context in which training steps hold whole logits."""
    return mock.patch.object(step, "project", project_plainly)
