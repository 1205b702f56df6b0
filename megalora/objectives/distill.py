"""Learn from a teacher's next-token distributions: distillation, with or without the tokens that
came.

    loss = T^2 D(p, q) + w (lse - l_y)        per target token

with D one of the distances of ``model/divergence.py`` between teacher and student at temperature T,
l the student's logits, y the token that came and w = ``sft_weight``. T^2 keeps the gradient's size,
which falls with 1 / T^2, in proportion to that of the second term (Hinton et al. 1503.02531,
section 2); TRL's ``generalized_jsd_loss`` leaves it out. The sum is divided by the number of target
tokens of the global batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megalora.model.divergence import Divergence
from megalora.model.vocab_logits import Reader, logprob
from megalora.objectives.objective import Loss, Sequences

DISTANCE = "distance from the teacher"
"""Name of what the training step's teacher adds to ``want``."""


@dataclass(frozen=True)
class Distill:
    """The distance from a teacher, which the training step has."""

    divergence: Divergence = field(default_factory=Divergence)
    sft_weight: float = 0.0

    references = ()
    by_sequence = False
    unit = "target tokens"
    metrics = ("loss", "divergence", "cross_entropy")
    evaluated = metrics

    @property
    def want(self) -> dict[str, Reader]:
        """As the protocol says, without ``DISTANCE``, which depends on the microbatch."""
        return {"logprob": logprob}

    def divisors(self, rows: Iterable[Sequence[int]]) -> dict[str, int]:
        """Target tokens."""
        return {"tokens": sum(map(sum, rows))}

    def loss(
        self,
        outputs: Mapping[str, Any],
        sequences: Sequences | None,
        divisors: Mapping[str, Tensor],
    ) -> Loss:
        """As the protocol says. ``divergence`` is reported in nats, without T^2."""
        distance_N = outputs[DISTANCE]
        cross_entropy_N = -outputs["logprob"]
        terms_N = self.divergence.temperature**2 * distance_N
        # Without a weight the cross entropy is only reported.
        if self.sft_weight:
            terms_N = terms_N + self.sft_weight * cross_entropy_N
        total = terms_N.sum()
        count = distance_N.new_full((), len(distance_N))
        metrics = {
            "loss": (total.detach(), count),
            "divergence": (distance_N.detach().sum(), count),
            "cross_entropy": (cross_entropy_N.detach().sum(), count),
        }
        return Loss(total / divisors["tokens"], metrics)
