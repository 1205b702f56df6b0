"""What routers of transformers' models choose, by how much, and how evenly."""

import math
from typing import Any

import torch
from torch import Tensor


def lead(values: Tensor, count: int) -> float:
    """The smallest distance, over rows, between the last of the ``count`` largest and the next."""
    if count >= values.shape[-1]:
        return math.inf
    largest = values.topk(count + 1, dim=-1).values
    return (largest[..., -2] - largest[..., -1]).min().item()


def corrected_margin(router: Any, logits: Tensor) -> float:
    """The same for a router that chooses by sigmoids plus a correction: groups first, then experts
    of the best groups. Sigmoids err a quarter as much as logits, at most."""
    scores = logits.sigmoid() + router.e_score_correction_bias
    by_group = scores.unflatten(-1, (router.n_group, -1))
    rating = by_group.topk(2, dim=-1).values.sum(-1)
    # A group is rated by the sum of its two best experts, as DeepSeek-V3 does.
    best = rating.topk(router.topk_group, dim=-1).indices
    allowed = torch.zeros_like(rating, dtype=torch.bool).scatter(-1, best, True)
    within = by_group.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
    # A choice may turn at either stage: another group, or another expert of the same groups.
    return min(lead(rating, router.topk_group), lead(within, router.top_k))


def chosen(router: Any, logits: Tensor) -> Tensor:
    """[T, K]: the experts of each token."""
    if not hasattr(router, "e_score_correction_bias"):
        return logits.topk(router.top_k, dim=-1).indices
    scores = logits.sigmoid() + router.e_score_correction_bias
    by_group = scores.unflatten(-1, (router.n_group, -1))
    best = by_group.topk(2, dim=-1).values.sum(-1).topk(router.topk_group, dim=-1).indices
    allowed = torch.zeros(len(scores), router.n_group, dtype=torch.bool).scatter(-1, best, True)
    return by_group.masked_fill(~allowed[..., None], -torch.inf).flatten(-2).topk(router.top_k)[1]


def unevenness(router: Any, logits: Tensor, given: Tensor | None = None) -> Tensor:
    """DeepSeek-V3's balance loss of one sequence in one layer (2412.19437, equations 17 to 20),
    written out expert by expert. ``given``: [T, K], the experts where the router did not choose."""
    num_tokens, num_experts = logits.shape
    sigmoids = hasattr(router, "e_score_correction_bias")
    scores = logits.sigmoid() if sigmoids else logits.exp()
    shares = scores / scores.sum(-1, keepdim=True)
    experts = chosen(router, logits.detach()) if given is None else given
    total = logits.new_zeros(())
    for expert in range(num_experts):
        times = (experts == expert).sum().item()
        frequency = num_experts / (router.top_k * num_tokens) * times
        total = total + frequency * shares[:, expert].mean()
    return total
