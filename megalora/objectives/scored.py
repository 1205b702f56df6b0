"""Learn what a score head says of a sequence: a label, a value, or by how much one answer beats
another.

With z the C scores of a sequence, y its label or value, s the score of an answer, c and r the
chosen and the rejected one of a pair:

    classify   -log softmax(z)[y]               C > 1
               (z - y)^2                        C = 1
    reward     -log sigma(s_c - s_r - margin)   Bradley and Terry 1952, Ouyang et al. 2203.02155
               + centre (s_c + s_r)^2           Eisenstein et al. 2312.09244

as transformers has the first two and TRL's RewardTrainer the others. Terms are divided by the
sequences, or the pairs, of the global batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalora.model.vocab_logits import Reader
from megalora.objectives.objective import Loss, Sequences


@dataclass(frozen=True)
class Classify:
    """Cross entropy of a sequence's label, or the squared error of its value."""

    num_labels: int

    references = ()
    by_sequence = True
    unit = "samples"

    @property
    def want(self) -> dict[str, Reader]:
        """As the protocol says."""
        return {}

    @property
    def metrics(self) -> tuple[str, ...]:
        """The loss, and the share of sequences whose label has the highest score."""
        return ("loss", "accuracy") if self.num_labels > 1 else ("loss",)

    @property
    def evaluated(self) -> tuple[str, ...]:
        """As the protocol says."""
        return self.metrics

    def divisors(self, rows: Iterable[Sequence[int]]) -> dict[str, int]:
        """Sequences, each of which has one place to score."""
        return {"samples": sum(map(sum, rows))}

    def loss(
        self,
        outputs: Mapping[str, Any],
        sequences: Sequences | None,
        divisors: Mapping[str, Tensor],
    ) -> Loss:
        """As the protocol says. A rank has the sequences whose last token is on it."""
        assert sequences is not None, "a label is of a sequence"
        scores_NC = outputs["scores"]
        # Each token in the loss is the end of a sequence, of which it has the label.
        values_N = sequences.values[sequences.numbers]
        # The host knows the number of sequences: nothing waits for the device.
        count = scores_NC.new_full((), len(values_N))
        if self.num_labels == 1:
            terms_N = (scores_NC[:, 0] - values_N).square()
        else:
            terms_N = F.cross_entropy(scores_NC, values_N.long(), reduction="none")
        total = terms_N.sum()
        found = {"loss": (total.detach(), count)}
        if self.num_labels > 1:
            right = scores_NC.argmax(1) == values_N.long()
            # Of equal scores the first counts, as in transformers' argmax.
            found["accuracy"] = (right.to(count.dtype).sum(), count)
        return Loss(total / divisors["samples"], found)


@dataclass(frozen=True)
class Reward:
    """Bradley-Terry: the score of the chosen answer leads that of the rejected one."""

    centre: float = 0.0

    references = ()
    by_sequence = True
    unit = "pairs"
    metrics = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")
    evaluated = metrics

    @property
    def want(self) -> dict[str, Reader]:
        """As the protocol says."""
        return {}

    def divisors(self, rows: Iterable[Sequence[int]]) -> dict[str, int]:
        """Pairs."""
        pairs = 0
        for targets in rows:
            pairs += len(targets[::2])
        return {"pairs": pairs}

    def loss(
        self,
        outputs: Mapping[str, Any],
        sequences: Sequences | None,
        divisors: Mapping[str, Tensor],
    ) -> Loss:
        """As the protocol says; a row holds whole pairs."""
        assert sequences is not None, "a reward compares two sequences"
        # One place of each sequence has a score, so its sum is that score, on every rank that
        # shares the row.
        scores = sequences.sums(outputs["scores"][:, 0])
        # Chosen answers have even numbers.
        chosen = scores[::2]
        rejected = scores[1::2]
        margins = sequences.values[::2].to(scores.dtype)
        terms = -F.logsigmoid(chosen - rejected - margins)
        if self.centre:
            terms = terms + self.centre * (chosen + rejected).square()
        total = terms.sum() / divisors["pairs"]
        return Loss(total, self._metrics(chosen, rejected, terms, sequences))

    @torch.no_grad()
    def _metrics(
        self, chosen: Tensor, rejected: Tensor, terms: Tensor, sequences: Sequences
    ) -> dict[str, tuple[Tensor, Tensor]]:
        values = {
            "loss": terms,
            "accuracy": (chosen > rejected).to(terms.dtype),
            "margin": chosen - rejected,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
        }
        # All ranks that share the row have computed the same.
        count = sequences.once(terms.new_full((), len(terms)))
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, value in values.items():
            found[name] = (sequences.once(value.sum()), count)
        return found
