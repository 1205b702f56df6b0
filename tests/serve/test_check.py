"""What vLLM would refuse, or accept and ignore, is found in the folder: each with its own error,
value and fix."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megalora.adapters.files import CONFIG, WEIGHTS
from megalora.adapters.read.weights import AdapterWeights
from megalora.hf.json_file import read_hf_config
from megalora.model.families import layer_projections
from megalora.model.fields import model_shape
from megalora.serve.adapter_files import content_hash, read_adapter_files, tensor_count
from megalora.serve.check import Limits, Needs, base_modules, check_adapter
from megalora.serve.errors import (
    AdapterError,
    AdapterForOtherBase,
    AdapterInvalid,
    AdapterNotFound,
    AdapterRankTooLarge,
    AdapterTargetsUnserved,
)
from megalora.tiny import make_tiny
from tests.adapters.folders import edit_config, edit_tensors
from tests.named_tensors import cast, renamed, without_parts
from tests.serve.adapters import EVERYTHING, make_adapter

Q = "base_model.model.model.layers.1.self_attn.q_proj"
EXPERT = "base_model.model.model.layers.2.mlp.experts.5"


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    """Rank 4 on everything but the output layer; the router has rank 3."""
    return make_adapter(tmp_path / "adapter", tiny, 0, rank_pattern={"gate": 3})


def test_a_sound_adapter_says_what_it_needs(adapter: Path, tiny: Path, tmp_path: Path) -> None:
    needs = Needs(4, frozenset({"qkv_proj", "o_proj", "experts", "gate"}))
    assert (
        check_adapter(adapter)
        == check_adapter(adapter, Limits(4, tuple(needs.target_modules), tiny))
        == needs
    )
    # vLLM's fused names, or their parts.
    by_parts = Limits(4, ("q_proj", "k_proj", "v_proj", "o_proj", "experts", "gate"))
    assert check_adapter(adapter, by_parts) == needs, "vLLM takes parts of a fused module too"
    head = make_adapter(
        tmp_path / "head",
        tiny,
        0,
        target_modules=["lm_head", "q_proj"],
        rank_pattern={"lm_head": 9},
    )
    assert check_adapter(head, Limits(base=tiny)) == Needs(9, frozenset({"lm_head", "qkv_proj"}))


@pytest.mark.parametrize("arch", ["qwen3", "qwen2_moe"])
def test_other_families(tmp_path: Path, arch: str) -> None:
    base = make_tiny(tmp_path / "base", arch=arch, num_hidden_layers=2)
    targets = list(EVERYTHING)
    # vLLM's names; qwen2_moe has dense parts beside its experts.
    expected = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    if arch == "qwen2_moe":
        expected |= {"experts", "gate"}
    else:
        targets.remove("gate")
    adapter = make_adapter(tmp_path / "a", base, 0, target_modules=targets)
    assert check_adapter(adapter, Limits(base=base)).target_modules == expected


def test_names_without_the_usual_prefix(adapter: Path, tiny: Path) -> None:
    """vLLM takes them, so we do."""
    edit_tensors(adapter, renamed(lambda name: name.removeprefix("base_model.model.")))
    assert check_adapter(adapter, Limits(base=tiny)).rank == 4


def with_(name: str, value: torch.Tensor) -> Callable[[dict], dict]:
    return lambda tensors: tensors | {name: value}


def spoil(number: float, dtype: torch.dtype) -> Callable[[dict], dict]:
    def change(tensors: dict) -> dict:
        tensors = cast(dtype)(tensors)
        # One number among thousands.
        tensors[f"{Q}.lora_B.weight"][3, 1] = number
        return tensors

    return change


def transposed(tensors: dict) -> dict:
    return {name: tensor.T for name, tensor in tensors.items()}


def one_expert_more(tensors: dict) -> dict:
    """The base has eight, 0 to 7."""
    copy = renamed(lambda name: name.replace("experts.7", "experts.8"))
    return tensors | copy(tensors)


BROKEN_TENSORS: dict[str, tuple[Callable[[dict], dict], type[AdapterError], str]] = {
    "no tensors": (lambda _: {}, AdapterInvalid, "holds no tensors: nothing was adapted"),
    "NaN": (
        spoil(math.nan, torch.float32),
        AdapterInvalid,
        rf"{Q}.lora_B.weight holds NaN or an infinite number",
    ),
    "infinite": (spoil(-math.inf, torch.float32), AdapterInvalid, "q_proj.lora_B.weight holds NaN"),
    "NaN, bfloat16": (
        spoil(math.nan, torch.bfloat16),
        AdapterInvalid,
        "q_proj.lora_B.weight holds NaN",
    ),
    "infinite, float16": (
        spoil(math.inf, torch.float16),
        AdapterInvalid,
        "q_proj.lora_B.weight holds NaN",
    ),
    "B missing": (
        without_parts(f"{Q}.lora_B"),
        AdapterInvalid,
        r"layers.1.self_attn.q_proj has A only; a factor is missing",
    ),
    "A missing": (without_parts(f"{Q}.lora_A"), AdapterInvalid, "has B only"),
    # vLLM stacks all experts of a layer.
    "one expert missing": (
        without_parts(f"{EXPERT}."),
        AdapterInvalid,
        r"layers.2.mlp.experts.5 lacks down_proj, gate_proj, up_proj; .* \(zeros do\)",
    ),
    "the last expert missing": (without_parts("experts.7."), AdapterInvalid, "experts.7 lacks"),
    "one projection missing": (
        without_parts("up_proj"),
        AdapterInvalid,
        r"experts.0 lacks up_proj",
    ),
    "no LoRA factor": (
        with_("base_model.model.lm_head.weight", torch.zeros(2, 2)),
        AdapterInvalid,
        "is not a LoRA factor",
    ),
    "DoRA's vector": (
        with_(f"{Q}.lora_magnitude_vector", torch.zeros(2)),
        AdapterInvalid,
        "is not a LoRA factor",
    ),
    "stacked": (
        with_("base_model.model.model.layers.0.mlp.experts.lora_A.weight", torch.zeros(32, 80)),
        AdapterInvalid,
        "stacks all experts",
    ),
    "stacked gate and up": (
        with_(
            "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight",
            torch.zeros(32, 96),
        ),
        AdapterInvalid,
        "stacks all experts",
    ),
    # As a quantized file has them.
    "integers": (
        with_(f"{Q}.lora_A.weight", torch.zeros(4, 96, dtype=torch.int8)),
        AdapterInvalid,
        r"is I8 \[4, 96\]",
    ),
    "a vector": (
        with_(f"{Q}.lora_A.weight", torch.zeros(96)),
        AdapterInvalid,
        "must be a matrix of floats",
    ),
    "A's rank is not B's": (
        with_(f"{Q}.lora_A.weight", torch.zeros(5, 96)),
        AdapterInvalid,
        r"has A \[5, 96\] and B \[192, 4\]",
    ),
    "transposed": (
        transposed,
        AdapterInvalid,
        "A's rows",
    ),
    # A rank of 4 and an input of 64, where the base has 96.
    "another width": (
        with_(f"{Q}.lora_A.weight", torch.zeros(4, 64)),
        AdapterForOtherBase,
        r"q_proj is 192 x 64, and the base model's is 192 x 96",
    ),
    "a smaller output": (
        with_(f"{Q}.lora_B.weight", torch.zeros(128, 4)),
        AdapterForOtherBase,
        "is 128 x 96",
    ),
    "a module of another model": (
        renamed(lambda name: name.replace("layers.3", "layers.9")),
        AdapterForOtherBase,
        r"\(qwen3_moe, 4 layers, 8 experts\) has no model.layers.9",
    ),
    "an expert too many": (
        one_expert_more,
        AdapterForOtherBase,
        "has no model.layers.0.mlp.experts.8",
    ),
}


@pytest.mark.parametrize("case", BROKEN_TENSORS)
def test_broken_tensors(adapter: Path, tiny: Path, case: str) -> None:
    change, error, message = BROKEN_TENSORS[case]
    edit_tensors(adapter, change)
    with pytest.raises(error, match=message) as caught:
        check_adapter(adapter, Limits(64, base=tiny))
    assert type(caught.value) is error and str(adapter) in str(caught.value)


BROKEN_CONFIGS: dict[str, tuple[dict[str, Any], type[AdapterError], str]] = {
    # What vLLM reads without a default.
    "no r": ({"r": ...}, AdapterInvalid, "r is missing; vLLM reads it"),
    "no alpha": ({"lora_alpha": ...}, AdapterInvalid, "lora_alpha is missing"),
    "no target_modules": ({"target_modules": ...}, AdapterInvalid, "target_modules is missing"),
    "r is 0": ({"r": 0}, AdapterInvalid, "r must be a positive whole number, got 0"),
    "r is text": ({"r": "8"}, AdapterInvalid, "got '8'"),
    # alpha / r would be another scale.
    "another rank": ({"r": 8}, AdapterInvalid,
                     "has rank 4, but adapter_config.json says 8; its scale would be wrong"),
    "no rank_pattern": ({"rank_pattern": {}}, AdapterInvalid,
                        "mlp.gate has rank 3, but adapter_config.json says 4"),
    "DoRA": ({"use_dora": True}, AdapterInvalid, "does not serve use_dora=True"),
    "bias": ({"bias": "all"}, AdapterInvalid, "does not serve bias='all'"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, AdapterInvalid,
                      r"modules_to_save=\['lm_head'\]"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, AdapterInvalid,
              "init_lora_weights='pissa_niter_4'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_broken_configs(adapter: Path, case: str) -> None:
    changes, error, message = BROKEN_CONFIGS[case]
    edit_config(adapter, **changes)
    with pytest.raises(error, match=message):
        check_adapter(adapter)


def test_experts_of_different_ranks(adapter: Path) -> None:
    def change(tensors: dict) -> dict:
        a = f"{EXPERT}.up_proj.lora_A.weight"
        b = f"{EXPERT}.up_proj.lora_B.weight"
        return tensors | {a: tensors[a][:2].contiguous(), b: tensors[b][:, :2].contiguous()}

    edit_tensors(adapter, change)
    # The config says so too: not a contradiction, but not what vLLM stacks.
    pattern = {"gate": 3, r"layers\.2\.mlp\.experts\.5\.up_proj": 2}
    edit_config(adapter, rank_pattern=pattern)
    with pytest.raises(
        AdapterInvalid, match=r"layers.2.mlp.experts.\*.up_proj has ranks \[2, 4\]; must be one"
    ):
        check_adapter(adapter)


def test_the_server_s_limits(adapter: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AdapterRankTooLarge, match="has rank 4, and the server takes up to 1; .*--max-lora-rank"
    ):
        check_adapter(adapter, Limits(max_rank=1))
    with pytest.raises(
        AdapterTargetsUnserved,
        match=r"mlp.gate needs 'gate', and the server adapts experts, o_proj, qkv_proj",
    ):
        check_adapter(adapter, Limits(target_modules=("qkv_proj", "o_proj", "experts")))
    head = make_adapter(tmp_path / "head", tiny, 0, target_modules=["lm_head"])
    with pytest.raises(AdapterTargetsUnserved, match="lm_head needs 'lm_head'"):
        check_adapter(head, Limits(target_modules=("qkv_proj",)))


def test_files_that_are_missing_or_cut_short(adapter: Path) -> None:
    weights = (adapter / WEIGHTS).read_bytes()
    for content in (
        weights[:-1],
        weights[:4],
        b"",
        b"not safetensors at all",
        weights[: len(weights) // 2],
    ):
        (adapter / WEIGHTS).write_bytes(content)
        with pytest.raises(AdapterInvalid, match="is not a whole safetensors file"):
            check_adapter(adapter)
    (adapter / CONFIG).write_text('{"r": 4,')
    with pytest.raises(AdapterInvalid, match=r"adapter_config.json:1: not valid JSON"):
        check_adapter(adapter)
    for name in (WEIGHTS, CONFIG):
        (adapter / name).unlink()
        with pytest.raises(AdapterNotFound, match=f"is not an adapter folder: it has no {name}"):
            check_adapter(adapter)
        with pytest.raises(AdapterNotFound, match="is not an adapter folder"):
            content_hash(adapter)
    with pytest.raises(AdapterNotFound, match="is not a folder"):
        check_adapter(adapter / "nowhere")


def test_a_hash_says_what_is_in_a_folder(tiny: Path, tmp_path: Path) -> None:
    first = make_adapter(tmp_path / "first", tiny, seed=0)
    again = make_adapter(tmp_path / "again", tiny, seed=0)
    other = make_adapter(tmp_path / "other", tiny, seed=1)
    assert content_hash(first) == content_hash(again) != content_hash(other)
    assert len(content_hash(first)) == 12 and int(content_hash(first), 16) >= 0
    # The same tensors with another scale are another adapter.
    edit_config(again, lora_alpha=16)
    assert content_hash(first) != content_hash(again), "the scale is in the config"
    # A and B, in four layers, of four projections, the router and three projections of 8 experts.
    assert tensor_count(first) == len(read_adapter_files(first).tensors) == 4 * 2 * (4 + 1 + 8 * 3)


def test_finite_numbers_of_every_dtype(tmp_path: Path) -> None:
    """The largest finite ones, and zeros, are finite; checked against torch."""
    path = tmp_path / WEIGHTS
    (tmp_path / CONFIG).write_text("{}")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        limits = torch.finfo(dtype)
        numbers = torch.tensor(
            [0.0, -0.0, limits.max, limits.min, limits.tiny], dtype=torch.float64
        )
        for bad in (None, math.nan, -math.nan, math.inf, -math.inf):
            tensor = numbers.to(dtype)
            if bad is not None:
                tensor = torch.cat([tensor, torch.tensor([bad], dtype=dtype)])
            save_file({"a": torch.zeros(1, dtype=dtype), "b": tensor.clone()}, path)
            found = AdapterWeights(tmp_path).not_finite()
            assert found == (None if torch.isfinite(tensor).all() else "b")


@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen2_moe"])
def test_base_modules_are_the_model_s_linears(tmp_path: Path, arch: str) -> None:
    """Against the names and sizes of transformers' own checkpoint."""
    from safetensors import safe_open

    base = make_tiny(tmp_path / "base", arch=arch, num_hidden_layers=2, mlp_only_layers=[1])
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    sizes = {}
    for name, file in index.items():
        with safe_open(str(base / file), "pt") as shard:
            shape = shard.get_slice(name).get_shape()
        if len(shape) == 2:
            sizes[name.removesuffix(".weight")] = tuple(shape)
    # stored as [vocabulary, hidden]
    # An embedding maps tokens to hidden states.
    sizes["model.embed_tokens"] = sizes["model.embed_tokens"][::-1]
    shape = model_shape(read_hf_config(base))
    assert base_modules(shape) == sizes and layer_projections(shape, 0)
