"""Write matrices and folders in every quantised form, by the library that defines it or, where
none is installed, by its definition; and say which values they mean."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.oracles.base import rewrite, stored_tensors
from tests.oracles.bitsandbytes_apart import functional

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
    bnb = functional()
    codes, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=nested)
    stored = {"weight": codes}
    for name, tensor in state.as_dict(packed=True).items():
        stored[f"weight.{name}"] = tensor
    # Read back as one row: of a matrix whose rows are no multiple of the block, bitsandbytes 0.50.2
    # counts blocks from the beginning of each row on a CPU, which is not how it quantised.
    state.shape = torch.Size([w.numel()])
    return stored, bnb.dequantize_4bit(codes, state).view(w.shape)


def nf4_doubly(w: Tensor) -> tuple[Stored, Tensor]:
    """By bitsandbytes' code for any device, which takes the nearest code of a scale; that for CPUs
    looks codes up in a table of 65,536 places, and takes a neighbour of it now and then."""
    bnb = functional()
    codes, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    offset = state.absmax.mean()
    values = bnb.create_dynamic_map()
    # Of float64 there is no code for CPUs.
    centred = (state.absmax - offset).double()
    scales, second = torch.ops.bitsandbytes.quantize_blockwise.default(centred, values, 256)
    decode = torch.ops.bitsandbytes.dequantize_blockwise.default
    state.absmax = decode(scales, second, values, 256, torch.float32) + offset
    state.shape = torch.Size([w.numel()])
    stored = {"weight": codes, "weight.absmax": scales, "weight.nested_absmax": second}
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
    """nvfp4 as ModelOpt stores it, whose second scale multiplies."""
    second = w.abs().max().float() / (448 * 6)
    # [N, G, 16]
    by_group = w.float().unflatten(1, (-1, 16))
    scales = (by_group.abs().amax(-1) / 6 / second).to(torch.float8_e4m3fn)
    scale = (scales.float() * second)[:, :, None]
    distance = (torch.tensor(E2M1) - (by_group / scale).abs()[..., None]).abs()
    codes = distance.argmin(-1)
    is_negative = by_group < 0
    values = torch.tensor(E2M1)[codes] * torch.where(is_negative, -1, 1) * scale
    codes = (codes + 8 * is_negative).flatten(1)
    packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": second}, values.flatten(1)


def gptq(
    w: Tensor,
    version: int = 1,
    scattered: bool = False,
    group: int = GROUP,
    symmetric: bool = False,
) -> tuple[Stored, Tensor]:
    """GPTQ's int4; ``scattered`` has columns in groups by activation order, ``symmetric`` has 8 for
    every zero point."""
    q, z, scales, group_of_k, values = _grouped(w, group, scattered, symmetric)
    qweight = _words([q[i::8] for i in range(8)])
    stored_zero = z - (2 - version)
    qzeros = _words([stored_zero[:, i::8] for i in range(8)])
    g_idx = group_of_k.int()
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx}, values


def awq(w: Tensor, group: int = GROUP) -> tuple[Stored, Tensor]:
    """AWQ's int4."""
    q, z, scales, _, values = _grouped(w, group, scattered=False)
    # Outputs by their place in a word, low bits first.
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    qweight = _words([q[:, i::8] for i in order])
    qzeros = _words([z[:, i::8] for i in order])
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales}, values


def _grouped(
    w: Tensor, group: int, scattered: bool, symmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(codes [K, N], zero points [G, N], scales f16 [G, N], group of each column, values [N, K]);
    zero points between 1 and 15."""
    rows, columns = w.shape
    num_groups = columns // group
    column = torch.arange(columns)
    group_of_k = column % num_groups if scattered else column // group
    scales = torch.empty(num_groups, rows, dtype=torch.float16)
    z = torch.empty(num_groups, rows, dtype=torch.int64)
    q = torch.empty(columns, rows, dtype=torch.int64)
    values = torch.empty(rows, columns)
    for g in range(num_groups):
        of_group = group_of_k == g
        part = w[:, of_group].float()
        low, high = part.aminmax(dim=1)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scales[g] = (high - low) / 15
        scale = scales[g].float()[:, None]
        # Of a symmetric group it would be 7.5.
        z[g] = 8 if symmetric else (-low / scale[:, 0]).round().clamp(1, 15)
        codes = ((part / scale).round() + z[g][:, None]).clamp(0, 15)
        q[of_group] = codes.t().long()
        values[:, of_group] = (codes - z[g][:, None]) * scale
    return q, z, scales, group_of_k, values


def _words(nibbles: list[Tensor]) -> Tensor:
    """int32 of eight codes each, the first in the low bits."""
    word = torch.zeros_like(nibbles[0])
    for place, codes in enumerate(nibbles):
        word += codes * 16**place
    # As a signed number.
    return torch.where(word >= 2**31, word - 2**32, word).int()


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


def _compressed_config(form: str, **weights: Any) -> dict[str, Any]:
    """As compressed-tensors writes it."""
    from compressed_tensors.quantization import QuantizationConfig

    group = {"targets": ["Linear"], "weights": {"num_bits": 4, **weights}}
    config = QuantizationConfig(
        config_groups={"group_0": group}, format=form, quantization_status="compressed",
        ignore=["lm_head", "re:.*mlp.gate$"],
    )  # fmt: skip
    return config.model_dump(mode="json")


_LISTED = ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
_FP8 = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": _LISTED,
}  # fmt: skip
_NF4 = {
    "quant_method": "bitsandbytes", "_load_in_4bit": True, "_load_in_8bit": False,
    "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": ["lm_head"],
    "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False,
    "llm_int8_enable_fp32_cpu_offload": False,
}  # fmt: skip
_GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False,
    "true_sequential": True, "damp_percent": 0.01, "static_groups": False, "lm_head": False,
    "meta": {"quantizer": ["gptqmodel:2.0.0"]}, "pack_dtype": "int32", "dynamic": None,
}  # fmt: skip
_MODELOPT = {
    "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*.mlp.gate"],
    "config_groups": {
        "group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}}
    },
    "producer": {"name": "modelopt", "version": "0.37.0"},
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
}  # fmt: skip
CONFIGS: dict[str, Callable[[], dict[str, Any]]] = {
    "fp8": lambda: _FP8,
    "fp8, float32 scales": lambda: _FP8,
    "fp8, e8m0 scales": lambda: _FP8 | {"scale_fmt": "ue8m0"},
    "nf4": lambda: _NF4,
    "nf4 nested": lambda: _NF4,
    "int4": lambda: _compressed_config(
        "pack-quantized", type="int", symmetric=True, strategy="group", group_size=GROUP
    ),
    "int4 asymmetric": lambda: _compressed_config(
        "pack-quantized", type="int", symmetric=False, strategy="group", group_size=GROUP
    ),
    "int4 rows": lambda: _compressed_config(
        "pack-quantized", type="int", symmetric=True, strategy="channel"
    ),
    "gptq": lambda: _GPTQ,
    "gptq_v2 scattered": lambda: _GPTQ | {"checkpoint_format": "gptq_v2", "desc_act": True},
    "awq": lambda: {
        "quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm",
        "zero_point": True, "modules_to_not_convert": ["mlp.gate"],
    },
    "nvfp4": lambda: _compressed_config(
        "nvfp4-pack-quantized", type="float", symmetric=True, strategy="tensor_group", group_size=16
    ),
    "mxfp4": lambda: _compressed_config(
        "mxfp4-pack-quantized", type="float", symmetric=True, strategy="group", group_size=32
    ),
    "modelopt": lambda: _MODELOPT,
}  # fmt: skip
"""What ``config.json`` says of each form."""


def is_linear(name: str) -> bool:
    """Whether a tensor of a plain base is the weight of a linear that is quantised; Mixtral calls
    those of experts w1, w2 and w3."""
    return re.search(r"(_proj|\.w[123])\.weight$", name) is not None


def quantise_folder(base: Path, out: Path, form: str) -> dict[str, Tensor]:
    """Write a plain base with its linears in this form; returns every matrix's values by its
    weight's name."""
    shutil.copytree(base, out)
    values: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}
    for name, tensor in stored_tensors(base).items():
        if not is_linear(name):
            written[name] = tensor
            continue
        # Cast as published models are, of whose dtype scales are.
        parts, values[name] = FORMS[form](tensor.bfloat16())
        for ending, part in parts.items():
            written[f"{name.removesuffix('weight')}{ending}"] = part
    rewrite(out, lambda _: written, quantization_config=CONFIGS[form]())
    return values


def plain_folder(base: Path, out: Path, values: dict[str, Tensor]) -> Path:
    """The same base with these values as plain float32 weights."""
    shutil.copytree(base, out)
    return rewrite(out, lambda tensors: tensors | {n: v.float() for n, v in values.items()})
