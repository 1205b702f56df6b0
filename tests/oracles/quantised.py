"""Write matrices in every quantised form, by the library that defines it or, where none is
installed, code by code in plain loops; and say which values they mean."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Stored = dict[str, Tensor]
"""Ending of a stored tensor's name -> tensor."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BLOCK = 128
GROUP = 32


def fp8(w: Tensor, scale_dtype: torch.dtype = torch.bfloat16) -> tuple[Stored, Tensor]:
    """Block fp8; values by a loop over blocks."""
    rows, columns = w.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK), dtype=scale_dtype)
    values = torch.empty(rows, columns)
    for p in range(scales.shape[0]):
        for q in range(scales.shape[1]):
            tile = (slice(p * BLOCK, (p + 1) * BLOCK), slice(q * BLOCK, (q + 1) * BLOCK))
            scales[p, q] = w[tile].abs().max() / 448
            scale = scales[p, q].float()
            codes[tile] = (w[tile] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            values[tile] = codes[tile].float() * scale
    return {"weight": codes, "weight_scale_inv": scales}, values


def nf4(w: Tensor, nested: bool = False) -> tuple[Stored, Tensor]:
    """By bitsandbytes; values in w's dtype."""
    import bitsandbytes.functional as bnb

    codes, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=nested)
    stored = {"weight": codes}
    for name, tensor in state.as_dict(packed=True).items():
        stored[f"weight.{name}"] = tensor
    # Read back as one row: of a matrix whose rows are no multiple of the block, bitsandbytes 0.50.2
    # counts blocks from the beginning of each row on a CPU, which is not how it quantised.
    state.shape = torch.Size([w.numel()])
    return stored, bnb.dequantize_4bit(codes, state).view(w.shape)


def int4(w: Tensor, symmetric: bool = True, group: int | None = GROUP) -> tuple[Stored, Tensor]:
    """By compressed-tensors; ``group`` None has one scale for a row."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    args: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": symmetric}
    if group is None:
        args["strategy"] = "channel"
    else:
        args |= {"strategy": "group", "group_size": group}
    by_group = w.unflatten(1, (-1, group or w.shape[1]))
    low, high = by_group.aminmax(dim=-1)
    scale = (high - low) / 15
    zero = (-8 - low / scale).round().clamp(-8, 7)
    if symmetric:
        scale = by_group.abs().amax(-1) / 7.5
        zero = torch.zeros_like(scale)
    given = {"weight": w, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    return _compressed(PackedQuantizationCompressor, args, given)


def nvfp4(w: Tensor) -> tuple[Stored, Tensor]:
    """By compressed-tensors; values in bfloat16, which its decoder gives."""
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor

    args: dict[str, Any] = {
        "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group",
        "group_size": 16,
    }  # fmt: skip
    whole = (448 * 6 / w.abs().max()).float().reshape(1)
    scale = w.unflatten(1, (-1, 16)).abs().amax(-1) / 6 * whole
    scale = scale.to(torch.float8_e4m3fn).to(w.dtype)
    given = {"weight": w, "weight_scale": scale, "weight_global_scale": whole}
    return _compressed(NVFP4PackedCompressor, args, given)


def mxfp4(w: Tensor) -> tuple[Stored, Tensor]:
    """By compressed-tensors; values in bfloat16, which its decoder gives."""
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor

    args: dict[str, Any] = {
        "num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32,
    }  # fmt: skip
    largest = w.unflatten(1, (-1, 32)).abs().amax(-1).float()
    scale = torch.exp2(torch.floor(torch.log2(largest)) - 2)
    return _compressed(
        MXFP4PackedCompressor, args, {"weight": w, "weight_scale": scale.to(w.dtype)}
    )


def _compressed(
    compressor: Any, args: dict[str, Any], given: dict[str, Tensor]
) -> tuple[Stored, Tensor]:
    """What one of compressed-tensors' classes stores, and what it reads back."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    stored = compressor.compress(dict(given), scheme)
    values = compressor.decompress(dict(stored), scheme)["weight"]
    return {name: tensor.contiguous() for name, tensor in stored.items()}, values


def modelopt(w: Tensor) -> tuple[Stored, Tensor]:
    """nvfp4 as ModelOpt stores it, in loops: its second scale multiplies."""
    rows, columns = w.shape
    second = (w.abs().max() / (448 * 6)).float()
    scales = torch.empty(rows, columns // 16, dtype=torch.float8_e4m3fn)
    packed = torch.zeros(rows, columns // 2, dtype=torch.uint8)
    values = torch.empty(rows, columns)
    levels = torch.tensor(E2M1)
    for n in range(rows):
        for k in range(columns):
            g = k // 16
            if k % 16 == 0:
                scales[n, g] = w[n, k : k + 16].abs().max() / 6 / second
            scale = scales[n, g].float() * second
            code = int((levels - w[n, k].abs() / scale).abs().argmin())
            value = E2M1[code]
            if w[n, k] < 0:
                code += 8
                value = -value
            packed[n, k // 2] |= code << (4 * (k % 2))
            values[n, k] = value * scale
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": second}, values


def gptq(
    w: Tensor, version: int = 1, scattered: bool = False, group: int = GROUP
) -> tuple[Stored, Tensor]:
    """GPTQ's int4 in loops; ``scattered`` has columns in groups by activation order."""
    q, z, scales, group_of_k, values = _grouped(w, group, scattered)
    columns, rows = q.shape
    qweight = _packed([[q[8 * i : 8 * i + 8, n] for n in range(rows)] for i in range(columns // 8)])
    stored_zero = z - (2 - version)
    qzeros = _packed(
        [[row[8 * j : 8 * j + 8] for j in range(rows // 8)] for row in stored_zero.unbind()]
    )
    g_idx = torch.tensor(group_of_k, dtype=torch.int32)
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx}, values


def awq(w: Tensor, group: int = GROUP) -> tuple[Stored, Tensor]:
    """AWQ's int4 in loops."""
    q, z, scales, _, values = _grouped(w, group, scattered=False)

    def words(codes: Tensor) -> Tensor:
        rows = []
        for row in codes.unbind():
            # Outputs by their place in a word, low bits first.
            rows.append([row[j : j + 8][[0, 2, 4, 6, 1, 3, 5, 7]] for j in range(0, len(row), 8)])
        return _packed(rows)

    return {"qweight": words(q), "qzeros": words(z), "scales": scales}, values


def _grouped(
    w: Tensor, group: int, scattered: bool
) -> tuple[Tensor, Tensor, Tensor, list[int], Tensor]:
    """(codes [K, N], zero points [G, N], scales f16 [G, N], group of each column, values [N, K]);
    zero points between 1 and 15."""
    rows, columns = w.shape
    num_groups = columns // group
    group_of_k = [k % num_groups if scattered else k // group for k in range(columns)]
    scales = torch.empty(num_groups, rows, dtype=torch.float16)
    z = torch.empty(num_groups, rows, dtype=torch.int64)
    q = torch.empty(columns, rows, dtype=torch.int64)
    values = torch.empty(rows, columns)
    for n in range(rows):
        for g in range(num_groups):
            of_group = [k for k in range(columns) if group_of_k[k] == g]
            low, high = w[n, of_group].aminmax()
            scales[g, n] = (high - low) / 15
            scale = scales[g, n].float()
            z[g, n] = int((-low / scale).round().clamp(1, 15))
            for k in of_group:
                q[k, n] = int((w[n, k] / scale).round() + z[g, n]) if scale else 0
                q[k, n].clamp_(0, 15)
                values[n, k] = (q[k, n] - z[g, n]).float() * scale
    return q, z, scales, group_of_k, values


def _packed(words: list[list[Tensor]]) -> Tensor:
    """int32 of eight codes each, the first in the low bits."""
    rows = []
    for row in words:
        packed = []
        for codes in row:
            word = sum(int(code) << (4 * i) for i, code in enumerate(codes))
            # As a signed number.
            packed.append(word - 2**32 if word >= 2**31 else word)
        rows.append(packed)
    return torch.tensor(rows, dtype=torch.int32)


FORMS: dict[str, Callable[[Tensor], tuple[Stored, Tensor]]] = {
    "fp8": fp8,
    "fp8, float32 scales": lambda w: fp8(w, torch.float32),
    "fp8, e8m0 scales": lambda w: fp8(w, torch.float8_e8m0fnu),
    "nf4": nf4,
    "nf4 nested": lambda w: nf4(w, nested=True),
    "int4": int4,
    "int4 asymmetric": lambda w: int4(w, symmetric=False),
    "int4 rows": lambda w: int4(w, group=None),
    "gptq": gptq,
    "gptq_v2 scattered": lambda w: gptq(w, version=2, scattered=True),
    "awq": awq,
    "nvfp4": nvfp4,
    "mxfp4": mxfp4,
    "modelopt": modelopt,
}
"""Every form that is read, by a name."""
