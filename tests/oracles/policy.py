"""Two policy losses over whole samples in float64, sample by sample and token by token: GSPO with a
divergence from the base, and decoupled PPO with an entropy bonus."""

from statistics import stdev
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from tests.oracles.training import Oracle


def read(
    oracle: Oracle, sample: Any, weights: dict[str, Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies) of a sample's learned tokens at a temperature."""
    ids = torch.tensor(sample.input_ids).long()
    mask = torch.tensor(sample.loss_mask)[1:]
    output = functional_call(oracle.model, weights, (ids[None, :-1],), tie_weights=False)
    logprobs = (output.logits[0].double() / temperature).log_softmax(-1)[mask]
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, ids[1:, None][mask])[:, 0], entropies


def policy_loss(oracle: Oracle, samples: list, policy: Any) -> Tensor:
    """The loss of a global batch."""
    merged = oracle.merged()
    of_sample = gspo if policy.loss == "gspo" else decoupled
    advantages = [sample.value for sample in samples]
    if policy.advantage_std == "batch":
        deviation = stdev(sample.rollout.reward for sample in samples)
        advantages = [advantage / (deviation + 1e-4) for advantage in advantages]
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for sample, advantage in zip(samples, advantages, strict=True):
        # With the experts that the sampler chose, if the sample says so; a reference by itself.
        if sample.routes is not None:
            oracle.given = torch.from_numpy(sample.routes).long()
        logprobs, entropies = read(oracle, sample, merged, policy.temperature)
        oracle.given = None
        with torch.no_grad():
            # Of the base, or of the start where the loss compares with that.
            reference, _ = read(oracle, sample, oracle.reference, policy.temperature)
        mask = sample.loss_mask[1:]
        engine = torch.tensor(sample.floats["logprobs"][1:][mask]).double()
        total = total + of_sample(logprobs, entropies, reference, engine, advantage, policy)
        count = count + len(logprobs)
    return total / (len(samples) if policy.loss == "gspo" else count)


def gspo(
    logprobs: Tensor, entropies: Tensor, reference: Tensor, engine: Tensor, advantage: float,
    policy: Any,
) -> Tensor:  # fmt: skip
    """Zheng et al. 2507.18071, equation 5, and k3."""
    ratio = (logprobs - engine).mean().exp()
    bounded = ratio.clamp(1 - policy.clip_low, 1 + policy.clip_high)
    gap = reference - logprobs
    k3 = (gap.exp() - gap - 1).mean()
    return policy.kl_coef * k3 - torch.min(ratio * advantage, bounded * advantage)


def decoupled(
    logprobs: Tensor, entropies: Tensor, reference: Tensor, engine: Tensor, advantage: float,
    policy: Any,
) -> Tensor:  # fmt: skip
    """Hilton et al. 2110.00641, with sequences dropped as in DeepSeek-V3.2."""
    total = -policy.entropy_coef * entropies.sum()
    far = (engine - logprobs.detach()).mean().item() > policy.drop_divergence
    if far and advantage < 0:
        return total
    for logprob, old, behaviour in zip(logprobs, reference, engine, strict=True):
        weight = min((old - behaviour).exp().item(), policy.mismatch_upper)
        ratio = (logprob - old).exp()
        bounded = ratio.clamp(0.8, 1.2)
        total = total - weight * torch.min(ratio * advantage, bounded * advantage)
    return total
