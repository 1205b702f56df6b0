"""The head with whole logits: Megatron's own output layer and loss, in place of ``project``."""

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megalora.model.head import Outputs, Wanted
from megalora.model.vocab_logits import VocabLogits, logprob
from megalora.train import schedule


def project_plainly(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: Wanted,
    compute_language_model_loss: Any, **_: Any,
) -> Outputs:  # fmt: skip
    """Log-probabilities of the target tokens, after computing those of every token of the row; a
    teacher's distance of whole logits too."""
    logits, _ = output_layer(hidden_states, weight=output_weight)
    length, num_rows, _ = logits.shape
    positions = context.positions
    if positions is None:
        positions = torch.arange(length * num_rows, device=logits.device)
    # Any token will do where none is asked about.
    labels = torch.zeros(num_rows * length, dtype=torch.int64, device=logits.device)
    labels[positions] = context.targets
    # A copy: Megatron's loss overwrites the logits. A microbatch is one row of tokens.
    chosen = logits.transpose(0, 1).flatten(0, 1)[positions].float()
    losses = compute_language_model_loss(labels.view(num_rows, length), logits)
    found: Outputs = {"logprob": -losses.flatten()[positions]}
    group = getattr(output_layer, "base", output_layer).tp_group
    whole = VocabLogits(chosen, context.targets, slice(0, len(positions)), group)
    for name, reader in context.want.items():
        if reader is not logprob:
            result: Any = reader(whole)
            # Every rank has it, and one t-th of its gradient is each one's.
            found[name] = result.detach() + (result - result.detach()) / group.size()
    return found


def with_whole_logits() -> Any:
    """A context in which training steps hold whole logits."""
    return mock.patch.object(schedule, "project", project_plainly)
