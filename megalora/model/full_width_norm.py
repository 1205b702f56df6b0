"""Normalise all heads' queries, or keys, at once, while tensor parallelism splits the heads.

    y = x r w                       r = (sum of x^2 over all heads / n + eps)^(-1/2)
    dx = r (w dy) - x r^3 / n * (sum of w dy x over all heads)
    dw = sum of dy x r over all tokens, where the weight is trained

Both sums run over the heads of all ranks: every rank's output depends on every rank's input, so
the sum in backward is as much a part of the function as the one in forward. Without it losses stay
right and gradients are off by a quarter.

Shape legend:
    S  sequence      B  batch      h  heads on this rank      d  head dim      n  d times all heads
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalora import host


class _Normalise(torch.autograd.Function):
    """The equations above; keeps ``x`` and ``r`` for backward."""

    @staticmethod
    def forward(
        ctx: Any, x_SBhd: Tensor, weight_hd: Tensor, width: int, eps: float, group: Any
    ) -> Tensor:
        wide = x_SBhd.to(torch.promote_types(x_SBhd.dtype, torch.float32))
        # [S, B] numbers: the squares of one rank's heads, then of all ranks'.
        squares_SB = _sum_over_ranks(wide.square().sum((-2, -1)), group)
        r_SB = torch.rsqrt(squares_SB / width + eps)
        ctx.save_for_backward(x_SBhd, weight_hd, r_SB)
        ctx.width = width
        ctx.group = group
        return (wide * r_SB[..., None, None] * weight_hd).to(x_SBhd.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_SBhd, weight_hd, r_SB = ctx.saved_tensors
        wide = x_SBhd.to(r_SB.dtype)
        # w dy, and its products with x summed over all features
        scaled = grads[0].to(r_SB.dtype) * weight_hd
        products_SB = _sum_over_ranks((scaled * wide).sum((-2, -1)), ctx.group)
        shift_SB = r_SB**3 * products_SB / ctx.width
        dweight_hd = None
        if ctx.needs_input_grad[1]:
            # [S, B, h, d] -> [h, d]
            normed = wide * r_SB[..., None, None]
            dweight_hd = (grads[0].to(r_SB.dtype) * normed).sum((0, 1)).to(weight_hd.dtype)
        # r (w dy) - x r^3 / n * sum
        dx = scaled * r_SB[..., None, None] - wide * shift_SB[..., None, None]
        return dx.to(x_SBhd.dtype), dweight_hd, None, None, None


def _sum_over_ranks(values_SB: Tensor, group: Any) -> Tensor:
    """Sum in place over the ranks that share the heads; None for a rank that has them all."""
    if group is not None:
        dist.all_reduce(values_SB, group=group)
    return values_SB


class FullWidthRMSNorm(nn.Module):
    """RMS norm over the heads of all tensor-parallel ranks, with a weight for each of their
    features. One all-reduce of ``[S, B]`` numbers forward, one backward.

    tensor   shape on one rank   across TP
    weight   [h * d]             dim 0, with the heads
    x, y     [S, B, h, d]        dim 2
    """

    def __init__(self, config: Any, num_heads: int, eps: float) -> None:
        """
        Args:
            config: Megatron's config, with its process groups.
            num_heads: heads of the whole model; a rank holds an equal part of them.
            eps: added to the mean square.
        """
        super().__init__()
        num_ranks = config.tensor_model_parallel_size
        assert num_heads % num_ranks == 0, "ranks that share a head would count it twice"
        self.group = config._pg_collection.tp if num_ranks > 1 else None
        self.width = num_heads * config.kv_channels
        self.eps = eps
        weight = torch.ones(
            self.width // num_ranks, dtype=config.params_dtype, device=host.device()
        )
        self.weight: Any = nn.Parameter(weight, requires_grad=False)
        # As Megatron marks a weight that is split by rows, so that loading cuts it.
        self.weight.tensor_model_parallel = True
        self.weight.partition_dim = 0
        self.weight.partition_stride = 1

    def forward(self, x: Tensor) -> Tensor:
        # [h * d] -> [h, d]: Megatron norms queries and keys when they are split into heads.
        weight = self.weight.view(x.shape[-2:])
        return _Normalise.apply(x, weight, self.width, self.eps, self.group)  # pyright: ignore


class QueryNorm(FullWidthRMSNorm):
    """The norm over all query heads."""

    def __init__(self, hidden_size: int, config: Any, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(config, config.num_attention_heads, eps)


class KeyNorm(FullWidthRMSNorm):
    """The norm over all key heads."""

    def __init__(self, hidden_size: int, config: Any, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(config, config.num_query_groups, eps)
