"""Supervised fine-tuning: cross entropy over target tokens, with z-loss and label smoothing.

    loss = (1 - s) * (lse - l_y) + s * (lse - mean_v l_v) + z * lse^2        per target token

with l the logits of a place, y the token that came and lse = log sum_v exp l_v. The second term is
the mean over the vocabulary of -log p, as in torch's ``cross_entropy(label_smoothing=s)`` (Szegedy
et al. 2016, section 7). The third is PaLM's z-loss (Chowdhery et al. 2022, section 5), which keeps
the normaliser near 1. The sum is divided by the number of target tokens of the global batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megalora.model.vocab_logits import Reader, logprob, logsumexp, mean_logit
from megalora.objectives.objective import Loss, Sequences


@dataclass(frozen=True)
class SFT:
    """The two options are factors of their terms; at 0 a term costs nothing."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0

    references = ()
    by_sequence = False
    unit = "target tokens"

    @property
    def want(self) -> dict[str, Reader]:
        """As the protocol says."""
        readers: dict[str, Reader] = {"logprob": logprob}
        if self.z_loss or self.label_smoothing:
            readers["logsumexp"] = logsumexp
        if self.label_smoothing:
            readers["mean_logit"] = mean_logit
        return readers

    @property
    def metrics(self) -> tuple[str, ...]:
        """The loss; where it is not the cross entropy, that too, and what z-loss adds."""
        if self.z_loss:
            return "loss", "cross_entropy", "z_loss"
        return ("loss", "cross_entropy") if self.label_smoothing else ("loss",)

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The cross entropy: evaluations are compared with each other and with other stacks, so no
        option changes them."""
        return ("cross_entropy",) if "cross_entropy" in self.metrics else ("loss",)

    def divisors(self, rows: Iterable[Sequence[int]]) -> dict[str, int]:
        """Target tokens."""
        return {"tokens": sum(map(sum, rows))}

    def loss(
        self,
        outputs: Mapping[str, Any],
        sequences: Sequences | None,
        divisors: Mapping[str, Tensor],
    ) -> Loss:
        """As the protocol says."""
        cross_entropy_N = -outputs["logprob"]
        # Sums in float32: a bfloat16 sum of thousands of losses would round at every addition.
        count = cross_entropy_N.new_full((), len(cross_entropy_N))
        terms_N = cross_entropy_N
        sums = {"cross_entropy": cross_entropy_N.detach().sum()}
        if self.label_smoothing:
            smooth_N = outputs["logsumexp"] - outputs["mean_logit"]
            terms_N = terms_N + self.label_smoothing * (smooth_N - cross_entropy_N)
        if self.z_loss:
            z_N = self.z_loss * outputs["logsumexp"].square()
            terms_N = terms_N + z_N
            sums["z_loss"] = z_N.detach().sum()
        total = terms_N.sum()
        sums["loss"] = total.detach()
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        for name, value in sums.items():
            metrics[name] = (value, count)
        return Loss(total / divisors["tokens"], metrics)
