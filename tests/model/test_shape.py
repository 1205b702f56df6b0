"""Compare sizes read from config.json with the parameters that transformers builds from the same
file, and check which layouts can split them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megalora.config import ParallelConfig, RecomputeLayers
from megalora.hf.json_file import read_hf_config
from megalora.model.families import FAMILIES
from megalora.model.fields import model_shape
from megalora.model.shape import ModelShape
from megalora.tiny import make_tiny
from tests.model.published import edited

KNOWN = ", ".join(FAMILIES)
# Sizes of published models, without fields that have nothing to do with them.
QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip
QWEN3_235B_A22B: dict[str, Any] = QWEN3_30B_A3B | {
    "num_hidden_layers": 94, "hidden_size": 4096, "num_attention_heads": 64,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
}  # fmt: skip
QWEN3_4B: dict[str, Any] = {
    "model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 2560, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 9728, "vocab_size": 151936,
    "tie_word_embeddings": True,
}  # fmt: skip
# A made-up model whose numbers have different divisors, so that each limit shows by itself.
SHAPE = ModelShape(
    model_type="qwen3_moe", num_layers=12, hidden=96, num_heads=24, num_kv_heads=8, head_dim=32,
    intermediate=144,
    vocab=512, tied_embeddings=False, num_experts=30, top_k=3, expert_intermediate=50,
    moe_layers=frozenset(range(12)),
)  # fmt: skip


def num_parameters_in_transformers(folder: Path) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    # A tied matrix is one parameter, and counts once.
    model.tie_weights()
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("arch", "overrides", "moe_layers"),
    [
        ("qwen3_moe", {}, {0, 1, 2, 3}),
        ("qwen3_moe", {"mlp_only_layers": [1]}, {0, 2, 3}),
        # Every second layer has experts, counted from 1.
        ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 5}, {1, 3}),
        # Layers 1 and 3 by the step, of which 3 is excepted.
        ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [0, 3]}, {1}),
        ("qwen3_moe", {"tie_word_embeddings": True}, {0, 1, 2, 3}),
        ("qwen2_moe", {}, {0, 1, 2, 3}),
        ("qwen2_moe", {"qkv_bias": False, "mlp_only_layers": [1]}, {0, 2, 3}),
        ("qwen3", {}, set()),
        # 6 heads of 18 are 108 features, not the 96 hidden ones.
        ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 3, "head_dim": 18}, set()),
        ("qwen3", {"attention_bias": True}, set()),
        ("qwen3_moe", {"attention_bias": True, "num_key_value_heads": 1}, {0, 1, 2, 3}),
    ],
)
def test_num_parameters_of_a_model(
    tmp_path: Path, arch: str, overrides: dict[str, Any], moe_layers: set[int]
) -> None:
    folder = make_tiny(tmp_path / "base", arch=arch, **overrides)
    shape = model_shape(read_hf_config(folder))
    assert shape.moe_layers == moe_layers
    for layer in range(shape.num_layers):
        assert shape.is_moe(layer) == (layer in moe_layers)
    assert shape.num_parameters() == num_parameters_in_transformers(folder)


# Model cards round these to 30.5 B, 235 B and 4.0 B.
@pytest.mark.parametrize(
    ("hf", "num_parameters"),
    [
        (QWEN3_30B_A3B, 30_532_122_624),
        (QWEN3_235B_A22B, 235_093_634_560),
        (QWEN3_4B, 4_022_468_096),
    ],
)
def test_num_parameters_of_published_models(
    tmp_path: Path, hf: dict[str, Any], num_parameters: int
) -> None:
    assert model_shape(hf).num_parameters() == num_parameters
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert num_parameters_in_transformers(tmp_path) == num_parameters


def test_every_size_is_read() -> None:
    # Written out a second time, because two sizes may be mixed up without changing the count.
    assert model_shape(QWEN3_30B_A3B) == ModelShape(
        model_type="qwen3_moe", num_layers=48, hidden=2048, num_heads=32, num_kv_heads=4,
        head_dim=128,
        intermediate=6144, vocab=151936, tied_embeddings=False, num_experts=128, top_k=8,
        expert_intermediate=768,
        moe_layers=frozenset(range(48)),
    )  # fmt: skip
    assert model_shape(QWEN3_4B) == ModelShape(
        model_type="qwen3", num_layers=36, hidden=2560, num_heads=32, num_kv_heads=8, head_dim=128,
        intermediate=9728, vocab=151936, tied_embeddings=True,
    )  # fmt: skip


def test_other_spellings() -> None:
    renamed = edited(QWEN3_30B_A3B, {"num_experts": ..., "num_local_experts": 128})
    assert model_shape(renamed) == model_shape(QWEN3_30B_A3B)
    bare = edited(
        QWEN3_30B_A3B, {"head_dim": ..., "tie_word_embeddings": ..., "mlp_only_layers": ...}
    )
    shape = model_shape(bare | {"num_key_value_heads": None, "decoder_sparse_step": None})
    # transformers' defaults: no grouping of heads, 2048 / 32 features each, an own head.
    assert (shape.num_kv_heads, shape.head_dim, shape.tied_embeddings) == (32, 64, False)
    assert shape.moe_layers == set(range(48))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        # 3 divides the 24 heads but not the 8 key/value heads; 24 divides the heads and is a
        # multiple of 8, whose heads are then replicated on three ranks each; 16 is neither.
        (
            {"tp": 3},
            (
                "parallel.tp=3 does not fit the model's 24 attention heads and 8 key/value heads;"
                " it can be one of 1, 2, 4, 8, 24"
            ),
        ),
        (
            {"tp": 16},
            (
                "parallel.tp=16 does not fit the model's 24 attention heads and 8 key/value heads;"
                " it can be one of 1, 2, 4, 8, 24"
            ),
        ),
        (
            {"pp": 5},
            (
                "parallel.pp * vpp=5 does not divide the model's 12 layers; it can be one of 1, 2,"
                " 3, 4, 6, 12, or set parallel.stage_layers=[2,3,3,3,1]"
            ),
        ),
        # 4 stages in 2 parts each: 12 layers cannot be cut into 8.
        (
            {"pp": 4, "vpp": 2},
            (
                "parallel.pp * vpp=8 does not divide the model's 12 layers; it can be one of 1, 2,"
                " 3, 4, 6, 12, or set parallel.stage_layers=[1,2,2,2,2,1,1,1]"
            ),
        ),
        # More stages than layers: no list could help.
        (
            {"pp": 13},
            (
                "parallel.pp * vpp=13 does not divide the model's 12 layers; it can be one of 1, 2,"
                " 3, 4, 6, 12"
            ),
        ),
        (
            {"pp": 3, "stage_layers": (4, 5, 4)},
            "parallel.stage_layers=[4,5,4] are 13 layers in all, and the model has 12",
        ),
        (
            {"ep": 4},
            (
                "parallel.ep=4 does not divide the model's 30 experts; it can be one of 1, 2, 3, 5,"
                " 6, 10, 15, 30"
            ),
        ),
        (
            {"etp": 4},
            (
                "parallel.etp=4 does not divide the model's 50 features per expert; it can be one"
                " of 1, 2, 5, 10, 25, 50"
            ),
        ),
    ],
)
def test_layout_refused(layout: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        SHAPE.check_layout(ParallelConfig(**layout))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("sizes", "layout", "message"),
    [
        # A prime number, as an unpadded vocabulary may be.
        (
            {"vocab": 509},
            {"tp": 2},
            (
                "parallel.tp=2 does not divide the model's 509 vocabulary entries; it can be one of"
                " 1, 509"
            ),
        ),
        (
            {"num_heads": 22},
            {"tp": 4},
            (
                "parallel.tp=4 does not fit the model's 22 attention heads and 8 key/value heads;"
                " it can be one of 1, 2"
            ),
        ),
        # The width of a dense MLP matters only if some layer has one.
        (
            {"moe_layers": frozenset({0, 2}), "intermediate": 142},
            {"tp": 4},
            (
                "parallel.tp=4 does not divide the model's 142 dense MLP features; it can be one of"
                " 1, 2, 71, 142"
            ),
        ),
        (
            {"moe_layers": frozenset(), "num_experts": 0},
            {"ep": 2},
            "parallel.ep=2, parallel.etp=1: this model (qwen3_moe) has no experts; set both to 1",
        ),
        (
            {"moe_layers": frozenset(), "num_experts": 0},
            {"etp": 2},
            "parallel.ep=1, parallel.etp=2: this model (qwen3_moe) has no experts; set both to 1",
        ),
    ],
)
def test_layout_refused_for_another_model(
    sizes: dict[str, Any], layout: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        replace(SHAPE, **sizes).check_layout(ParallelConfig(**layout))
    assert str(caught.value) == message


def test_the_largest_of_unequal_stages_bounds_what_a_rank_recomputes() -> None:
    p = ParallelConfig(pp=2, vpp=2, stage_layers=(1, 4, 2, 5))
    SHAPE.check_layout(p, RecomputeLayers(layers=9))
    with pytest.raises(ValueError, match="layers=10: a rank has 9 of the model's 12 layers"):
        SHAPE.check_layout(p, RecomputeLayers(layers=10))


def test_layout_accepted() -> None:
    # Larger than 1 everywhere: 24 heads / 8, 12 layers / 6, 30 experts / 15, 50 features / 25.
    SHAPE.check_layout(ParallelConfig(tp=8, pp=3, vpp=2, ep=15, etp=25))
    # 142 / 4 is no whole number, but every layer has experts in place of that MLP.
    replace(SHAPE, intermediate=142).check_layout(ParallelConfig(tp=4))


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (
            {"model_type": "gpt2"},
            f"model_type 'gpt2' is not supported; megalora knows {KNOWN}",
        ),
        ({}, f"model_type 'nothing' is not supported; megalora knows {KNOWN}"),
        (
            {
                "model_type": "qwen3",
                "num_hidden_layers": 3,
                "hidden_size": 8,
                "intermediate_size": 2,
            },
            (
                "config.json of a qwen3 model must have num_attention_heads, num_key_value_heads,"
                " vocab_size, head_dim"
            ),
        ),
        # A dense model's sizes under an MoE family's name.
        (
            QWEN3_4B | {"model_type": "qwen3_moe"},
            (
                "config.json of a qwen3_moe model must have num_experts, num_experts_per_tok,"
                " moe_intermediate_size"
            ),
        ),
    ],
)
def test_config_refused(hf: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        model_shape(hf)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{folder} is not a Hugging Face model folder: it has no config.json"),
        (
            b'{\n "a": 1\n "b": 2}',
            "{folder}/config.json:3: not valid JSON (Expecting ',' delimiter, column 2)",
        ),
        (b"[1]", "{folder}/config.json: must be a JSON object, got list"),
        (b'{"a": "\xff"}', "{folder}/config.json: not UTF-8 (invalid start byte, byte 8)"),
    ],
)
def test_config_file_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_hf_config(tmp_path)
    assert type(caught.value) is ValueError
    assert str(caught.value) == message.format(folder=tmp_path)
