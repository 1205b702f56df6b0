"""Decode nvfp4, as ModelOpt and compressed-tensors write it.

W[n, k] = E2M1[code[n, k]] * (scale[n, k // 16] * s)

codes      uint8 [N, K / 2], the low nibble first: ``weight``, or ``weight_packed``
scale      ``weight_scale``, float8_e4m3fn [N, K / 16]
s          one float32: ModelOpt's ``weight_scale_2``; by compressed-tensors'
           ``weight_global_scale`` is divided instead
"""

from torch import Tensor

from megalora.model.quantised.nibbles import E2M1, low_first
from megalora.model.quantised.part import Part, Stored, covering, group_of

GROUP = 16


def decode_modelopt(stored: Stored, part: Part) -> Tensor:
    """``part`` of a matrix that ModelOpt wrote, in float32."""
    scale = _scale(stored, part) * stored["weight_scale_2"][...].float()
    return decode_e2m1(stored["weight"], scale, part, GROUP)


def decode_compressed(stored: Stored, part: Part) -> Tensor:
    """``part`` of a matrix that compressed-tensors wrote, in float32."""
    scale = _scale(stored, part) / stored["weight_global_scale"][...].float()
    return decode_e2m1(stored["weight_packed"], scale, part, GROUP)


def _scale(stored: Stored, part: Part) -> Tensor:
    """Scales of the groups that the part touches, in float32."""
    n0, n1, k0, k1 = part
    return stored["weight_scale"][n0:n1, covering(k0, k1, GROUP)].float()


def decode_e2m1(packed: Tensor, scale: Tensor, part: Part, group: int) -> Tensor:
    """Values of 4-bit floats times their group's scale, in float32.

    Args:
        packed: uint8 ``[N, K / 2]``, or a slice of a file.
        scale: float32, one for each row of the part and each group of ``group`` columns that it
            touches.
    """
    n0, n1, k0, k1 = part
    codes = low_first(packed[n0:n1, covering(k0, k1, 2)])[:, k0 % 2 :][:, : k1 - k0]
    return E2M1[codes.long()] * scale[:, group_of(k0, k1, group)]
