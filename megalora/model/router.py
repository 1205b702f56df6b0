"""Route tokens to experts, with a correction bias that is frozen.

    softmax     scores are softmax over all experts before the choice, or over the chosen ones after
    sigmoid     scores are sigmoids; a correction bias takes part in the choice alone, and experts
                may be chosen from the best groups of experts only (DeepSeek-V3, arXiv 2412.19437,
                equations 14 to 16)

Shape legend:
    T  tokens of this rank      E  experts      G  groups of E/G experts      K  experts per token
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

BEST_OF_GROUP = 2
"""A group's score is the sum of its two best experts' scores, in DeepSeek-V3 and GLM-4.5.
Megatron's own takes the best ``top_k // group_topk``, which is 2 for DeepSeek-V3's sizes alone."""


class FrozenRouter(TopKRouter):
    """Megatron's top-k router with a correction bias that never changes, and a weight that does
    where it is trained whole (``lora/unfrozen.py``).

    Its own gating computes the weight's gradient even where the weight is frozen.

    tensor        shape     dtype            across TP
    weight        [E, H]    the model's      replicated
    expert_bias   [E]       float32 always   replicated; a buffer, present with sigmoid scores
    """

    balance: Any = None
    """The ``Balance`` of a training step; None for none."""
    replay: Any = None
    """The ``Replay`` that may have a choice for this router's tokens; None for none."""
    place: int = 0
    """Its place among the routers of this rank, for the replay."""
    recorder: Any = None
    """The ``Recorder`` that keeps what is chosen; None for none."""

    def gating(self, input: Tensor) -> Tensor:
        """Logits, in float32 where the family's router computes in it (``moe_router_dtype``), else
        in the model's dtype: in bfloat16 the other kind chooses other experts."""
        # float64 stays: reference models of tests compute in it.
        widened = self.config.moe_router_dtype == "fp32" and input.dtype != torch.float64
        dtype = torch.float32 if widened else input.dtype
        return F.linear(input.to(dtype), self.weight.to(dtype))

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and choice of every token, both ``[T, E]``; see ``TopKRouter.routing``."""
        weights, chosen = self._choose(logits, padding_mask)
        if self.replay is not None:
            given = self.replay.choice_for(self)
            if given is not None:
                weights, chosen = self._weigh(logits.flatten(0, -2), given, chosen)
        if self.recorder is not None:
            self.recorder.add(chosen, self.topk)
        if self.balance is not None and self.training:
            weights = self.balance.in_graph_of(weights, logits.flatten(0, -2), chosen, self)
        return weights, chosen

    def _weigh(self, logits_TE: Tensor, given_TK: Tensor, own_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and choice, as ``routing`` returns them, of the experts that are given.

        Args:
            given_TK: int64; -1 for a token that chooses by itself.
            own_TE: bool, what each token would choose.
        """
        own_TK = own_TE.to(torch.int8).topk(self.topk, dim=-1).indices
        chosen_TK = torch.where(given_TK < 0, own_TK, given_TK)
        if self.score_function == "sigmoid":
            scale = self.config.moe_router_topk_scaling_factor or 1.0
            return weights_by_sigmoid(logits_TE, chosen_TK, scale)
        return topk_routing_with_score_function(
            logits_TE,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            precomputed_indices=chosen_TK,
        )

    def _choose(self, logits: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.score_function != "sigmoid":
            return super().routing(logits, padding_mask)
        assert self.expert_bias is not None, "sigmoid scores come with a correction bias"
        return route_by_sigmoid(
            logits.flatten(0, -2),
            self.expert_bias,
            self.topk,
            num_groups=self.config.moe_router_num_groups or 1,
            group_topk=self.config.moe_router_group_topk or 1,
            scale=self.config.moe_router_topk_scaling_factor or 1.0,
        )


def route_by_sigmoid(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, *, num_groups: int, group_topk: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Choose ``top_k`` experts by sigmoid scores plus a correction; weigh them by scores alone.

        s = sigmoid(logits)      chosen = top_k of (s + bias) within the best groups
        w_e = scale * s_e / sum of s over the chosen

    Args:
        logits_TE: logits of any dtype; scores are computed in float32 or float64.
        bias_E: correction bias, float32; it gets no gradient.
        top_k: K.
        num_groups: G; groups are neighbouring experts.
        group_topk: number of groups a token may choose from.
        scale: factor on all weights.

    Returns:
        Weights ``[T, E]`` in the dtype of the logits, zero where not chosen; choice ``[T, E]``,
        bool.
    """
    scores_TE = torch.sigmoid(logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)))
    # The choice has no gradient; scores of the chosen get theirs through ``gather``.
    with torch.no_grad():
        corrected_TE = scores_TE + bias_E
        if num_groups > 1:
            corrected_TE = _within_best_groups(corrected_TE, num_groups, group_topk)
        chosen_TK = corrected_TE.topk(top_k, dim=-1).indices
    return _normalised(scores_TE, chosen_TK, logits_TE, scale)


def weights_by_sigmoid(logits_TE: Tensor, chosen_TK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same of experts that are chosen already.

    Args:
        chosen_TK: int64, different experts of each token.
    """
    scores_TE = torch.sigmoid(logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)))
    return _normalised(scores_TE, chosen_TK, logits_TE, scale)


def _normalised(
    scores_TE: Tensor, chosen_TK: Tensor, logits_TE: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Weights and choice of the chosen experts, in the dtype of the logits."""
    weights_TK = scores_TE.gather(1, chosen_TK)
    # All chosen scores may underflow to zero; 1e-20 as in transformers.
    weights_TK = scale * weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    # Back to [T, E], zero where not chosen, as Megatron's dispatchers take them
    weights_TE = torch.zeros_like(logits_TE).scatter(1, chosen_TK, weights_TK.to(logits_TE.dtype))
    map_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, chosen_TK, True)
    return weights_TE, map_TE


def _within_best_groups(scores_TE: Tensor, num_groups: int, group_topk: int) -> Tensor:
    """The scores, minus infinity for experts outside each token's ``group_topk`` best groups."""
    # e: the E/G experts of a group
    scores_TGe = scores_TE.unflatten(1, (num_groups, -1))
    group_scores_TG = scores_TGe.topk(BEST_OF_GROUP, dim=-1).values.sum(-1)
    best_TG = group_scores_TG.topk(group_topk, dim=-1).indices
    allowed_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter(1, best_TG, True)
    return scores_TGe.masked_fill(~allowed_TG[..., None], -torch.inf).flatten(1)
