"""Decode AWQ's int4 in its ``gemm`` order.

    W[n, k] = (q[k, n] - z[k // g, n]) * scales[k // g, n]

    qweight    int32 [K, N / 8]: eight codes along N
    qzeros     int32 [K / g, N / 8], in the same order
    scales     float16 [K / g, N]

The low bits of a word hold output 0, the next ones output 2, then 4, 6, 1, 3, 5 and 7.
"""

import torch
from torch import Tensor

from megalora.model.quantised.nibbles import of_words
from megalora.model.quantised.part import Part, Stored, covering, group_of

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble of a word, counted from the low bits, that holds output 0, 1, ... 7."""


def decode(stored: Stored, part: Part, group: int) -> Tensor:
    """``part`` of the matrix in float32; ``group`` is g."""
    n0, n1, k0, k1 = part
    groups = covering(k0, k1, group)
    words = covering(n0, n1, 8)
    # [K, N/8] -> [K, N]
    q = _in_order(stored["qweight"][k0:k1, words])[:, n0 % 8 :][:, : n1 - n0].float()
    zero = _in_order(stored["qzeros"][groups, words])[:, n0 % 8 :][:, : n1 - n0].float()
    scale = stored["scales"][groups, n0:n1].float()
    group_of_k = group_of(k0, k1, group)
    return ((q - zero[group_of_k]) * scale[group_of_k]).t()


def _in_order(words: Tensor) -> Tensor:
    """Codes of every word in the order of their outputs: ``[..., W]`` -> ``[..., 8 W]``."""
    return of_words(words).unflatten(-1, (-1, 8))[..., torch.tensor(_ORDER)].flatten(-2)
