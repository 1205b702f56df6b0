"""Learn from single answers that are labelled good or bad: KTO (Ethayarajh et al. 2402.01306).

With s the sum of log-probabilities of an answer's target tokens and s_ref that of the reference:

    ratio = s - s_ref
    good     w_g (1 - sigma(b (ratio - z)))
    bad      w_b (1 - sigma(b (z - ratio)))
    z = max(0, mean of s' - s'_ref)

with b = ``beta``. z estimates how far the model has moved from the reference: s' are of sequences
of a prompt of the global batch and the answer to the next one (equation 7 and section 4.1). It is a
number to the gradient. Terms are divided by the samples of the global batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalora.model.vocab_logits import Reader, logprob
from megalora.objectives.objective import Loss, Reference, Sequences, WhichModel

REFERENCE = "reference"
MISMATCHED = "mismatched"
MISMATCHED_REFERENCE = "mismatched reference"


@dataclass(frozen=True)
class KTO:
    beta: float = 0.1
    good_weight: float = 1.0
    bad_weight: float = 1.0
    reference: WhichModel = "base"

    by_sequence = True
    unit = "samples"
    metrics = ("loss", "kl", "good_reward", "bad_reward")
    evaluated = metrics

    @property
    def references(self) -> tuple[Reference, ...]:
        """As the protocol says."""
        return (
            Reference(REFERENCE, self.reference),
            Reference(MISMATCHED_REFERENCE, self.reference, mismatched=True),
            Reference(MISMATCHED, "current", mismatched=True),
        )

    @property
    def want(self) -> dict[str, Reader]:
        """As the protocol says."""
        return {"logprob": logprob}

    def divisors(self, rows: Iterable[Sequence[int]]) -> dict[str, int]:
        """Samples, each of which is one sequence."""
        return {"samples": sum(len(targets) for targets in rows)}

    def loss(
        self,
        outputs: Mapping[str, Any],
        sequences: Sequences | None,
        divisors: Mapping[str, Tensor],
    ) -> Loss:
        """As the protocol says."""
        assert sequences is not None, "an answer is a sequence"
        ratios = sequences.sums(outputs["logprob"]) - sequences.references[REFERENCE]
        moved = sequences.means[MISMATCHED] - sequences.means[MISMATCHED_REFERENCE]
        kl = moved.clamp(min=0)
        good = sequences.values > 0.5
        # 1 - sigma(x) = sigma(-x), which does not cancel where x is large.
        gains = torch.where(good, ratios - kl, kl - ratios)
        is_good = good.to(gains.dtype)
        weights = self.good_weight * is_good + self.bad_weight * (1 - is_good)
        total = (weights * torch.sigmoid(-self.beta * gains)).sum() / divisors["samples"]
        return Loss(total, self._metrics(ratios, good, kl, total, sequences, divisors))

    @torch.no_grad()
    def _metrics(
        self,
        ratios: Tensor,
        good: Tensor,
        kl: Tensor,
        total: Tensor,
        sequences: Sequences,
        divisors: Mapping[str, Tensor],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Rewards are ``beta`` times what an answer's log-probability has gained on the
        reference."""
        # The host knows the number of samples: nothing waits for the device.
        count = total.new_full((), len(ratios))
        rewards = self.beta * ratios
        sums = {
            "loss": (total * divisors["samples"], count),
            "kl": (kl * count, count),
            "good_reward": ((rewards * good).sum(), good.sum().to(total.dtype)),
            "bad_reward": ((rewards * ~good).sum(), (~good).sum().to(total.dtype)),
        }
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        for name, (value, number) in sums.items():
            metrics[name] = (sequences.once(value), sequences.once(number))
        return metrics
