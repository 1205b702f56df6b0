"""Read ``quantization_config`` of a ``config.json``: which scheme it describes, with every field
known or refused by name.

Fields about activations, caches, kernels and how the weights were found change no stored value:
they are known and not looked at.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from megalora.model.families.rules import Rule, only, or_null, whole
from megalora.model.quantised.compressed import compressed_scheme, modelopt_scheme
from megalora.model.quantised.scheme import Scheme
from megalora.model.quantised.settings import ANY, NAMES, YES_OR_NO, checked, not_converted

type Settings = Mapping[str, Any]

_NO_OTHER = "no other form of it is read"
_GROUP: Rule = only(-1, 16, 32, 64, 128, 256, 512, 1024, because=_NO_OTHER)
_FOUR: Rule = only(4, because=_NO_OTHER)

_FP8: dict[str, Rule] = {
    "fmt": only("e4m3", because=_NO_OTHER),
    "activation_scheme": ANY,
    "weight_block_size": lambda value: _two_sizes(value),
    "scale_fmt": or_null(only("float", "ue8m0", because=_NO_OTHER)),
    "modules_to_not_convert": NAMES,
    "ignored_layers": NAMES,
    "dequantize": ANY,
}
_BITSANDBYTES: dict[str, Rule] = {
    "load_in_4bit": only(True, because=_NO_OTHER),
    "_load_in_4bit": only(True, because=_NO_OTHER),
    "load_in_8bit": only(False, because=_NO_OTHER),
    "_load_in_8bit": only(False, because=_NO_OTHER),
    "bnb_4bit_quant_type": only("nf4", because=_NO_OTHER),
    "bnb_4bit_quant_storage": or_null(only("uint8", because=_NO_OTHER)),
    "bnb_4bit_use_double_quant": ANY,
    "bnb_4bit_compute_dtype": ANY,
    "llm_int8_skip_modules": NAMES,
    "llm_int8_threshold": ANY,
    "llm_int8_enable_fp32_cpu_offload": ANY,
    "llm_int8_has_fp16_weight": ANY,
}
_HOW_IT_WAS_MADE = (
    "sym", "true_sequential", "damp_percent", "damp_auto_increment", "static_groups", "mse",
    "model_name_or_path", "model_file_base_name", "tokenizer", "dataset", "batch_size",
    "pad_token_id", "max_input_length", "model_seqlen", "block_name_to_quantize",
    "module_name_preceding_first_block", "cache_block_outputs", "act_group_aware", "hyb_act",
    "meta", "quantizer", "backend", "use_cuda_fp16", "use_exllama", "disable_exllama",
    "exllama_config", "max_input_len", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "lm_head",
    "offload_to_disk", "offload_to_disk_path", "modules_in_block_to_quantize",
)  # fmt: skip
_FOUR_BITS: dict[str, Rule] = {
    **dict.fromkeys(_HOW_IT_WAS_MADE, ANY),
    "bits": _FOUR,
    "group_size": _GROUP,
    "pack_dtype": or_null(only("int32", because=_NO_OTHER)),
    "is_marlin_format": only(False, because=_NO_OTHER),
    "modules_to_not_convert": NAMES,
}
_GPTQ_FORMAT: Rule = only("gptq", "gptq_v2", because=_NO_OTHER)
_GPTQ: dict[str, Rule] = {
    **_FOUR_BITS,
    "desc_act": or_null(YES_OR_NO),
    "format": _GPTQ_FORMAT,
    # GPTQModel names quant_method twice.
    "method": only("gptq", because=_NO_OTHER),
    "checkpoint_format": _GPTQ_FORMAT,
}
_AWQ: dict[str, Rule] = {
    **_FOUR_BITS,
    "version": lambda value: _GEMM(str(value).lower()),
    "format": lambda value: _GEMM(str(value).lower()),
    "checkpoint_format": lambda value: _GEMM(str(value).lower()),
    "method": only("awq", because=_NO_OTHER),
    "zero_point": only(True, because=_NO_OTHER),
    "desc_act": only(False, because=_NO_OTHER),
}
_GEMM: Rule = only("gemm", because=_NO_OTHER)


def read_scheme(settings: Settings) -> Scheme:
    """The scheme of a ``quantization_config``.

    Raises:
        ValueError: the method, a field or a value is not one that is read; its name is in the
            message.
    """
    method = settings.get("quant_method")
    # A list or an object is no key of a table.
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(
            f"quant_method is {json.dumps(method)}; megalora reads {', '.join(_METHODS)}"
        )
    return _METHODS[method](settings)


def _fp8(settings: Settings) -> Scheme:
    checked(settings, _FP8, needed=("weight_block_size",))
    rows, columns = settings["weight_block_size"]
    return Scheme(
        form="fp8",
        title=f"fp8 in blocks of {rows} x {columns}",
        block=(rows, columns),
        not_converted=not_converted(settings, "modules_to_not_convert", "ignored_layers"),
    )


def _bitsandbytes(settings: Settings) -> Scheme:
    checked(settings, _BITSANDBYTES, needed=("load_in_4bit", "bnb_4bit_quant_type"))
    return Scheme(
        form="nf4",
        title="bitsandbytes' nf4",
        nested=bool(settings.get("bnb_4bit_use_double_quant")),
        not_converted=not_converted(settings, "llm_int8_skip_modules"),
    )


def _gptq(settings: Settings) -> Scheme:
    checked(settings, _GPTQ, needed=("bits", "group_size"))
    # Two names for one field; without it the first version is meant.
    named = {settings[key] for key in ("checkpoint_format", "format") if settings.get(key)}
    if len(named) > 1:
        raise ValueError(f"checkpoint_format and format differ: {', '.join(sorted(named))}")
    version = named.pop() if named else "gptq"
    return Scheme(
        form="gptq",
        title=f"GPTQ's int4 ({version})",
        group=_group(settings),
        zero_offset=1 if version == "gptq" else 0,
        scattered=bool(settings.get("desc_act")),
        not_converted=not_converted(settings, "modules_to_not_convert"),
    )


def _awq(settings: Settings) -> Scheme:
    checked(settings, _AWQ, needed=("bits", "group_size", "zero_point"))
    return Scheme(
        form="awq",
        title="AWQ's int4 (gemm)",
        group=_group(settings),
        not_converted=not_converted(settings, "modules_to_not_convert"),
    )


def _group(settings: Settings) -> int | None:
    """Columns that share a scale; -1 is all of a row."""
    size = int(settings["group_size"])  # 128.0 is the same number in JSON
    return None if size == -1 else size


def _two_sizes(value: Any) -> str | None:
    size = whole(1)
    if isinstance(value, list) and len(value) == 2 and not any(size(one) for one in value):
        return None
    return "two sizes of a block, such as [128, 128]"


_METHODS: dict[Any, Callable[[Settings], Scheme]] = {
    "fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": compressed_scheme,
    "modelopt": modelopt_scheme,
}
