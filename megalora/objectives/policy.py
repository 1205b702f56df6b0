"""Learn from rewards: GRPO and its relatives over completions that somebody has sampled.

With l the log-probability of a learned token, l_p that of the proximal policy, l_b that of the
engine that sampled it, A its advantage and y the sequence it belongs to:

    r      exp(l - l_p)                          of the token, or of y
    w      exp(l_p - l_b)                        truncated or masked, without a gradient
    loss   sum over tokens of  c (w f(r, A) + kl_coef k)  -  entropy_coef H / tokens

f is one of ``policy_terms.py``, k the estimated divergence from the reference, H the entropy.
c is 1 / tokens (DAPO 2503.14476), 1 / (|y| sequences) (GRPO 2402.03300), 1 / (L sequences)
(Dr. GRPO 2503.20783) or 1 / sequences (LUSPO 2602.05261), all counted over the global batch before
any pass and before anything is dropped or masked. All log-probabilities are of logits divided by
``temperature``. Advantages come with the data: neither a microbatch nor a rank normalises anything.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megalora.config.policy import PolicyConfig
from megalora.model.vocab_logits import Reader, at_temperature, entropy, logprob
from megalora.objectives.objective import Loss, Reference, Sequences, WhichModel
from megalora.objectives.policy_terms import TERMS, Tokens, divergence_of, kept, mismatch_weights

ENGINE = "logprobs"
PROXIMAL = "proximal_logprobs"
ADVANTAGES = "advantages"


@dataclass(frozen=True)
class Policy:
    """One of ``TERMS``, with the terms beside it that the options ask for."""

    options: PolicyConfig = field(default_factory=PolicyConfig)
    reference: WhichModel = "base"
    """What ``kl_coef`` compares with."""

    by_sequence = True
    unit = "tokens"
    metrics = (
        "loss", "ratio", "clipped_share", "kept_share", "mismatch_weight", "kl", "entropy",
        "engine_gap", "engine_k3", "engine_gap_max",
    )  # fmt: skip
    evaluated = ("loss", "ratio", "entropy", "engine_gap")

    @property
    def references(self) -> tuple[Reference, ...]:
        """As the protocol says; one pass where both uses read the same model."""
        models: dict[WhichModel, None] = {}
        if self.options.proximal in ("start", "recompute"):
            models[self.options.proximal] = None
        if self.options.kl_coef:
            models[self.reference] = None
        return tuple(Reference(model, model, by_token=True) for model in models)

    @property
    def want(self) -> dict[str, Reader]:
        """As the protocol says."""
        # The policy is what is sampled from: log p of logits / T.
        temperature = self.options.temperature
        found = {"logprob": at_temperature(logprob, temperature)}
        if self.options.entropy or self.options.entropy_coef:
            found["entropy"] = at_temperature(entropy, temperature)
        return found

    def divisors(self, rows: Iterable[Sequence[int]]) -> dict[str, int]:
        """Learned tokens, and sequences."""
        tokens = 0
        sequences = 0
        for targets in rows:
            tokens += sum(targets)
            sequences += len(targets)
        return {"tokens": tokens, "sequences": sequences}

    def loss(
        self,
        outputs: Mapping[str, Any],
        sequences: Sequences | None,
        divisors: Mapping[str, Tensor],
    ) -> Loss:
        """As the protocol says."""
        assert sequences is not None, "advantages are of sequences"
        options = self.options
        tokens = self._tokens(outputs["logprob"], sequences)
        weights = mismatch_weights(tokens, options)
        keeps = kept(tokens, options)
        terms = TERMS[options.loss](tokens, options, weights)
        # What is dropped still counts in the divisors: else the others would weigh more.
        losses = terms.loss * keeps
        kl = None
        if options.kl_coef:
            kl = divergence_of(tokens, options, sequences.columns[self.reference], terms.ratio)
            losses = losses + options.kl_coef * kl
        total = (self._shares(tokens, divisors) * losses).sum()
        if options.entropy_coef:
            bonus = outputs["entropy"].sum() / divisors["tokens"]
            total = total - options.entropy_coef * bonus
        found = {
            "ratio": terms.ratio, "clipped_share": terms.clipped, "kept_share": keeps,
            "mismatch_weight": weights, "kl": kl, "entropy": outputs.get("entropy"),
        }  # fmt: skip
        return Loss(total, _metrics(tokens, total * divisors["tokens"], found))

    def _tokens(self, logprob: Tensor, sequences: Sequences) -> Tokens:
        """The learned tokens with what they are compared with."""
        columns = sequences.columns
        dtype = logprob.dtype
        engine = columns.get(ENGINE)
        if engine is not None:
            engine = engine.to(dtype)
        proximal = {
            "engine": engine, "data": columns.get(PROXIMAL), "start": columns.get("start"),
            "recompute": columns.get("recompute"), "current": logprob.detach(),
        }[self.options.proximal]  # fmt: skip
        assert proximal is not None, "whoever reads the data has looked for its columns"
        # A token that the engine gave no log-probability has a ratio of 1.
        proximal = proximal.to(dtype)
        proximal = torch.where(proximal.isnan(), logprob.detach(), proximal)
        advantages = columns.get(ADVANTAGES)
        if advantages is None:
            advantages = sequences.values[sequences.numbers]
        return Tokens(logprob, proximal, engine, advantages.to(dtype), sequences)

    def _shares(self, tokens: Tokens, divisors: Mapping[str, Tensor]) -> Tensor:
        """[N], or a scalar: what each token's term is multiplied by."""
        reduction = self.options.reduced_by
        if reduction == "token":
            return 1 / divisors["tokens"]
        if reduction == "sequence":
            return 1 / (tokens.lengths * divisors["sequences"])
        length = self.options.reduction_length if reduction == "constant" else 1
        assert length is not None, "the config demands it"
        return 1 / (divisors["sequences"] * length)


@torch.no_grad()
def _metrics(
    tokens: Tokens, total: Tensor, found: Mapping[str, Tensor | None]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Means over learned tokens, but for the largest gap."""
    # The host knows the number of tokens: nothing waits for the device.
    count = tokens.logprob.new_full((), len(tokens.logprob))
    none = torch.zeros_like(count)
    metrics = {"loss": (total.detach(), count)}
    for name, values in found.items():
        metrics[name] = (none, none) if values is None else (values.sum(), count)
    metrics |= dict.fromkeys(("engine_gap", "engine_k3", "engine_gap_max"), (none, none))
    if tokens.engine is not None:
        # Between the engine and this pass: with rollouts of this very adapter, numerics alone.
        gap = tokens.engine - tokens.logprob
        known = ~gap.isnan()
        gap = gap.nan_to_num(0.0)
        number = known.sum().to(count.dtype)
        metrics["engine_gap"] = (gap.abs().sum(), number)
        metrics["engine_k3"] = ((gap.exp() - gap - 1).sum(), number)
        # A leading zero, or a rank without tokens would have no largest.
        largest = torch.cat([none[None], gap.abs()]).max()
        metrics["engine_gap_max"] = (largest, number.clamp(max=1))
    return metrics
