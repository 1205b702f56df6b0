"""Forces a router's choice to be even, and counts the rows each rank's experts got.

Megatron's own ``moe_router_force_load_balancing`` draws random logits: even on average only, and
drawn anew when a layer is recomputed, whose backward would then find other rows than its forward
had.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalora.lora.router import RouterLoRA
from megalora.model.recompute import Recomputed
from megalora.parallel import Groups


def even_experts(num_tokens: int, num_experts: int, top_k: int, ep: int, source: int = 0) -> Tensor:
    """``[num_tokens, top_k]`` int64: experts in turn, first over ranks, then over those of a rank.

    Every rank of ``ep`` gets as many rows as any other, and every expert as any other, or one more.
    ``source`` numbers ranks with tokens of their own: each goes on where the one before it ended,
    so that remainders do not pile up.
    """
    turn = torch.arange(num_tokens * top_k) + source * num_tokens * top_k
    return ((turn % ep) * (num_experts // ep) + (turn // ep) % (num_experts // ep)).view(
        num_tokens, top_k
    )


class EvenRouter(nn.Module):
    """A router that still computes its logits and, from those of the chosen experts, their weights;
    only the choice is not its own.

    Works inside ``RouterLoRA`` and in recomputed layers: the choice depends on the number of tokens
    alone.
    """

    def __init__(self, base: Any, ep: int, source: int) -> None:
        super().__init__()
        self.base = base
        self.ep = ep
        self.source = source
        self._chosen: Tensor | None = None

    def gating(self, x: Tensor) -> Tensor:
        return self.base.gating(x)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits ``[S/t, B, E]``; what ``TopKRouter.routing`` returns."""
        chosen = self._chosen_of(logits)
        return self.base.routing(
            logits.masked_fill(~chosen, float("-inf")), padding_mask=padding_mask
        )

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.routing(self.gating(x), padding_mask=padding_mask)

    def _chosen_of(self, logits: Tensor) -> Tensor:
        """Bool ``[S/t, B, E]``, made once: in a benchmark every microbatch is as long as the
        next."""
        if self._chosen is None or self._chosen.shape != logits.shape:
            num_experts = logits.shape[-1]
            experts = even_experts(
                logits.shape[:-1].numel(),
                num_experts,
                self.base.config.moe_router_topk,
                self.ep,
                self.source,
            )
            chosen = torch.zeros(experts.shape[0], num_experts, dtype=torch.bool).scatter_(
                1, experts, True
            )
            self._chosen = chosen.view(logits.shape).to(logits.device)
        return self._chosen


def make_even(chunks: Sequence[Any], groups: Groups) -> None:
    """Replace the choice of every router of this rank's chunks, adapters already in, layers wrapped
    or not; in place."""
    source = groups.ep.rank() * groups.etp.size() + groups.etp.rank()
    for mlp in moe_layers(chunks):
        if isinstance(mlp.router, RouterLoRA):
            mlp.router.base = EvenRouter(mlp.router.base, groups.ep.size(), source)
        else:
            mlp.router = EvenRouter(mlp.router, groups.ep.size(), source)


def moe_layers(chunks: Sequence[Any]) -> list[Any]:
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    mlps = [(layer.module if isinstance(layer, Recomputed) else layer).mlp for layer in layers]
    return [mlp for mlp in mlps if hasattr(mlp, "experts")]


def count_rows(chunks: Sequence[Any], groups: Groups) -> Callable[[], tuple[float, float] | None]:
    """Count what arrives at this rank's experts from now on; the call returned says how uneven that
    was.

    Returns:
        (mean, largest) over layers and microbatches of the fullest expert-parallel rank's rows over
        the mean, the same on every rank of the world; None where experts are not shared out.
        Collective.
    """
    rows: list[int] = []

    def count(_: nn.Module, args: tuple[Any, ...]) -> None:
        rows.append(args[0].shape[0])  # known to the host, so nothing waits

    if groups.ep.size() > 1:
        for mlp in moe_layers(chunks):
            mlp.experts.register_forward_pre_hook(count)

    def imbalance() -> tuple[float, float] | None:
        if groups.ep.size() == 1:
            return None
        found: list[Any] = [None] * groups.ep.size()
        dist.all_gather_object(found, rows, group=groups.ep)
        # A rank that got nothing at all still counts; a call in which nobody did has no ratio.
        ratios = [
            max(call) * len(call) / sum(call) for call in zip(*found, strict=True) if sum(call)
        ]
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, ratios)
        flat = [ratio for part in everywhere for ratio in part]
        return (sum(flat) / len(flat), max(flat)) if flat else None

    return imbalance
