"""Encode a matrix anew as a published folder stores it, in tensors of the same shapes and dtypes:
fp8 blocks and bitsandbytes' nf4.

    fp8   scale = max |block| / 448, rounded to the dtype of the folder's scales
          code = e4m3(W / scale)
    nf4   absmax and codes by blocks of the flattened matrix, as bitsandbytes; doubly quantised, the
          folder's offset stays, and each absmax takes the nearest of the 256 values there are

Values are not those that the library which wrote the folder would choose to the last bit: a scale
that the folder rounds, or an absmax that it quantises, may be another. Decoding them is exact.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megalora_kernels import NF4
from torch import Tensor
from torch.nn.functional import pad

from megalora.json_text import parse_json
from megalora.model.formats.coded import NF4_BLOCK
from megalora.model.quantised import nf4
from megalora.model.quantised.scheme import Scheme
from megalora.model.quantised.to_nf4 import quantise

ENCODED = ("fp8", "nf4")
"""Forms that are written."""
_LARGEST_E4M3 = 448.0


def encode(scheme: Scheme, w_NK: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that stand for a matrix, by ending; what they leave out of ``stored`` stays.

    Args:
        w_NK: the values, in float32.
        stored: the folder's own tensors of this matrix.

    Raises:
        ValueError: the folder has another codebook or block size than what is written.
    """
    if scheme.form == "fp8":
        return _fp8(w_NK, stored["weight_scale_inv"].dtype, scheme.block)
    assert scheme.form == "nf4"
    return _nf4(w_NK, stored)


def _fp8(w_NK: Tensor, scale_dtype: torch.dtype, block: tuple[int, int]) -> dict[str, Tensor]:
    rows, columns = w_NK.shape
    p, q = block
    # Zeros beyond the matrix raise no maximum. [N / P, P, K / Q, Q]
    padded = pad(w_NK, (0, -columns % q, 0, -rows % p))
    blocks = padded.unflatten(1, (-1, q)).unflatten(0, (-1, p))
    scale = blocks.abs().amax((1, 3)) / _LARGEST_E4M3
    # Any scale will do for zeros, except zero: 0 / 0 is no code.
    scale = torch.where(scale > 0, scale, 1.0)
    if scale_dtype == torch.float8_e8m0fnu:
        # Upwards, so that no code is cut off by as much as half.
        scale = torch.exp2(scale.log2().ceil())
    scales = scale.to(scale_dtype)
    by_row = scales.float().repeat_interleave(p, 0)[:rows]
    scaled = w_NK / by_row.repeat_interleave(q, 1)[:, :columns]
    # A scale that was rounded down leaves some a little above the largest code.
    codes = scaled.clamp(-_LARGEST_E4M3, _LARGEST_E4M3).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales}


def _nf4(w_NK: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = parse_json(bytes(stored[nf4.STATE].tolist()))
    if state["blocksize"] != NF4_BLOCK:
        raise ValueError(
            f"it is quantised in blocks of {state['blocksize']}; written are blocks of {NF4_BLOCK}"
        )
    if not torch.equal(stored["weight.quant_map"].float(), torch.tensor(NF4)):
        raise ValueError("its quant_map is not that of nf4")
    # Blocks run over the flattened matrix, whatever its rows.
    codes, absmax = quantise(w_NK.reshape(1, -1))
    pairs = pad(codes.flatten(), (0, codes.numel() % 2)).view(-1, 2)
    parts = {"weight": pairs[:, :1] << 4 | pairs[:, 1:], "weight.absmax": absmax.flatten()}
    if "weight.nested_absmax" in stored:
        parts |= _nested(absmax.flatten(), stored, state)
    return parts


def _nested(absmax: Tensor, stored: Mapping[str, Tensor], state: Mapping[str, Any]) -> dict:
    """Scales as codes: absmax[j] = map[code[j]] * nested_absmax[j // C] + offset."""
    step = state["nested_blocksize"]
    centred = absmax - state["nested_offset"]
    blocks = pad(centred, (0, -len(absmax) % step)).view(-1, step)
    largest = blocks.abs().amax(1)
    scaled = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    table, order = stored["weight.nested_quant_map"].float().sort()
    # Between neighbours in the table.
    nearest = torch.bucketize(scaled.flatten()[: len(absmax)], (table[1:] + table[:-1]) / 2)
    return {
        "weight.absmax": order[nearest].to(torch.uint8),
        "weight.nested_absmax": largest.to(stored["weight.nested_absmax"].dtype),
    }
