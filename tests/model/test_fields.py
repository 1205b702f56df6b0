"""Check the closed list of config fields: published configs pass, and what megalora does not
compute is refused by name and value."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megalora.hf.json_file import read_hf_config
from megalora.model.families import FAMILIES
from megalora.model.fields import (
    HARMLESS,
    check_fields,
    instead_of_quantised,
    model_shape,
)
from megalora.planner.models import find_architecture
from megalora.tiny import make_tiny
from tests.model.published import PUBLISHED, QWEN3, edited
from tests.model.refused_fields import REFUSED
from tests.model.refused_rotary import REFUSED_ROTARY
from tests.model.test_shape import QWEN3_30B_A3B
from tests.oracles.base import make_base, own_logits, rewrite, transformers_logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_published_configs_pass(kind: str) -> None:
    check_fields(PUBLISHED[kind])
    # Copies by Unsloth, and transformers' own saves, add fields that change nothing.
    unsloth = {
        "pad_token_id": 151654,
        "unsloth_fixed": True,
        "_name_or_path": "x",
        "_attn_implementation_autoset": True,
    }
    check_fields(
        PUBLISHED[kind] | unsloth | {"use_mrope": False, "pruned_heads": {}, "sep_token_id": None}
    )


# Fields without which a class's defaults alone would be refused, or would test nothing.
NOT_DEFAULT = {
    # 4,096 features make no whole number for each of 96 heads.
    "glm4_moe": {"head_dim": 128},
    # save_pretrained leaves out what equals the default; one size differs, so that it is written.
    "qwen3_moe": {"num_hidden_layers": 3},
    # The default window of 4,096 is shorter than the default 131,072 positions.
    "mistral": {"sliding_window": None},
}


@pytest.mark.parametrize("arch", FAMILIES)
def test_what_transformers_5_writes_passes(tmp_path: Path, arch: str) -> None:
    """All fields of the class, defaults included, and the shorter file of save_pretrained."""
    config: Any = CONFIG_MAPPING[arch](**NOT_DEFAULT.get(arch, {}))
    # Every field that the class knows, also those of features that are off.
    check_fields(config.to_dict())
    config.save_pretrained(tmp_path)
    written = read_hf_config(tmp_path)
    # transformers 5's spelling; published files mostly have rope_theta and rope_scaling.
    assert "rope_parameters" in written
    sizes = {}
    for name, value in config.to_dict().items():
        if name in FAMILIES[config.model_type].sizes:
            sizes[name] = value
    # Sizes that equal the class's defaults are not in the file, and megalora asks for them.
    check_fields(sizes | written)


@pytest.mark.parametrize("arch", FAMILIES)
def test_what_tiny_writes_passes(tmp_path: Path, arch: str) -> None:
    check_fields(read_hf_config(make_tiny(tmp_path / "base", arch=arch)))


def test_architectures_written_down_pass() -> None:
    for name in ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-235B-A22B"):
        assert model_shape(find_architecture(name)).num_experts == 128


@pytest.mark.parametrize(("kind", "fields", "message"), REFUSED + REFUSED_ROTARY)
def test_refused_by_name_and_value(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_fields(edited(PUBLISHED[kind], fields))
    assert message in str(caught.value)
    # Callers put the folder in front, so that the line says which file is meant.
    assert str(caught.value).startswith("config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields", [{"vocab_size": None}, {"mlp_only_layers": -1}, {"decoder_sparse_step": "F8"}]
)
def test_sizes_alone_are_checked_for_their_type(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"config.json has {next(iter(fields))}="):
        model_shape(QWEN3_30B_A3B | fields)


def test_sizes_alone_do_not_need_a_model_that_can_be_computed() -> None:
    """What serves or merges an adapter asks for the shape alone: vLLM computes sliding windows and
    FP8."""
    fields = {
        "use_sliding_window": True,
        "quantization_config": {"quant_method": "fp8"},
        "hidden_act": "gelu",
    }
    assert model_shape(QWEN3_30B_A3B | fields) == model_shape(QWEN3_30B_A3B)


def test_unknown_fields_pass_where_nothing_is_set() -> None:
    # Configs of newer transformers list features that a model does not use as false, null, zero or
    # empty.
    check_fields(
        QWEN3 | {"mlp_bias": False, "clip_qkv": None, "new_list": [], "new_text": "", "n_group": 0}
    )
    check_fields(QWEN3 | {"is_causal": True})


@pytest.mark.parametrize(
    ("source", "said"),
    [
        # The same publisher has the original under the name without the suffix ...
        ("Qwen/Qwen3-30B-A3B-FP8", "use Qwen/Qwen3-30B-A3B"),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507-FP8", "use Qwen/Qwen3-235B-A22B-Instruct-2507"),
        ("Qwen/Qwen3-30B-A3B-GPTQ-Int4", "use Qwen/Qwen3-30B-A3B"),
        ("Qwen/Qwen3-8B-AWQ", "use Qwen/Qwen3-8B"),
        # ... others publish quantised copies of models that are not theirs.
        (
            "nvidia/Qwen3-30B-A3B-NVFP4",
            "use the model they were quantised from, Qwen3-30B-A3B by this one's name",
        ),
        (
            "RedHatAI/Qwen3-8B-quantized.w4a16",
            "use the model they were quantised from, Qwen3-8B by this one's name",
        ),
        (
            "unsloth/Qwen3-8B-unsloth-bnb-4bit",
            "use the model they were quantised from, Qwen3-8B by this one's name",
        ),
        # A path in the hub's cache, whose folder names hold the publisher and the model.
        ("/c/models--Qwen--Qwen3-8B-FP8/snapshots/0a1b2c", "use Qwen/Qwen3-8B"),
        # A name that says nothing about being quantised.
        ("Qwen/Qwen3-30B-A3B", "use the model they were quantised from"),
        ("", "use the model they were quantised from"),
    ],
)
def test_the_unquantised_model_is_named_where_the_name_tells_it(source: str, said: str) -> None:
    assert instead_of_quantised(source) == said


UNLIKE_THE_DEFAULT: dict[str, Any] = {
    # Another dtype would change the bits of the logits.
    "dtype": "float32", "torch_dtype": "float32", "transformers_version": "4.51.0",
    "temperature": 0.3, "top_p": 0.5, "initializer_range": 0.5,
    "use_cache": False, "router_aux_loss_coef": 0.7, "cache_implementation": "static",
}  # fmt: skip
"""Values for the harmless fields that cannot be 3."""
NOT_TRIED = {
    # How results are returned, and which kernel runs.
    "output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "torchscript",
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "_experts_implementation", "_experts_implementation_internal",
    # Labels of classifiers and dictionaries of settings, which transformers checks against each
    # other.
    "model_type", "id2label", "label2id", "num_labels", "problem_type", "generation_config",
    "task_specific_params", "bad_words_ids",
}  # fmt: skip


def _unlike_the_default(name: str) -> Any:
    """A value for a harmless field that no config of this test has; ``...`` leaves it out."""
    if name in NOT_TRIED:
        return ...
    if name in UNLIKE_THE_DEFAULT:
        return UNLIKE_THE_DEFAULT[name]
    # A token's id, or a number of layers, that the tiny model does not have.
    if name.endswith(("_id", "layers")):
        return 7
    return 3


@torch.no_grad()
@pytest.mark.parametrize("arch", FAMILIES)
def test_harmless_fields_change_nothing_in_transformers(tmp_path: Path, arch: str) -> None:
    fields = read_hf_config(make_tiny(tmp_path / "base", arch=arch, num_hidden_layers=2))
    # Fields that are said to do nothing are set to something, and logits must stay. A family may
    # have a rule for one of them, such as Mistral for its window.
    harmless = {}
    for name in HARMLESS - FAMILIES[arch].others.keys():
        harmless[name] = _unlike_the_default(name)
    logits = []
    for more in ({}, edited({}, harmless)):
        check_fields(fields | more)
        config = AutoConfig.for_model(**{**fields, **more})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        # Drawn anew, because initializer_range does change the weights of a new model.
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        logits.append(model(torch.arange(30)[None]).logits)
    assert torch.equal(*logits)


# Values that no default has: heads of 18 features, 4 * 18 = 72 wider than the 60 hidden features.
UNUSUAL: dict[str, Any] = {
    "rms_norm_eps": 0.02, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 18,
    "hidden_size": 60,
    "rope_theta": 777.0, "tie_word_embeddings": True,
}  # fmt: skip
# One expert per token, whose weight is its probability among all; layer 1 of two is dense.
MOE: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 1,
    "norm_topk_prob": False,
    "mlp_only_layers": [1],
}


@pytest.mark.parametrize(
    ("arch", "fields"),
    [
        ("qwen3", UNUSUAL | {"attention_bias": True}),
        ("qwen3_moe", UNUSUAL | MOE | {"attention_bias": True}),
        # All 8 experts see every token, in the second of the two layers alone.
        (
            "qwen3_moe",
            {"num_experts_per_tok": 8, "norm_topk_prob": False, "decoder_sparse_step": 2},
        ),
        ("qwen2_moe", UNUSUAL | MOE | {"shared_expert_intermediate_size": 28, "qkv_bias": False}),
        ("qwen2_moe", {"norm_topk_prob": True, "num_experts_per_tok": 2, "num_key_value_heads": 1}),
        ("llama", UNUSUAL | {"attention_bias": True}),
        # As many key/value heads as heads: no grouping.
        ("llama", {"num_key_value_heads": 6, "rope_theta": 1e4, "rms_norm_eps": 1e-5}),
        # A window as long as the tiny model's 4,096 positions.
        ("mistral", UNUSUAL | {"sliding_window": 4096}),
        ("mixtral", UNUSUAL | {"num_local_experts": 6, "sliding_window": 4096}),
        ("mixtral", {"num_experts_per_tok": 2, "num_key_value_heads": 6, "rms_norm_eps": 1e-5}),
    ],
)
def test_honoured_fields_are_computed_as_transformers_does(
    tmp_path: Path, arch: str, fields: dict[str, Any]
) -> None:
    base = make_base(tmp_path / "base", arch, **fields)
    # Logits have a spread of 1, of which float32 rounds off 1e-7 in each of some hundred sums.
    assert (own_logits(base) - transformers_logits(base)).abs().max() <= 1e-5


def test_defaults_are_transformers(tmp_path: Path) -> None:
    """A file may leave fields out, or call silu by its other name."""
    # The model is made with transformers' defaults (theta 10,000, weights of experts that are not
    # normalised), which then are removed from its file.
    base = make_base(tmp_path / "base", norm_topk_prob=False, rope_theta=10_000.0)
    rewrite(
        base,
        norm_topk_prob=...,
        rope_theta=...,
        rope_parameters=...,
        hidden_act="swish",
        attention_bias=...,
    )
    assert (own_logits(base) - transformers_logits(base)).abs().max() <= 1e-5
