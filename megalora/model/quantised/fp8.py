"""Decode fp8 blocks, as Qwen and DeepSeek publish them.

    W[n, k] = weight[n, k] * weight_scale_inv[n // P, k // Q]

    weight              float8_e4m3fn [N, K]
    weight_scale_inv    float32, bfloat16 or float8_e8m0fnu [ceil(N / P), ceil(K / Q)]

The scale multiplies, whatever its name says. The last block of rows or columns may be short: its
size is P or Q all the same, and what lies beyond the matrix is not stored.
"""

from torch import Tensor

from megalora.model.quantised.part import Part, Stored, covering, group_of


def decode(stored: Stored, part: Part, block: tuple[int, int]) -> Tensor:
    """``part`` of the matrix in float32; ``block`` is (P, Q)."""
    n0, n1, k0, k1 = part
    block_rows, block_columns = block
    scales = stored["weight_scale_inv"]
    # Scales of every block that the part touches.
    touched = scales[covering(n0, n1, block_rows), covering(k0, k1, block_columns)].float()
    by_row = touched[group_of(n0, n1, block_rows)]
    return stored["weight"][n0:n1, k0:k1].float() * by_row[:, group_of(k0, k1, block_columns)]
