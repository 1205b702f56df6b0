"""Decode a stored matrix by the scheme of its folder."""

from torch import Tensor

from megalora.model.quantised import awq, fp8, gptq, int4, mxfp4, nf4, nvfp4
from megalora.model.quantised.part import Part, Stored
from megalora.model.quantised.scheme import Scheme


def decode(scheme: Scheme, stored: Stored, part: Part, size: tuple[int, int]) -> Tensor:
    """``part`` of a matrix in float32.

    Args:
        stored: what ``scheme.parts`` lists, by ending.
        size: [N, K] of the whole matrix.

    Raises:
        ValueError: stored values contradict each other.
    """
    # Without groups, a row is one.
    group = scheme.group or size[1]
    match scheme.form:
        case "fp8":
            return fp8.decode(stored, part, scheme.block)
        case "nf4":
            return nf4.decode(stored, part, size)
        case "int4":
            return int4.decode(stored, part, group, size)
        case "gptq":
            return gptq.decode(stored, part, group, scheme.zero_offset)
        case "awq":
            return awq.decode(stored, part, group)
        case "nvfp4":
            return nvfp4.decode_compressed(stored, part)
        case "nvfp4_modelopt":
            return nvfp4.decode_modelopt(stored, part)
        case "mxfp4":
            return mxfp4.decode(stored, part)
