"""Check that the layer check sees fields of config.json that a built model does not honour.

Behind the back of what refuses such fields: a model is built as it is, and compared with folders
whose config.json or files say something else.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.named_tensors import without
from tests.verify.built import loaded, said
from tests.verify.models import biased, with_config, with_tensors


def _configs(base: Path, folders: dict[str, Path]) -> dict[str, str]:
    """One built base against folders whose config.json or files say something else."""
    with loaded(base) as (chunks, groups):
        return {name: said(chunks, groups, folder) for name, folder in folders.items()}


# Fields that are changed in the folder and not in the built model, as if building had ignored them,
# and the module that must be named.
MOE_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_act": "gelu"}, "layer 3 (MoE), experts"),
    # Equal to ReLU up to 6: an input that drives gates beyond that is needed to tell them apart.
    "activation of clamped gates": ({"hidden_act": "relu6"}, "layer 3 (MoE), experts"),
    "epsilon": ({"rms_norm_eps": 1e-5}, "final norm"),
    "router normalisation": ({"norm_topk_prob": False}, "layer 3 (MoE), router"),
    "experts per token": ({"num_experts_per_tok": 2}, "layer 3 (MoE), router"),
    "rotary base": ({"rope_theta": 1e4,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "layer 3 (MoE), rotary embedding"),
    "linear scaling": ({"rope_parameters": {"rope_type": "linear", "factor": 4.0,
                                            "rope_theta": 1e6}}, "layer 3 (MoE), rotary embedding"),
    "llama3 scaling": (
        {"rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024, "rope_theta": 1e6,
        }},
        "layer 3 (MoE), rotary embedding",
    ),
    "yarn": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0,
                             "original_max_position_embeddings": 1024, "rope_theta": 1e6}},
        "layer 3 (MoE), rotary embedding",
    ),
    # With a factor of 1 the frequencies stay as they are; only the scale of the scores differs.
    "yarn's attention factor": (
        {"rope_parameters": {
            "rope_type": "yarn", "factor": 1.0, "attention_factor": 1.2,
            "original_max_position_embeddings": 4096, "rope_theta": 1e6,
        }},
        "layer 3 (MoE), attention",
    ),
    "scaling in the old field": ({"rope_scaling": {"type": "linear", "factor": 2.0},
                                  "rope_parameters": None}, "layer 3 (MoE), rotary embedding"),
    "sliding window": ({"use_sliding_window": True, "sliding_window": 4},
                       "layer 3 (MoE), attention"),
    # The file has both matrices, and transformers then leaves them apart: equal.
    "tied head": ({"tie_word_embeddings": True}, ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def of_configs(tiny, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("configs")
    folders = {}
    for name, (fields, _) in MOE_FIELDS.items():
        folders[name] = with_config(tiny, out / name, **fields)
    folders["head left out"] = with_tensors(
        with_config(tiny, out / "config", tie_word_embeddings=True), out / "head",
        without("lm_head.weight"),
    )  # fmt: skip
    folders["attention bias"] = with_tensors(
        with_config(tiny, out / "bias", attention_bias=True), out / "biased", biased
    )
    return run_ranks(_configs, 1, tiny, folders)[0]


@pytest.mark.parametrize("name", [*MOE_FIELDS, "head left out", "attention bias"])
def test_a_field_of_config_json_that_is_not_honoured_is_seen(name, of_configs):
    # A bias of q shows first behind the norm that follows it.
    expected = {"head left out": "head", "attention bias": "layer 3 (MoE), query norm"}
    for field, (_, where) in MOE_FIELDS.items():
        expected[field] = where
    start = "base: layer 3 (MoE)"
    if expected[name]:
        start = f"ValueError: train.check_base: {expected[name]}: differs"
    assert of_configs[name].startswith(start), of_configs[name]


# Layers of two kinds: one of each is compared, so that a window on some layers is seen.
DENSE_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_act": "gelu_pytorch_tanh"}, "layer 3 (dense), MLP"),
    "one layer in two slides": (
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2,
         "layer_types": None},
        "layer 3 (dense, sliding_attention), attention",
    ),
    "fewer layers slide": (
        {"layer_types": ["sliding_attention", *["full_attention"] * 3], "use_sliding_window": True,
         "sliding_window": 4},
        "layer 0 (dense, sliding_attention), attention",
    ),
}  # fmt: skip


def test_a_dense_model_s_fields_are_seen_in_the_kind_of_layer_they_change(tiny_dense, tmp_path):
    folders = {}
    for name, (fields, _) in DENSE_FIELDS.items():
        folders[name] = with_config(tiny_dense, tmp_path / name, **fields)
    for name, line in run_ranks(_configs, 1, tiny_dense, folders)[0].items():
        where = DENSE_FIELDS[name][1]
        assert line.startswith(f"ValueError: train.check_base: {where}: differs"), f"{name}: {line}"
