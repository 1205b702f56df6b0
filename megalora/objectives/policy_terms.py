"""The terms of a policy gradient, one for each learned token: surrogate losses, weights for what
lies between engine and trainer, what is dropped, divergence from a reference.

With r a ratio, A an advantage, e- and e+ the clips:

    clip    -min(r A, clip(r, 1 - e-, 1 + e+) A)        Schulman et al. 1707.06347
            A < 0: at most -c A                         dual clip, 1912.09729
    gspo    the same, r = exp(mean over y of l - l_p)   2507.18071
    gmpo    -A exp(mean over y of what of l - l_p       2507.20673
            is left by clips at -e- and e+)
    cispo   -sg[min(r, cap)] A l                        2506.13585
    sapo    -A sigma(t (r - 1)) 4 / t                   2511.20347
    vespo   -sg[phi(w_y)] A l                           2602.10693
            phi(w) = exp(b) w^k exp(-b w), w_y the product over y
    plain   -r A

sg[] has no gradient. Sums over y go over all ranks that share a row.

Legend: N learned tokens of a microbatch on this rank, Q sequences in it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megalora.config.policy import PolicyConfig
from megalora.objectives.objective import Sequences

_FARTHEST = 20.0
"""Of VESPO: no log-ratio counts as larger, as in TRL; exp(20) is 5e8."""
_LEAST = math.log(1e-8)


@dataclass(frozen=True, eq=False)
class Tokens:
    """[N] learned tokens and what they are compared with; only ``logprob`` has a gradient."""

    logprob: Tensor
    proximal: Tensor
    engine: Tensor | None
    """NaN where the engine gave none; None where the data has none."""
    advantages: Tensor
    sequences: Sequences

    @cached_property
    def lengths(self) -> Tensor:
        """[N] learned tokens of each token's sequence, those of other ranks included."""
        # A sequence without a learned token has no token here: nothing is divided by 0.
        return self.sequences.targets[self.sequences.numbers].to(self.logprob.dtype)

    @property
    def gap(self) -> Tensor:
        """[N] l - l_p"""
        return self.logprob - self.proximal

    def sum_of_sequence(self, values_N: Tensor) -> Tensor:
        """[N]: the sum over each token's sequence."""
        return self.sequences.spread(values_N).to(self.logprob.dtype)

    def mean_of_sequence(self, values_N: Tensor) -> Tensor:
        """[N]: the mean over the learned tokens of each token's sequence."""
        return self.sum_of_sequence(values_N) / self.lengths


@dataclass(frozen=True, eq=False)
class Terms:
    """[N] each."""

    loss: Tensor
    """Weighted for the mismatch with the engine, not yet divided."""
    ratio: Tensor
    clipped: Tensor | None = None
    """1 where a clip took the gradient; None for a loss that clips none."""


def clip(tokens: Tokens, options: PolicyConfig, weights: Tensor | None) -> Terms:
    """With the ratio of each token."""
    return _clipped(tokens, options, weights, tokens.gap.exp())


def gspo(tokens: Tokens, options: PolicyConfig, weights: Tensor | None) -> Terms:
    """With one ratio for a sequence."""
    return _clipped(tokens, options, weights, tokens.mean_of_sequence(tokens.gap).exp())


def _clipped(tokens: Tokens, options: PolicyConfig, weights: Tensor | None, ratio: Tensor) -> Terms:
    advantages = tokens.advantages
    low, high = options.clips
    # Two-sided clipping bounds the ratio that is not clipped, too.
    capped = ratio if options.cap is None else ratio.clamp(max=options.cap)
    loss = -torch.minimum(capped * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if options.dual_clip is not None:
        bounded = torch.minimum(loss, -options.dual_clip * advantages)
        loss = torch.where(advantages < 0, bounded, loss)
    # A clip acts on one side only: a good token that has become too likely, a bad one that has
    # become too unlikely. On the other side the gradient leads back.
    too_high = (capped > 1 + high) & (advantages > 0)
    too_low = (capped < 1 - low) & (advantages < 0)
    return Terms(_weighted(loss, weights), ratio, (too_high | too_low).to(ratio.dtype))


def gmpo(tokens: Tokens, options: PolicyConfig, weights: Tensor | None) -> Terms:
    """Clips logarithms before their mean is taken, on the same sides as ``clip``."""
    low, high = options.clips
    gap = tokens.gap
    held = gap.clamp(-low, high)
    is_good = tokens.advantages > 0
    left = torch.where(is_good, torch.minimum(gap, held), torch.maximum(gap, held))
    ratio = tokens.mean_of_sequence(left).exp()
    clipped = torch.where(is_good, gap > high, gap < -low).to(ratio.dtype)
    return Terms(_weighted(-ratio * tokens.advantages, weights), ratio, clipped)


def cispo(tokens: Tokens, options: PolicyConfig, weights: Tensor | None) -> Terms:
    """Every token keeps a gradient; only its weight is bounded."""
    ratio = tokens.gap.exp()
    bounded = ratio.clamp(max=options.cap).detach()
    loss = -bounded * tokens.advantages * tokens.logprob
    clipped = (ratio > bounded) & (tokens.advantages > 0)
    return Terms(_weighted(loss, weights), ratio, clipped.to(ratio.dtype))


def sapo(tokens: Tokens, options: PolicyConfig, weights: Tensor | None) -> Terms:
    """The gate's slope is 1 at a ratio of 1."""
    ratio = tokens.gap.exp()
    above, below = options.sapo
    temperatures = torch.full_like(ratio, below).masked_fill(tokens.advantages > 0, above)
    gate = torch.sigmoid(temperatures * (ratio - 1)) * 4 / temperatures
    return Terms(_weighted(-gate * tokens.advantages, weights), ratio)


def vespo(tokens: Tokens, options: PolicyConfig, weights: Tensor | None) -> Terms:
    """Weights of the mismatch are part of the sequence's; they do not multiply the loss again."""
    with torch.no_grad():
        logs = tokens.gap.clamp(-_FARTHEST, _FARTHEST)
        if weights is not None:
            logs = logs + weights.log().clamp(_LEAST, _FARTHEST)
        log_w = tokens.sum_of_sequence(logs).clamp(_LEAST, _FARTHEST)
        is_good = tokens.advantages >= 0
        power = torch.full_like(log_w, options.vespo_bad[0])
        power = power.masked_fill(is_good, options.vespo_good[0])
        rate = torch.full_like(log_w, options.vespo_bad[1])
        rate = rate.masked_fill(is_good, options.vespo_good[1])
        phi = (rate + power * log_w - rate * log_w.exp()).exp()
    return Terms(-phi * tokens.advantages * tokens.logprob, tokens.gap.exp())


def plain(tokens: Tokens, options: PolicyConfig, weights: Tensor | None) -> Terms:
    """Nothing is clipped."""
    ratio = tokens.gap.exp()
    return Terms(_weighted(-ratio * tokens.advantages, weights), ratio)


def _weighted(loss: Tensor, weights: Tensor | None) -> Tensor:
    return loss if weights is None else loss * weights


TERMS: dict[str, Callable[[Tokens, PolicyConfig, Tensor | None], Terms]] = {
    "clip": clip, "gspo": gspo, "gmpo": gmpo, "cispo": cispo, "sapo": sapo, "vespo": vespo,
    "plain": plain,
}  # fmt: skip


@torch.no_grad()
def mismatch_weights(tokens: Tokens, options: PolicyConfig) -> Tensor | None:
    """[N] proximal policy over engine, by token or alike for a sequence; None where it is off."""
    if options.mismatch == "off":
        return None
    assert tokens.engine is not None, "whoever reads the data has looked for its columns"
    # Where the engine gave nothing there is nothing to correct.
    gap = (tokens.proximal - tokens.engine).nan_to_num(nan=0.0)
    if options.mismatch == "sequence":
        gap = tokens.sum_of_sequence(gap)
    elif options.mismatch == "geometric":
        gap = tokens.mean_of_sequence(gap)
    weights = gap.exp()
    lower = options.mismatch_lower
    upper = options.mismatch_upper
    if options.mismatch_action == "truncate":
        return weights.clamp(lower, upper)
    return weights.masked_fill((weights < lower) | (weights > upper), 0.0)


@torch.no_grad()
def kept(tokens: Tokens, options: PolicyConfig) -> Tensor:
    """[N] 1, or 0 for tokens that are dropped for having moved too far from the engine."""
    keeps = torch.ones_like(tokens.logprob)
    if options.drop_gap is not None:
        assert tokens.engine is not None, "whoever reads the data has looked for its columns"
        moved = tokens.logprob.exp() - tokens.engine.exp()
        # In the direction that the advantage pulls; back towards the engine all may move.
        too_far = torch.where(
            tokens.advantages > 0, moved > options.drop_gap, moved < -options.drop_gap
        )
        keeps = keeps.masked_fill(too_far, 0.0)
    if options.drop_divergence is not None:
        assert tokens.engine is not None, "whoever reads the data has looked for its columns"
        gap = (tokens.engine - tokens.logprob).nan_to_num(nan=0.0)
        too_far = tokens.mean_of_sequence(gap) > options.drop_divergence
        keeps = keeps.masked_fill(too_far & (tokens.advantages < 0), 0.0)
    return keeps


def divergence_of(
    tokens: Tokens, options: PolicyConfig, reference: Tensor, ratio: Tensor
) -> Tensor:
    """[N] estimates of the divergence of the model from the reference."""
    gap = reference.to(tokens.logprob.dtype) - tokens.logprob
    if options.kl == "k1":
        estimate = -gap
    elif options.kl == "k2":
        estimate = gap.square() / 2
    else:
        estimate = gap.exp() - gap - 1
    return estimate * ratio if options.kl_corrected else estimate
