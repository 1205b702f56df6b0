"""Decode compressed-tensors' ``pack-quantized`` int4.

    W[n, k] = (q[n, k] - z[n, k // g]) * weight_scale[n, k // g]

    weight_packed       int32 [N, ceil(K / 8)]: eight codes along K, low bits first
    weight_scale        [N, K / g]; g = K where a row has one scale
    weight_shape        int64 [2]: N, K
    weight_zero_point   int32 [ceil(N / 8), K / g], packed along N; absent where z is always 8

q and z are stored with 8 added: both lie between 0 and 15, and the 8 cancels in q - z.
"""

from torch import Tensor

from megalora.model.quantised.nibbles import of_words
from megalora.model.quantised.part import Part, Stored, covering, group_of

_SYMMETRIC = 8


def decode(stored: Stored, part: Part, group: int, size: tuple[int, int]) -> Tensor:
    """``part`` of the matrix in float32; ``group`` is g, ``size`` [N, K] of the whole matrix.

    Raises:
        ValueError: ``weight_shape`` is that of another matrix, which a transposed or swapped one of
            as many words would be read as.
    """
    if tuple(stored["weight_shape"][...].tolist()) != size:
        raise ValueError(
            f"its weight_shape is {stored['weight_shape'][...].tolist()}, needed {list(size)}"
        )
    n0, n1, k0, k1 = part
    groups = covering(k0, k1, group)
    group_of_k = group_of(k0, k1, group)
    words = stored["weight_packed"][n0:n1, covering(k0, k1, 8)]
    # The first word may begin before the part.
    q = of_words(words)[:, k0 % 8 :][:, : k1 - k0].float()
    scale = stored["weight_scale"][n0:n1, groups].float()
    if "weight_zero_point" not in stored:
        return (q - _SYMMETRIC) * scale[:, group_of_k]
    packed = stored["weight_zero_point"][covering(n0, n1, 8), groups]
    # Eight rows in a word: [N/8, G] -> [G, N] -> [N, G].
    zero = of_words(packed.t()).t()[n0 % 8 :][: n1 - n0].float()
    return (q - zero[:, group_of_k]) * scale[:, group_of_k]
