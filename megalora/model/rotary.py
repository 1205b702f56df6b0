"""Compute rotary frequencies as transformers does, and put them into Megatron's rotary embedding.

Megatron's own are not used: it has no linear scaling, llama3 with three of its four numbers fixed,
and yarn that rounds differently. Frequencies come from the functions that transformers' models
call; whatever the kind, angles are then

    angle[p, i] = p * inv_freq[i]        cos, sin times ``factor``, so that q.k carries factor^2

The factor goes into the softmax scale, factor^2 / sqrt(head_dim): whole heads are rotated, so the
two are the same.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megalora.model.rope_fields import Rope

MAX_POSITIONS = 32_768
"""``max_position_embeddings`` where a config names none, as in transformers."""


def frequencies(
    rope: Rope, head_dim: int, max_positions: int | None = None
) -> tuple[Tensor, float]:
    """Inverse frequencies ``[head_dim / 2]``, float32 on the host, and the factor on cos and sin.

    Args:
        head_dim: features of a head that are turned.
        max_positions: ``max_position_embeddings``, which yarn and llama3 take for the original
            length if they name none.
    """
    # transformers has no function for the plain kind: theta^(-2i / head_dim).
    if rope.kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / rope.theta**exponents, 1.0
    # The functions read these three fields, of the config of any model.
    config = Qwen3Config(
        head_dim=head_dim,
        max_position_embeddings=max_positions or MAX_POSITIONS,
        rope_parameters=rope.parameters(),  # pyright: ignore[reportArgumentType]
    )
    inv_freq, factor = ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"))
    return inv_freq.float(), float(factor)


def softmax_scale(factor: float, head_dim: int) -> float:
    """The factor on q.k that equals ``factor`` on each of cos and sin: both q and k are turned, so
    it counts twice."""
    return factor**2 / math.sqrt(head_dim)


def set_frequencies(chunk: nn.Module, inv_freq: Tensor) -> None:
    """Let a GPTModel, built with position embeddings of type "rope" and not yet called, turn by
    these frequencies."""
    rotary: Any = chunk.rotary_pos_emb
    assert rotary.inv_freq.shape == inv_freq.shape, (
        f"rotary embedding of {tuple(rotary.inv_freq.shape)} frequencies"
    )
    # Not yet called, because it caches the angles of the first call.
    rotary.inv_freq = inv_freq
