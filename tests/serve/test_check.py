"""Check adapter folders for what vLLM would refuse, or accept and ignore: each has its own error,
with the value and the fix."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from megalora.adapters.files import CONFIG, WEIGHTS
from megalora.hf.json_file import read_hf_config
from megalora.model.families import layer_projections
from megalora.model.fields import model_shape
from megalora.serve.adapter_files import content_hash, read_adapter_files, tensor_count
from megalora.serve.check import Limits, Needs, base_modules, check_adapter
from megalora.serve.errors import (
    AdapterError,
    AdapterInvalid,
    AdapterNotFound,
    AdapterRankTooLarge,
    AdapterTargetsUnserved,
)
from megalora.tiny import make_tiny
from tests.adapters.folders import edit_config, edit_tensors
from tests.named_tensors import Tensors, renamed
from tests.serve.adapters import EVERYTHING, make_adapter

EXPERT = "base_model.model.model.layers.2.mlp.experts.5"


def test_a_sound_adapter_says_what_it_needs(adapter: Path, tiny: Path, tmp_path: Path) -> None:
    needs = Needs(4, frozenset({"qkv_proj", "o_proj", "experts", "gate"}))
    assert check_adapter(adapter) == needs
    # A server that takes this and no more.
    just_enough = Limits(4, tuple(needs.target_modules), tiny)
    assert check_adapter(adapter, just_enough) == needs
    # vLLM takes the parts of a fused module too.
    by_parts = Limits(4, ("q_proj", "k_proj", "v_proj", "o_proj", "experts", "gate"))
    assert check_adapter(adapter, by_parts) == needs
    # The largest rank counts.
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
    # vLLM's names of fused linears: of a dense MLP, or of a shared expert.
    expected = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    if arch == "qwen2_moe":
        expected |= {"experts", "gate"}
    else:
        # A dense model has no router.
        targets.remove("gate")
    adapter = make_adapter(tmp_path / "a", base, 0, target_modules=targets)
    assert check_adapter(adapter, Limits(base=base)).target_modules == expected


def test_names_without_the_usual_prefix(adapter: Path, tiny: Path) -> None:
    """vLLM takes them, so we do."""
    edit_tensors(adapter, renamed(lambda name: name.removeprefix("base_model.model.")))
    assert check_adapter(adapter, Limits(base=tiny)).rank == 4


# Changes of adapter_config.json, of which ... removes a key; the error, and what it says.
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
    # What changes the model beside scale * B A.
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
    """vLLM stacks a projection of all experts of a layer in one tensor."""

    def narrower(tensors: Tensors) -> Tensors:
        a = f"{EXPERT}.up_proj.lora_A.weight"
        b = f"{EXPERT}.up_proj.lora_B.weight"
        # Two of four ranks: rows of A and columns of B.
        return tensors | {a: tensors[a][:2], b: tensors[b][:, :2]}

    edit_tensors(adapter, narrower)
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
    # A file begins with its header's length, in 8 bytes, and a header that says where tensors end.
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
    # 12 hexadecimal digits: int reads them.
    assert len(content_hash(first)) == 12
    assert int(content_hash(first), 16) >= 0
    # The same tensors with another scale, which is in the config, are another adapter.
    edit_config(again, lora_alpha=16)
    assert content_hash(first) != content_hash(again)
    # A and B, in four layers, of four projections, the router and three projections of 8 experts.
    assert tensor_count(first) == len(read_adapter_files(first).tensors) == 4 * 2 * (4 + 1 + 8 * 3)


@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen2_moe"])
def test_base_modules_are_the_model_s_linears(tmp_path: Path, arch: str) -> None:
    """Against the names and sizes of transformers' own checkpoint."""
    base = make_tiny(tmp_path / "base", arch=arch, num_hidden_layers=2, mlp_only_layers=[1])
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    sizes = {}
    for name, file in index.items():
        with safe_open(str(base / file), "pt") as shard:
            shape = shard.get_slice(name).get_shape()
        # Norms and biases are vectors.
        if len(shape) == 2:
            sizes[name.removesuffix(".weight")] = tuple(shape)
    # Linears are [out, in]. An embedding maps tokens to hidden states and is stored as [in, out].
    sizes["model.embed_tokens"] = sizes["model.embed_tokens"][::-1]
    shape = model_shape(read_hf_config(base))
    assert base_modules(shape) == sizes
    assert layer_projections(shape, 0)
