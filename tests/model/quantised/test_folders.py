"""Folders in every quantised form: each matrix is read with its own values, and a folder that
contradicts itself is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalora.model.account import open_folder
from megalora.model.base_weights import BaseWeights
from megalora.model.fields import scheme_of
from tests.model.accounts import copy_of, refusal
from tests.oracles import quantised as oracle
from tests.oracles.base import make_base, rewrite, stored_tensors

SIZES: dict[str, Any] = {
    "hidden_size": 64, "moe_intermediate_size": 192, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4, "num_hidden_layers": 2,
}  # fmt: skip
"""192 rows are one and a half blocks of fp8."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain base whose matrices say which they are: each is labelled by layer, module, expert,
    row and column."""
    folder = make_base(tmp_path_factory.mktemp("base") / "base", **SIZES)
    number = 0

    def labelled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal number
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight"):
                number += 1
                rows, columns = tensor.shape
                row = torch.arange(rows)[:, None]
                wave = torch.sin((1 + number / 100) * torch.arange(columns) + 0.1 * row)
                tensors[name] = wave * (0.02 + number / 1000) * (1 + row / 64)
        return tensors

    return rewrite(folder, labelled)


FAST = ["fp8", "nf4 nested", "int4 asymmetric", "awq"]


@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=[] if form in FAST else pytest.mark.slow) for form in oracle.FORMS],
)
def test_10_every_matrix_has_its_own_values(base: Path, tmp_path: Path, form: str) -> None:
    """Also experts' gate, up and down, which have scales of their own."""
    values = oracle.quantise_folder(base, tmp_path / "quantised", form)
    opened = open_folder(tmp_path / "quantised")
    read = BaseWeights(opened, torch.bfloat16)
    plain = stored_tensors(base)
    assert set(read) == set(plain)
    for name, weight in read.items():
        if name in values:
            assert weight.dtype == torch.bfloat16
            assert torch.equal(weight, values[name].to(torch.bfloat16)), name
        else:
            # 7: router, norms, embedding and head are the base's own.
            assert torch.equal(weight, plain[name]), name
    # 4 matrices of attention and 3 of each of 4 experts, in 2 layers.
    assert len(values) == 2 * (4 + 3 * 4)


@pytest.fixture(scope="module")
def fp8(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "fp8"
    oracle.quantise_folder(base, folder, "fp8")
    return folder


_Q = "model.layers.0.self_attn.q_proj"
_UP = "model.layers.1.mlp.experts.2.up_proj"


def _changed(folder: Path, out: Path, change: dict[str, Tensor | None], **config: Any) -> Path:
    """A copy with some tensors replaced, or left out where they are None."""
    copy = copy_of(folder, out)

    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in change.items():
            if tensor is None:
                del tensors[name]
            else:
                tensors[name] = tensor
        return tensors

    return rewrite(copy, edit, **config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        # 1: codes without a scale were once trained on as values.
        ({f"{_Q}.weight_scale_inv": None}, f"{_Q}.weight is F8_E4M3"),
        ({f"{_UP}.weight": None}, f"{_UP}.weight is missing"),
        ({f"{_UP}.weight": torch.zeros(192, 64)}, f"{_UP}.weight is F32, needed F8_E4M3"),
        (
            {f"{_UP}.weight_scale_inv": torch.ones(1, 1)},
            f"{_UP}.weight_scale_inv is [1, 1], needed [2, 1]",
        ),
        (
            {f"{_UP}.weight_scale_inv": torch.ones(2, 1, dtype=torch.float16)},
            f"{_UP}.weight_scale_inv is F16, needed BF16 or F32 or F8_E8M0",
        ),
        ({f"{_UP}.weight_scale": torch.ones(2, 1)}, f"{_UP}.weight_scale)"),
        ({"model.norm.weight_scale_inv": torch.ones(1)}, "(model.norm.weight_scale_inv)"),
    ],
)
def test_01_a_folder_that_contradicts_itself_is_refused(
    fp8: Path, tmp_path: Path, change: dict[str, Tensor | None], said: str
) -> None:
    assert said in refusal(_changed(fp8, tmp_path / "spoiled", change))


def test_07_what_the_config_excludes_is_not_quantised(fp8: Path, tmp_path: Path) -> None:
    settings = json.loads((fp8 / "config.json").read_text())["quantization_config"]
    entries = (_Q, "self_attn", "model.layers.0", "q_proj", "re:.*q_proj", "*.q_proj")
    for number, listed in enumerate(entries):
        config = settings | {"modules_to_not_convert": [listed]}
        folder = _changed(fp8, tmp_path / str(number), {}, quantization_config=config)
        said = refusal(folder)
        assert f"is quantised, and config.json lists {listed!r} as not quantised" in said
    # The end of a name, not a part of a word.
    config = settings | {"modules_to_not_convert": ["proj", "model.layers.0.self_attn.q", "gate"]}
    open_folder(_changed(fp8, tmp_path / "other", {}, quantization_config=config))


def test_a_config_without_quantised_tensors_is_refused(base: Path, tmp_path: Path) -> None:
    folder = _changed(base, tmp_path / "plain", {}, quantization_config=oracle.CONFIGS["fp8"]())
    assert "but none is: no tensor ends in .weight_scale_inv" in refusal(folder)


def _settings(form: str, **change: Any) -> dict[str, Any]:
    found = json.loads(json.dumps(oracle.CONFIGS[form]())) | change
    return {name: value for name, value in found.items() if value is not ...}


def _weights(form: str, **change: Any) -> dict[str, Any]:
    found = _settings(form)
    found["config_groups"]["group_0"]["weights"] |= change
    return json.loads(json.dumps(found, default=lambda _: "left out"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "hqq"}, 'quant_method is "hqq"; megalora reads fp8, bitsandbytes, gptq'),
        ({"bits": 4}, "quant_method is null"),
        ({"quant_method": "mxfp4"}, 'quant_method is "mxfp4"; megalora reads'),
        ({"quant_method": ["fp8"]}, 'quant_method is ["fp8"]; megalora reads'),
        (_settings("int4", config_groups={"group_0": 3}), "config_groups.group_0 is 3, not an"),
        (_settings("int4", config_groups=[1]), "config_groups is [1]; it must be an object"),
        (_settings("int4", format=["pack-quantized"]), 'format is ["pack-quantized"]; it must'),
        (_settings("int4", sparsity_config="2:4"), 'sparsity_config is "2:4"; it must be absent'),
        (_settings("int4", ignore={"lm_head": 1}), "ignore is"),
        (_weights("int4", symmetric=None), "weights.symmetric is null; it must be true or false"),
        (_weights("int4", symmetric=...), "weights.symmetric is"),
        (_weights("int4", strategy={"a": 1}), "weights.strategy is"),
        (_weights("int4", group_size=True), "weights.group_size is true"),
        (_settings("gptq", desc_act="false"), 'desc_act is "false"; it must be true or false'),
        (_settings("gptq", group_size=[128]), "group_size is [128]"),
        (_settings("gptq", checkpoint_format=["gptq"]), 'checkpoint_format is ["gptq"]'),
        (_settings("fp8", fmt="e5m2"), 'fmt is "e5m2"; it must be "e4m3"'),
        (_settings("fp8", weight_block_size=None), "weight_block_size is null; it must be two"),
        (_settings("fp8", weight_block_size=...), "weight_block_size is missing"),
        (_settings("fp8", rotated=True), "rotated is true, a field that megalora does not know"),
        (_settings("nf4", bnb_4bit_quant_type="fp4"), 'bnb_4bit_quant_type is "fp4"'),
        (_settings("nf4", load_in_8bit=True), "load_in_8bit is true; it must be false"),
        (_settings("nf4", bnb_4bit_quant_storage="bfloat16"), 'it must be "uint8"'),
        (_settings("gptq", bits=8), "bits is 8; it must be 4"),
        (_settings("gptq", group_size=...), "group_size is missing"),
        (_settings("gptq", dynamic={"-:.*": {}}), "dynamic is"),
        (_settings("gptq", method="awq"), 'method is "awq"; it must be "gptq"'),
        (_settings("gptq", checkpoint_format="marlin"), 'checkpoint_format is "marlin"'),
        (
            _settings("gptq", checkpoint_format="gptq", format="gptq_v2"),
            "checkpoint_format and format differ: gptq, gptq_v2",
        ),
        (_settings("awq", checkpoint_format="gemv"), 'checkpoint_format is "gemv"'),
        (_settings("awq", version="gemv"), 'version is "gemv"; it must be "gemm"'),
        (_settings("awq", zero_point=False), "zero_point is false; it must be true"),
        (_settings("int4", format="float-quantized"), 'format is "float-quantized"'),
        (_settings("int4", sparsity_config={"format": "2:4"}), "sparsity_config is"),
        (_weights("int4", actorder="group"), "config_groups.group_0.weights.actorder is"),
        (_weights("int4", num_bits=8), "config_groups.group_0.weights.num_bits is 8"),
        (_weights("int4", group_size=None), "config_groups.group_0.weights.group_size is missing"),
        (_weights("nvfp4", group_size=32), "group_size is 32; it must be 16"),
        (_settings("modelopt", quant_algo="FP8"), 'quant_algo is "FP8"; it must be "NVFP4"'),
    ],
)
def test_what_is_not_read_is_refused_by_name(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        scheme_of({"quantization_config": settings}, "Qwen/Qwen3-30B-A3B-FP8")
    assert said in str(caught.value)
    assert str(caught.value).endswith("use Qwen/Qwen3-30B-A3B")
    assert "\n" not in str(caught.value)


def test_decoding_names_the_weight_that_contradicts_itself(base: Path, tmp_path: Path) -> None:
    oracle.quantise_folder(base, tmp_path / "nf4", "nf4")
    stored = stored_tensors(tmp_path / "nf4")
    ending = "weight.quant_state.bitsandbytes__nf4"
    folder = _changed(
        tmp_path / "nf4", tmp_path / "spoiled", {f"{_Q}.{ending}": stored[f"{_UP}.{ending}"]}
    )
    with pytest.raises(ValueError, match=f"{_Q}.weight: its quant_state is of a nf4 matrix"):
        BaseWeights(open_folder(folder))[f"{_Q}.weight"]


def test_a_transposed_weight_shape_is_refused(base: Path, tmp_path: Path) -> None:
    """As many words, of another matrix."""
    oracle.quantise_folder(base, tmp_path / "int4", "int4")
    change: dict[str, Tensor | None] = {f"{_UP}.weight_shape": torch.tensor([64, 192])}
    folder = _changed(tmp_path / "int4", tmp_path / "spoiled", change)
    with pytest.raises(ValueError, match=r"its weight_shape is \[64, 192\], needed \[192, 64\]"):
        BaseWeights(open_folder(folder))[f"{_UP}.weight"]


def test_biases_of_zeros_are_left_out_of_gptq_alone(base: Path, tmp_path: Path) -> None:
    oracle.quantise_folder(base, tmp_path / "gptq", "gptq")
    zeros: dict[str, Tensor | None] = {
        f"{_UP}.bias": torch.zeros(192, dtype=torch.float16),
        f"{_Q}.bias": torch.zeros(128, dtype=torch.float16),
    }
    folder = _changed(tmp_path / "gptq", tmp_path / "zeros", zeros)
    assert set(BaseWeights(open_folder(folder))) == set(stored_tensors(base))
    # One that is not zero would be lost.
    last = torch.zeros(192, dtype=torch.float16)
    last[-1] = 1e-7
    assert f"{_UP}.bias" in refusal(
        _changed(tmp_path / "gptq", tmp_path / "one", {f"{_UP}.bias": last})
    )
    oracle.quantise_folder(base, tmp_path / "awq", "awq")
    assert f"{_UP}.bias" in refusal(_changed(tmp_path / "awq", tmp_path / "other", zeros))


def test_a_group_size_may_be_written_as_a_float() -> None:
    scheme = scheme_of({"quantization_config": _settings("gptq", group_size=128.0)})
    assert scheme is not None and scheme.group == 128 and type(scheme.group) is int


def test_what_gptqmodel_writes_is_read() -> None:
    """``config.json`` of a Qwen3-MoE that GPTQModel 7.7.0 has quantised."""
    meta = {
        "act_group_aware": True, "auto_forward_data_parallel": True, "damp_auto_increment": 0.01,
        "damp_percent": 0.05, "fallback": {"smooth": None, "strategy": "rtn", "threshold": "0.5%"},
        "gc_mode": "interval", "hessian": {"chunk_bytes": None, "staging_dtype": "float32"},
        "mock_quantization": False, "mse": 0.0, "offload_to_disk": True, "pack_impl": "auto",
        "quantizer": ["gptqmodel:7.7.0"], "static_groups": False, "true_sequential": True,
        "uri": "https://github.com/modelcloud/gptqmodel", "wait_for_submodule_finalizers": False,
    }  # fmt: skip
    settings = {
        "bits": 4, "checkpoint_format": "gptq", "desc_act": False, "format": "gptq",
        "group_size": 32, "lm_head": False, "meta": meta, "method": "gptq", "pack_dtype": "int32",
        "quant_method": "gptq", "sym": True,
    }  # fmt: skip
    scheme = scheme_of({"quantization_config": settings}, "made")
    assert scheme is not None
    assert (scheme.form, scheme.group, scheme.zero_offset) == ("gptq", 32, 1)
    of_awq = {
        "checkpoint_format": "gemm", "format": "gemm", "method": "awq", "quant_method": "awq",
        "version": "gemm", "zero_point": True,
    }  # fmt: skip
    scheme = scheme_of({"quantization_config": settings | of_awq}, "made")
    assert scheme is not None and scheme.form == "awq"


def test_gptq_s_versions_differ() -> None:
    """The first stores zero points less one, also where no field says the version."""
    for fields, offset in (
        ({}, 1),
        ({"format": "gptq"}, 1),
        ({"checkpoint_format": "gptq_v2"}, 0),
        ({"format": "gptq_v2"}, 0),
    ):
        scheme = scheme_of({"quantization_config": _settings("gptq", **fields)})
        assert scheme is not None and scheme.zero_offset == offset
