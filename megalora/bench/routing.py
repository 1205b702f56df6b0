"""Force a router's choice to be even, and count the rows that each rank's experts get.

Megatron's own ``moe_router_force_load_balancing`` draws random logits: even on average only, and
drawn anew when a layer is recomputed, whose backward would then find other rows than its forward
had.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalora.lora.router import RouterLoRA
from megalora.model.recompute import Recomputed
from megalora.parallel import Groups


def even_experts(num_tokens: int, num_experts: int, top_k: int, source: int = 0) -> Tensor:
    """``[num_tokens, top_k]`` int64: experts in turn, in an order that is drawn anew for every
    block of ``lcm(num_experts, top_k)`` choices.

    Every expert gets as many rows as any other, or one more. A token's experts lie on as many ranks
    as a router's do that prefers none: in one fixed order it could be all of them or one, and the
    all-to-all sends a token once to each. ``source`` numbers ranks with tokens of their own: each
    continues where the one before it ended, so that remainders do not pile up.
    """
    first = source * num_tokens * top_k
    turn = torch.arange(num_tokens * top_k) + first
    # Whole tokens and whole rounds over all experts: k choices in turn are k different experts.
    block = math.lcm(num_experts, top_k)
    blocks = range(first // block, (first + num_tokens * top_k) // block + 1)
    # Numbered over all sources, so that two that share a block share its order.
    orders = []
    for number in blocks:
        orders.append(torch.randperm(num_experts, generator=torch.Generator().manual_seed(number)))
    experts = torch.stack(orders)[turn // block - blocks.start, turn % block % num_experts]
    return experts.view(num_tokens, top_k)


class EvenRouter(nn.Module):
    """A router that computes logits and weights as its base does, but whose choice is even.

    Works inside ``RouterLoRA`` and in recomputed layers: the choice depends on the number of tokens
    alone.
    """

    def __init__(self, base: Any, source: int) -> None:
        super().__init__()
        self.base = base
        self.source = source
        self._chosen: Tensor | None = None

    def gating(self, x: Tensor) -> Tensor:
        return self.base.gating(x)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits ``[S/t, B, E]``; what ``TopKRouter.routing`` returns."""
        # The base router takes the top k of what is left, and computes weights from their logits.
        chosen = self._chosen_of(logits)
        masked = logits.masked_fill(~chosen, float("-inf"))
        return self.base.routing(masked, padding_mask=padding_mask)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.routing(self.gating(x), padding_mask=padding_mask)

    def _chosen_of(self, logits: Tensor) -> Tensor:
        """Bool ``[S/t, B, E]``, made once: in a benchmark every microbatch is as long as the
        next."""
        if self._chosen is None or self._chosen.shape != logits.shape:
            num_tokens = logits.shape[:-1].numel()
            num_experts = logits.shape[-1]
            top_k = self.base.config.moe_router_topk
            experts = even_experts(num_tokens, num_experts, top_k, self.source)
            # [tokens, E], true at each token's k experts.
            chosen = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
            chosen.scatter_(1, experts, True)
            self._chosen = chosen.view(logits.shape).to(logits.device)
        return self._chosen


def make_even(chunks: Sequence[Any], groups: Groups) -> None:
    """Replace the choice of every router of this rank's chunks, adapters already in, layers wrapped
    or not; in place."""
    # Every rank of the expert grid brings tokens of its own.
    source = groups.ep.rank() * groups.etp.size() + groups.etp.rank()
    for mlp in moe_layers(chunks):
        if isinstance(mlp.router, RouterLoRA):
            mlp.router.base = EvenRouter(mlp.router.base, source)
        else:
            mlp.router = EvenRouter(mlp.router, source)


def moe_layers(chunks: Sequence[Any]) -> list[Any]:
    """MoE layers of this rank's chunks, without the wrappers that recompute a layer."""
    found = []
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            inner: Any = layer.module if isinstance(layer, Recomputed) else layer
            # A dense layer's MLP has no experts.
            if hasattr(inner.mlp, "experts"):
                found.append(inner.mlp)
    return found


def count_rows(chunks: Sequence[Any], groups: Groups) -> Callable[[], tuple[float, float] | None]:
    """Count the rows of this rank's experts from now on; the call returned says how uneven they
    were.

    Returns:
        (mean, largest) over layers and microbatches of the fullest expert-parallel rank's rows over
        the mean, the same on every rank of the world; None where experts are not shared out.
        Collective.
    """
    rows: list[int] = []

    def count(_: nn.Module, args: tuple[Any, ...]) -> None:
        # The host knows the number from the exchange, so that nothing waits for the device.
        _, routing, _ = args
        rows.append(routing.num_rows)

    if groups.ep.size() > 1:
        for mlp in moe_layers(chunks):
            mlp.experts.register_forward_pre_hook(count)

    def imbalance() -> tuple[float, float] | None:
        if groups.ep.size() == 1:
            return None
        rows_of_rank: list[Any] = [None] * groups.ep.size()
        dist.all_gather_object(rows_of_rank, rows, group=groups.ep)
        ratios: list[float] = []
        # One call of a layer, with its rows on each expert-parallel rank.
        for call in zip(*rows_of_rank, strict=True):
            # A rank that got no rows still counts; a call in which no rank got any has no ratio.
            if sum(call):
                mean = sum(call) / len(call)
                ratios.append(max(call) / mean)
        # Other pipeline stages have other layers, other replicas other tokens.
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, ratios)
        flat = list(itertools.chain.from_iterable(everywhere))
        if not flat:
            return None
        return sum(flat) / len(flat), max(flat)

    return imbalance
