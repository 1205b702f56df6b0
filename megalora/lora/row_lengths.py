"""Merge DoRA: give the rows of a merged weight their lengths. Needs no Megatron."""

import torch
from torch import Tensor


def with_lengths(v_OI: Tensor, m_O: Tensor) -> Tensor:
    """The merged weight: rows of ``V = W + s B A`` with the lengths ``m``."""
    lengths_O1 = torch.linalg.vector_norm(v_OI, dim=1, keepdim=True)
    # As in training, a row of zeros stays one.
    return v_OI * (m_O[:, None] / lengths_O1.clamp_min(torch.finfo(lengths_O1.dtype).tiny))
