"""Learn from pairs of a preferred and a rejected answer: DPO, IPO, hinge, SimPO, ORPO.

Sequences 2k and 2k + 1 of a row are the two of a pair. With s the sum of log-probabilities of an
answer's n target tokens, s_ref that of the reference, c and r the chosen and the rejected answer:

    ratio = s - s_ref        delta = ratio_c - ratio_r        mean = s / n

    sigmoid  -(1 - e) log sigma(b delta) - e log sigma(-b delta)        Rafailov et al. 2305.18290
    robust   the same with +e for -e, over (1 - 2 e)                    Chowdhury et al. 2403.00409
    hinge    max(0, 1 - b delta)                                        Zhao et al. 2305.10425
    ipo      (ratio_c / n_c - ratio_r / n_r - 1 / (2 b))^2              Azar et al. 2310.12036
    simpo    -(1 - e) log sigma(d) - e log sigma(-d),                   Meng et al. 2405.14734
             d = b (mean_c - mean_r) - margin
    orpo     -b log sigma(odds_c - odds_r),                             Hong et al. 2403.07691
             odds = mean - log(1 - exp(mean))

with b = ``beta``, which ORPO's paper calls lambda, and e = ``label_smoothing``. ``sft_weight`` adds
the cross entropy of the chosen answers, per target token. Terms are divided by the pairs and by the
chosen target tokens of the global batch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalora.model.vocab_logits import Reader, logprob
from megalora.objectives.objective import Loss, Reference, Sequences, WhichModel

REFERENCE = "reference"
SURE = 1e-9
"""Mean log-probability up to which ORPO tells answers apart; sums are float64."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """What is known of P pairs, ``[P]`` each."""

    chosen: Tensor
    """Sum of log-probabilities of the chosen answer's target tokens."""
    rejected: Tensor
    chosen_ratio: Tensor
    """The same less what the reference gives; the sum itself where there is no reference."""
    rejected_ratio: Tensor
    chosen_targets: Tensor
    """Number of target tokens of the chosen answer."""
    rejected_targets: Tensor


@dataclass(frozen=True)
class Preference:
    """One of ``KINDS``."""

    kind: str
    beta: float = 0.1
    label_smoothing: float = 0.0
    """Share of pairs that are taken to be labelled the wrong way round."""
    sft_weight: float = 0.0
    margin: float = 0.0
    """Of SimPO: by how much the chosen answer is to lead, in ``beta`` times mean
    log-probabilities."""
    reference: WhichModel = "base"

    by_sequence = True
    unit = "pairs"
    metrics = (
        "loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_cross_entropy",
    )  # fmt: skip
    evaluated = metrics

    @property
    def references(self) -> tuple[Reference, ...]:
        """As the protocol says."""
        if self.kind not in WITH_REFERENCE:
            return ()
        return (Reference(REFERENCE, self.reference),)

    @property
    def want(self) -> dict[str, Reader]:
        """As the protocol says."""
        return {"logprob": logprob}

    def divisors(self, rows: Iterable[Sequence[int]]) -> dict[str, int]:
        """Pairs, and target tokens of chosen answers."""
        pairs = 0
        tokens = 0
        for targets in rows:
            pairs += len(targets[::2])
            tokens += sum(targets[::2])
        return {"pairs": pairs, "chosen_tokens": tokens}

    def loss(
        self,
        outputs: Mapping[str, Any],
        sequences: Sequences | None,
        divisors: Mapping[str, Tensor],
    ) -> Loss:
        """As the protocol says; a row holds whole pairs."""
        assert sequences is not None, "a preference is between sequences"
        sums = sequences.sums(outputs["logprob"])
        ratios = sums
        if self.references:
            ratios = sums - sequences.references[REFERENCE]
        # Chosen answers have even numbers.
        targets = sequences.targets.to(sums.dtype)
        pairs = Pairs(sums[::2], sums[1::2], ratios[::2], ratios[1::2], targets[::2], targets[1::2])
        total = KINDS[self.kind](pairs, self).sum() / divisors["pairs"]
        if self.sft_weight:
            total = total - self.sft_weight * pairs.chosen.sum() / divisors["chosen_tokens"]
        return Loss(total, self._metrics(pairs, total, sequences, divisors))

    @torch.no_grad()
    def _metrics(
        self,
        pairs: Pairs,
        total: Tensor,
        sequences: Sequences,
        divisors: Mapping[str, Tensor],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Rewards are implicit: ``beta`` times what an answer's log-probability has gained on the
        reference, and without a reference ``beta`` times its mean log-probability."""
        chosen = self.beta * pairs.chosen_ratio
        rejected = self.beta * pairs.rejected_ratio
        if not self.references:
            chosen = chosen / pairs.chosen_targets
            rejected = rejected / pairs.rejected_targets
        # The host knows the number of pairs: nothing waits for the device.
        count = total.new_full((), len(chosen))
        tokens = pairs.chosen_targets.sum()
        sums = {
            # The whole loss, whose terms have two divisors, in the unit of its count.
            "loss": (total * divisors["pairs"], count),
            "accuracy": ((chosen > rejected).sum().to(total.dtype), count),
            "margin": ((chosen - rejected).sum(), count),
            "chosen_reward": (chosen.sum(), count),
            "rejected_reward": (rejected.sum(), count),
            "chosen_cross_entropy": (-pairs.chosen.sum(), tokens),
        }
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        for name, (value, number) in sums.items():
            metrics[name] = (sequences.once(value), sequences.once(number))
        return metrics


def _mixed(difference: Tensor, smoothing: float) -> Tensor:
    """-log sigma of a difference, and of its negative for the share of wrong labels."""
    right = -F.logsigmoid(difference)
    if not smoothing:
        return right
    return (1 - smoothing) * right - smoothing * F.logsigmoid(-difference)


def _delta(pairs: Pairs, options: Preference) -> Tensor:
    return options.beta * (pairs.chosen_ratio - pairs.rejected_ratio)


def sigmoid(pairs: Pairs, options: Preference) -> Tensor:
    """[P]"""
    return _mixed(_delta(pairs, options), options.label_smoothing)


def robust(pairs: Pairs, options: Preference) -> Tensor:
    """[P]"""
    delta = _delta(pairs, options)
    smoothing = options.label_smoothing
    unbiased = (1 - smoothing) * -F.logsigmoid(delta) + smoothing * F.logsigmoid(-delta)
    return unbiased / (1 - 2 * smoothing)


def hinge(pairs: Pairs, options: Preference) -> Tensor:
    """[P]"""
    return torch.relu(1 - _delta(pairs, options))


def ipo(pairs: Pairs, options: Preference) -> Tensor:
    """[P]"""
    chosen = pairs.chosen_ratio / pairs.chosen_targets
    rejected = pairs.rejected_ratio / pairs.rejected_targets
    return (chosen - rejected - 1 / (2 * options.beta)).square()


def simpo(pairs: Pairs, options: Preference) -> Tensor:
    """[P]"""
    chosen = pairs.chosen / pairs.chosen_targets
    rejected = pairs.rejected / pairs.rejected_targets
    difference = options.beta * (chosen - rejected) - options.margin
    return _mixed(difference, options.label_smoothing)


def orpo(pairs: Pairs, options: Preference) -> Tensor:
    """[P]"""
    chosen = _log_odds(pairs.chosen / pairs.chosen_targets)
    rejected = _log_odds(pairs.rejected / pairs.rejected_targets)
    return -options.beta * F.logsigmoid(chosen - rejected)


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean)."""
    # An answer of which the model is certain has infinite odds, and no gradient. 1 - exp(mean)
    # would cancel where it is nearly so.
    mean = mean.clamp(max=-SURE)
    return mean - torch.log(-torch.expm1(mean))


KINDS: dict[str, Callable[[Pairs, Preference], Tensor]] = {
    "sigmoid": sigmoid, "robust": robust, "hinge": hinge, "ipo": ipo, "simpo": simpo, "orpo": orpo,
}  # fmt: skip
WITH_REFERENCE = ("sigmoid", "robust", "hinge", "ipo")
"""Kinds that compare with a reference."""
