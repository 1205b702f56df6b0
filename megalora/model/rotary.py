"""Compute rotary frequencies as transformers does, and the angles of each token's position.

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


class DocumentRotary(nn.Module):
    """Rotary angles by the place of each token in its document, in place of Megatron's
    ``rotary_pos_emb``.

    Megatron's own counts along the row. Attention sees only differences of positions, so the loss
    would be the same; but at position 131,072 a float32 angle errs by 0.01.
    """

    def __init__(self, inv_freq: Tensor) -> None:
        """inv_freq: ``[features / 2]`` float32, on the device."""
        super().__init__()
        # Not a buffer: ``.to(bfloat16)`` of the model would round it.
        self.inv_freq = inv_freq

    def get_rotary_seq_len(
        self, inference_context: Any, block: Any, x: Any, config: Any, packed_seq_params: Any
    ) -> Tensor:
        """[T / c] positions of this rank's tokens; Megatron hands the result to ``forward``."""
        if packed_seq_params is not None:
            return packed_seq_params.positions
        # Whole sequences [S, B, H], which a later pipeline stage has as the block's input; split
        # over tensor parallelism under sequence parallelism.
        hidden = block.input_tensor if x is None else x
        num_tokens = len(hidden)
        if config.sequence_parallel:
            num_tokens *= config.tensor_model_parallel_size
        return torch.arange(num_tokens, device=hidden.device)

    def forward(self, positions: Tensor, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """Angles ``[T, 1, 1, features]`` float32 of positions ``[T]``, each frequency twice."""
        angles = torch.outer(positions.to(self.inv_freq.dtype), self.inv_freq)
        return torch.cat([angles, angles], -1)[:, None, None]


def install_rotary(chunk: nn.Module, inv_freq: Tensor) -> None:
    """Let a GPTModel, built with position embeddings of type "rope", turn by these frequencies."""
    made: Any = chunk.rotary_pos_emb
    assert made.inv_freq.shape == inv_freq.shape, (
        f"rotary embedding of {tuple(made.inv_freq.shape)} frequencies"
    )
    chunk.rotary_pos_emb = DocumentRotary(inv_freq)
