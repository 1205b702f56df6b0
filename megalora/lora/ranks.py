"""Ranks and alpha of one projection, from the numbers, rules and patterns of a ``lora`` section."""

from megalora.config import LoRAConfig
from megalora.lora.spec import lora_scale
from megalora.model.projections import Projection
from megalora.model.shape import ModelShape


def ranks_and_alpha(
    lora: LoRAConfig, projection: Projection, keys: list[str | None], shape: ModelShape
) -> tuple[list[int], float]:
    """Rank of each expert, or one for all of them, and alpha.

    Args:
        keys: of ``lora.rank_pattern``: the one that means each expert, or one for all of them;
            None where none does.
    """
    rank = lora.rank
    alpha = float(lora.alpha)
    # A pattern is more particular than expert_rank.
    if projection.is_expert and lora.expert_rank is not None and None in keys:
        rank, alpha = _of_experts(lora, shape)
    each = [rank if key is None else lora.rank_pattern[key] for key in keys]
    # One scale holds for all experts: that of the largest rank, wherever it comes from.
    if max(each) != rank:
        alpha = float(lora.alpha)
    return each, alpha


def _of_experts(lora: LoRAConfig, shape: ModelShape) -> tuple[int, float]:
    """Rank and alpha that ``lora.expert_rank`` gives routed experts; raises ``ValueError`` where a
    division leaves a rest."""
    if isinstance(lora.expert_rank, int):
        return lora.expert_rank, float(lora.alpha)
    parts, what = shape.top_k, "experts that a token is sent to"
    if lora.expert_rank == "experts":
        parts, what = shape.num_experts, "experts of a layer"
    if lora.rank % parts:
        below = lora.rank // parts * parts
        choices = f"{below} or {below + parts}" if below else f"{parts}"
        raise ValueError(
            f"lora.expert_rank={lora.expert_rank} divides lora.rank={lora.rank} by {parts}, the"
            f" {what}, which leaves a rest. Set lora.rank={choices}, or lora.expert_rank to a"
            " number."
        )
    rank = lora.rank // parts
    # The scale that lora.rank has: alpha / rank alone would grow with the number of experts.
    scale = lora_scale(float(lora.alpha), lora.rank, lora.use_rslora)
    return rank, scale / lora_scale(1.0, rank, lora.use_rslora)
