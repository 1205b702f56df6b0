"""Decode GPTQ's int4.

    W[n, k] = (q[k, n] - z[g, n]) * scales[g, n]        g = g_idx[k]

    qweight    int32 [K / 8, N]: eight codes along K, low bits first
    qzeros     int32 [G, N / 8]: eight zero points along N; the format ``gptq`` stores z - 1,
               ``gptq_v2`` z
    scales     float16 [G, N]
    g_idx      int32 [K]; absent where g = k // group

With activation order (``desc_act``) the groups of neighbouring columns are scattered.
"""

import torch
from torch import Tensor

from megalora.model.quantised.nibbles import of_words
from megalora.model.quantised.part import Part, Stored, covering


def decode(stored: Stored, part: Part, group: int, zero_offset: int) -> Tensor:
    """``part`` of the matrix in float32.

    Args:
        group: columns of a group where ``g_idx`` is absent.
        zero_offset: what is added to a stored zero point: 1 for ``gptq``, 0 for ``gptq_v2``.

    Raises:
        ValueError: ``g_idx`` names a group that is not there.
    """
    n0, n1, k0, k1 = part
    if "g_idx" in stored:
        group_of_k = stored["g_idx"][k0:k1].long()
    else:
        group_of_k = torch.arange(k0, k1) // group
    # The groups between the first and the last that occur.
    lowest = int(group_of_k.min())
    groups = slice(max(lowest, 0), int(group_of_k.max()) + 1)
    scale = stored["scales"][groups, n0:n1].float()
    if lowest < 0 or len(scale) < groups.stop - lowest:
        raise ValueError("its g_idx names groups that scales does not have")
    group_of_k = group_of_k - lowest
    # [K/8, N] -> [N, K]
    q = of_words(stored["qweight"][covering(k0, k1, 8), n0:n1].t())
    q = q[:, k0 % 8 :][:, : k1 - k0].float()
    # [G, N/8] -> [G, N]
    zero = of_words(stored["qzeros"][groups, covering(n0, n1, 8)])
    # Of a zero point of 0 its writers store different things, GPTQModel beside its neighbours, too.
    if zero_offset and (zero == 15).any():
        raise ValueError(
            "its qzeros hold 15, which in the first version of GPTQ's format may be a zero point of"
            " 0 or 16; write the folder anew as gptq_v2"
        )
    zero = zero[:, n0 % 8 :][:, : n1 - n0].float() + zero_offset
    return (q - zero.t()[:, group_of_k]) * scale.t()[:, group_of_k]
