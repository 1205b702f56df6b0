"""Compute core attention through ``torch.nn.functional.scaled_dot_product_attention``.

Shape legend:
    S  sequence      B  batch      h  query heads on this rank
    g  key/value heads on this rank      d  head dim
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class SDPACoreAttention(nn.Module):
    """Causal attention over the heads of this rank; what Megatron calls ``core_attention``.

    Samples are padded on the right, so the causal mask alone keeps padding out of every real token.
    """

    def __init__(
        self, config: Any, *args: Any, softmax_scale: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__()
        # yarn's attention factor is in the given scale (``rotary.softmax_scale``).
        self.scale = softmax_scale
        if softmax_scale is None:
            self.scale = 1 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """query ``[S, B, h, d]``, key and value ``[S, B, g, d]``; returns ``[S, B, h * d]``."""
        assert packed_seq_params is None, (
            "packed sequences need a mask that this attention does not build"
        )
        # [S, B, heads, d] -> [B, heads, S, d], the order that torch attends in
        q = query.permute(1, 2, 0, 3)
        k = key.permute(1, 2, 0, 3)
        v = value.permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        # [B, h, S, d] -> [S, B, h * d], as o_proj takes it
        return out.permute(2, 0, 1, 3).flatten(2)
