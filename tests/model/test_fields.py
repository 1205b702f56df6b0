"""The closed list of config fields: what is published passes, what megalora does not compute is
refused by name and value."""

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
from tests.model.test_shape import QWEN3_30B_A3B
from tests.oracles.base import make_base, own_logits, rewrite, transformers_logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_published_configs_pass(kind: str) -> None:
    check_fields(PUBLISHED[kind])
    unsloth = {
        "pad_token_id": 151654,
        "unsloth_fixed": True,
        "_name_or_path": "x",
        "_attn_implementation_autoset": True,
    }
    check_fields(
        PUBLISHED[kind] | unsloth | {"use_mrope": False, "pruned_heads": {}, "sep_token_id": None}
    )


NOT_DEFAULT = {
    # 4,096 features make no whole number for each of 96 heads
    "glm4_moe": {"head_dim": 128},
    "qwen3_moe": {"num_hidden_layers": 3},  # as a file with layers of its own
    "mistral": {"sliding_window": None},  # the default window is not computed
}


@pytest.mark.parametrize("arch", FAMILIES)
def test_what_transformers_5_writes_passes(tmp_path: Path, arch: str) -> None:
    """All fields of the class, defaults included, and the shorter file of save_pretrained."""
    config: Any = CONFIG_MAPPING[arch](**NOT_DEFAULT.get(arch, {}))
    # Every field that the class knows, also those of features that are off.
    check_fields(config.to_dict())
    config.save_pretrained(tmp_path)
    written = read_hf_config(tmp_path)
    assert "rope_parameters" in written
    sizes = {}
    for name, value in config.to_dict().items():
        if name in FAMILIES[config.model_type].sizes:
            sizes[name] = value
    check_fields(sizes | written)  # the file leaves out what equals the class's default


@pytest.mark.parametrize("arch", FAMILIES)
def test_what_tiny_writes_passes(tmp_path: Path, arch: str) -> None:
    check_fields(read_hf_config(make_tiny(tmp_path / "base", arch=arch)))


def test_architectures_written_down_pass() -> None:
    for name in ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-235B-A22B"):
        assert model_shape(find_architecture(name)).num_experts == 128


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # Known, and with a value that is not computed.
    (
        "qwen3_moe",
        {"hidden_act": "gelu"},
        'hidden_act="gelu"; it must be "silu" or "swish": MLPs and experts',
    ),
    ("qwen3", {"hidden_act": None}, 'hidden_act=null; it must be "silu"'),
    (
        "qwen3",
        {"attention_dropout": 0.1},
        "attention_dropout=0.1; it must be 0: attention has no dropout here",
    ),
    (
        "qwen3_moe",
        {"use_sliding_window": True},
        "use_sliding_window=true; it must be false: attention sees the whole",
    ),
    (
        "qwen3_moe",
        {"output_router_logits": True},
        "output_router_logits=true; it must be false: it adds a balancing",
    ),
    (
        "qwen3",
        {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]},
        "must be full_attention for each of the 28",
    ),
    (
        "qwen3",
        {"layer_types": ["full_attention"] * 27},
        "must be full_attention for each of the 28",
    ),
    (
        "qwen3",
        {"architectures": ["Qwen3ForSequenceClassification"]},
        "a qwen3 model is trained as Qwen3ForCausalLM",
    ),
    ("qwen3_moe", {"norm_topk_prob": "yes"}, 'norm_topk_prob="yes"; it must be true or false'),
    (
        "qwen3_moe",
        {"norm_topk_prob": True, "num_experts_per_tok": 1},
        "norm_topk_prob=true with num_experts_per_tok=1",
    ),
    (
        "qwen3",
        {"use_qk_norm": False, "qk_norm": False},
        "use_qk_norm=false; it must be true: this family has norms",
    ),
    (
        "qwen3",
        {"is_causal": False},
        "is_causal=false; it must be true: every token sees the tokens before it alone",
    ),
    ("qwen3_moe", {"is_causal": None}, "is_causal=null; it must be true"),
    # Of another family, or of nobody.
    (
        "qwen2_moe",
        {"attention_bias": True},
        "attention_bias=true, a field megalora does not know for qwen2_moe",
    ),
    (
        "qwen3_moe",
        {"qkv_bias": True},
        "qkv_bias=true, a field megalora does not know for qwen3_moe",
    ),
    ("qwen3_moe", {"mlp_bias": True}, "mlp_bias=true, a field megalora does not know"),
    (
        "qwen3_moe",
        {"shared_expert_intermediate_size": 512},
        "shared_expert_intermediate_size=512, a field megalora",
    ),
    ("qwen3", {"num_experts": 8}, "num_experts=8, a field megalora does not know for qwen3;"),
    ("qwen2_moe", {"num_local_experts": 8}, "num_local_experts=8, a field megalora does not know"),
    (
        "qwen3_moe",
        {"scoring_func": "sigmoid"},
        'scoring_func="sigmoid", a field megalora does not know',
    ),
    ("qwen3_moe", {"n_group": 8}, "n_group=8, a field"),
    ("qwen3_moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5, a field"),
    ("qwen3", {"logit_scale": 0.1}, "logit_scale=0.1, a field"),
    (
        "qwen3",
        {"dual_chunk_attention_config": {"chunk_size": 8}},
        'dual_chunk_attention_config={"chunk_size": 8}, a field',
    ),
    # Code of the folder's own computes something else.
    ("qwen3", {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map="),
    (
        "qwen3",
        {"original_max_position_embeddings": 32768},
        "original_max_position_embeddings=32768, a field",
    ),
    (
        "qwen3",
        {"rms_norm_epsilon": 1e-5},
        (
            "rms_norm_epsilon=1e-05, a field megalora does not know for qwen3; what it does to"
            " the model would be ignored. Did you mean rms_norm_eps? If it does nothing, remove it"
        ),
    ),
    # Quantised.
    (
        "qwen3",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config (quant_method 'gptq')",
    ),
    (
        "qwen3",
        {"compression_config": {"format": "int"}},
        "compression_config: these weights are quantised",
    ),
    (
        "qwen3",
        {"quantization": {"group_size": 64, "bits": 4}},
        "quantization: these weights are quantised",
    ),
    # No number a model can have.
    ("qwen3", {"rms_norm_eps": float("inf")}, "rms_norm_eps=Infinity; it must be a number above 0"),
    ("qwen3", {"rope_theta": float("nan")}, "rope_theta=nan; it must be a number above 1"),
    ("qwen3", {"vocab_size": None}, "vocab_size=null; it must be a whole number of at least 1"),
    (
        "qwen3",
        {"hidden_size": "1024"},
        'hidden_size="1024"; it must be a whole number of at least 1',
    ),
    (
        "qwen3",
        {"num_hidden_layers": 0},
        "num_hidden_layers=0; it must be a whole number of at least 1",
    ),
    ("qwen3", {"num_attention_heads": [16]}, "num_attention_heads=[16]; it must be"),
    # True is 1 in Python.
    ("qwen3", {"num_hidden_layers": True}, "num_hidden_layers=true; it must be"),
    # Rotary embedding turns pairs of features.
    ("qwen3", {"head_dim": 127}, "head_dim=127; it must be an even number of at least 2"),
    (
        "qwen3",
        {"num_key_value_heads": 3},
        "num_attention_heads=16 is not a multiple of num_key_value_heads=3",
    ),
    ("qwen3", {"rms_norm_eps": 0}, "rms_norm_eps=0; it must be a number above 0"),
    ("qwen3", {"rms_norm_eps": "1e-6"}, 'rms_norm_eps="1e-6"; it must be a number above 0'),
    (
        "qwen3",
        {"tie_word_embeddings": "true"},
        'tie_word_embeddings="true"; it must be true or false, or null',
    ),
    (
        "qwen3",
        {"max_position_embeddings": 1e6},
        "max_position_embeddings=1000000.0; it must be a whole number",
    ),
    (
        "qwen3_moe",
        {"mlp_only_layers": -1},
        "mlp_only_layers=-1; it must be a list of layer numbers from 0 on, or null",
    ),
    (
        "qwen3_moe",
        {"mlp_only_layers": [-1]},
        "mlp_only_layers=[-1]; it must be a list of layer numbers",
    ),
    (
        "qwen3_moe",
        {"decoder_sparse_step": "F8"},
        'decoder_sparse_step="F8"; it must be a whole number of at least 1',
    ),
    (
        "qwen3_moe",
        {"decoder_sparse_step": 0},
        "decoder_sparse_step=0; it must be a whole number of at least 1",
    ),
    (
        "qwen3_moe",
        {"num_experts_per_tok": 129},
        "num_experts_per_tok=129 is more than num_experts=128",
    ),
    (
        "qwen3_moe",
        {"num_local_experts": 64},
        "num_experts=128 and num_local_experts=64; they are one field",
    ),
    ("qwen3_moe", {"attention_bias": 1}, "attention_bias=1; it must be true or false"),
    ("qwen2_moe", {"qkv_bias": None}, "qkv_bias=null; it must be true or false"),
    (
        "qwen2_moe",
        {"head_dim": None, "num_attention_heads": 12, "num_key_value_heads": 12},
        "config.json has no head_dim",
    ),
    # Rotary.
    (
        "qwen3",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling is of type 'dynamic', whose frequencies",
    ),
    ("qwen3", {"rope_scaling": {"rope_type": "longrope"}}, "is of type 'longrope'"),
    (
        "qwen3",
        {"rope_scaling": {"type": "mrope", "mrope_section": [16]}},
        "is of type 'mrope'; megalora computes default, linear",
    ),
    (
        "qwen3",
        {"rope_scaling": {"rope_type": "linear"}},
        "rope_scaling of type 'linear' must have factor",
    ),
    (
        "qwen3",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}},
        "has beta_fast=3, which type 'linear'",
    ),
    (
        "qwen3",
        # The older spelling and the newer one at odds.
        {"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}},
        "must name one kind, as rope_type or as",
    ),
    (
        "qwen3",
        {"rope_scaling": {"rope_type": "yarn", "factor": "4"}},
        "has factor='4'; it must be a number of at least 1",
    ),
    (
        "qwen3",
        {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}},
        "has factor=0.5; it must be a number of at least 1",
    ),
    (
        "qwen3",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4, "truncate": 0}},
        "has truncate=0; it must be true or false",
    ),
    (
        "qwen3",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4,
                "original_max_position_embeddings": 4.5,
            }
        },
        "has original_max_position_embeddings=4.5; it must be a whole number above 0",
    ),
    (
        "qwen3",
        {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
        "must have low_freq_factor, high_freq_factor",
    ),
    (
        "qwen3",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attn_factor": 0.88}},
        "remove it and set attention_factor",
    ),
    ("qwen3", {"rope_scaling": "yarn"}, "rope_scaling='yarn'; it must be an object or null"),
    (
        "qwen3",
        {
            "rope_theta": ...,
            "rope_scaling": {"type": "yarn", "factor": 4.0},
            "rope_parameters": {"rope_theta": 1e6},
        },
        (
            "has rope_scaling, which transformers lets replace rope_parameters with its"
            " rope_theta=1000000.0; it would then take 10,000"
        ),
    ),
    ("qwen3", {"rope_theta": None}, "rope_theta=None; it must be a number above 1"),
    ("qwen3", {"rope_theta": 1}, "rope_theta=1; it must be a number above 1"),
    # Beyond float64.
    ("qwen3", {"rope_theta": 10**400}, "0000; it must be a number above 1"),
    (
        "qwen3",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 0,
                "high_freq_factor": 4.0,
            }
        },
        "has low_freq_factor=0; it must be a number above 0",
    ),
    ("qwen3", {"rope_theta": -1}, "rope_theta=-1; it must be a number above 1"),
    (
        "qwen3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "several rope_theta: 10000.0, 1000000",
    ),
    (
        "qwen3",
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        },
        "has both rope_scaling=",
    ),
    (
        "qwen3",
        # One rotary setting for each kind of layer.
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters has full_attention=",
    ),
    (
        "qwen3",
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor=0.5; models of this family rotate whole heads",
    ),
    (
        "qwen3",
        {"rope_parameters": {"partial_rotary_factor": 0.25}},
        "partial_rotary_factor=0.25; models of this family",
    ),
    ("llama", {"mlp_bias": True}, "mlp_bias=true; it must be false: linears of the MLP"),
    ("llama", {"attention_bias": 1}, "attention_bias=1; it must be true or false"),
    (
        "llama",
        {"sliding_windows": 4},
        "sliding_windows=4, a field megalora does not know for llama",
    ),
    ("llama", {"rope_scaling": {"type": "longrope"}}, "whose frequencies depend on the length"),
    (
        "mistral",
        {"sliding_window": 4096},
        "sliding_window=4096 with max_position_embeddings=32768: attention would see 4096 tokens",
    ),
    ("mistral", {"sliding_window": ...}, "no sliding_window, for which transformers takes 4096"),
    ("mistral", {"sliding_window": 0}, "sliding_window=0; it must be a whole number of at least 1"),
    ("mistral", {"attention_bias": True}, "attention_bias=true, a field megalora does not know"),
    (
        "mixtral",
        {"sliding_window": 4096},
        "sliding_window=4096 with max_position_embeddings=32768: attention would see 4096 tokens",
    ),
    (
        "mixtral",
        {"router_jitter_noise": 0.01},
        "router_jitter_noise=0.01; it must be 0: hidden states are not multiplied with noise",
    ),
    ("mixtral", {"output_router_logits": True}, "output_router_logits=true; it must be false"),
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1: weights of the chosen experts"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than num_local_experts"),
    ("mixtral", {"num_experts": 8}, "num_experts=8, a field megalora does not know for mixtral"),
    ("mixtral", {"norm_topk_prob": True}, "norm_topk_prob=true, a field megalora does not know"),
    ("mixtral", {"attention_bias": True}, "attention_bias=true, a field megalora does not know"),
    ("mixtral", {"hidden_act": "gelu"}, 'hidden_act="gelu"; it must be "silu"'),
]


@pytest.mark.parametrize(("kind", "fields", "message"), REFUSED)
def test_refused_by_name_and_value(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_fields(edited(PUBLISHED[kind], fields))
    assert message in str(caught.value)
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
    check_fields(
        QWEN3 | {"mlp_bias": False, "clip_qkv": None, "new_list": [], "new_text": "", "n_group": 0}
    )
    check_fields(QWEN3 | {"is_causal": True})


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("Qwen/Qwen3-30B-A3B-FP8", "use Qwen/Qwen3-30B-A3B"),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507-FP8", "use Qwen/Qwen3-235B-A22B-Instruct-2507"),
        ("Qwen/Qwen3-30B-A3B-GPTQ-Int4", "use Qwen/Qwen3-30B-A3B"),
        ("Qwen/Qwen3-8B-AWQ", "use Qwen/Qwen3-8B"),
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
        ("/c/models--Qwen--Qwen3-8B-FP8/snapshots/0a1b2c", "use Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-30B-A3B", "use the model they were quantised from"),
        ("", "use the model they were quantised from"),
    ],
)
def test_the_unquantised_model_is_named_where_the_name_tells_it(source: str, said: str) -> None:
    assert instead_of_quantised(source) == said


def _unlike_the_default(name: str) -> Any:
    """A value for a harmless field that no config of this test has."""
    texts = {"dtype": "float32", "torch_dtype": "float32", "transformers_version": "4.51.0"}
    numbers = {
        "temperature": 0.3,
        "top_p": 0.5,
        "sliding_window": 3,
        "initializer_range": 0.5,
        "use_cache": False,
        "router_aux_loss_coef": 0.7,
        "cache_implementation": "static",
    }
    skipped = {
        "model_type",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "output_attentions",
        "output_hidden_states",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_experts_implementation_internal",
        "generation_config",
        "torchscript",
        "return_dict",
        "use_return_dict",
        "task_specific_params",
        "bad_words_ids",
    }
    if name in skipped:  # how results are returned and which kernel runs, or a type of their own
        return ...
    return texts.get(
        name, numbers.get(name, 7 if name.endswith(("_id", "_layers", "layers")) else 3)
    )


@torch.no_grad()
@pytest.mark.parametrize("arch", FAMILIES)
def test_harmless_fields_change_nothing_in_transformers(tmp_path: Path, arch: str) -> None:
    fields = read_hf_config(make_tiny(tmp_path / "base", arch=arch, num_hidden_layers=2))
    # Fields that are said to do nothing are set to something, and logits must stay.
    harmless = HARMLESS - FAMILIES[arch].others.keys()
    logits = []
    for more in (
        {},
        edited({}, {name: _unlike_the_default(name) for name in harmless}),
    ):
        check_fields(fields | more)
        config = AutoConfig.for_model(**{**fields, **more})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        logits.append(model(torch.arange(30)[None]).logits)
    assert torch.equal(*logits)


UNUSUAL: dict[str, Any] = {
    "rms_norm_eps": 0.02, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 18,
    "hidden_size": 60,
    "rope_theta": 777.0, "tie_word_embeddings": True,
}  # fmt: skip
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
        (
            "qwen3_moe",
            {"num_experts_per_tok": 8, "norm_topk_prob": False, "decoder_sparse_step": 2},
        ),
        ("qwen2_moe", UNUSUAL | MOE | {"shared_expert_intermediate_size": 28, "qkv_bias": False}),
        ("qwen2_moe", {"norm_topk_prob": True, "num_experts_per_tok": 2, "num_key_value_heads": 1}),
        ("llama", UNUSUAL | {"attention_bias": True}),
        ("llama", {"num_key_value_heads": 6, "rope_theta": 1e4, "rms_norm_eps": 1e-5}),
        ("mistral", UNUSUAL | {"sliding_window": 4096}),
        ("mixtral", UNUSUAL | {"num_local_experts": 6, "sliding_window": 4096}),
        ("mixtral", {"num_experts_per_tok": 2, "num_key_value_heads": 6, "rms_norm_eps": 1e-5}),
    ],
)
def test_honoured_fields_are_computed_as_transformers_does(
    tmp_path: Path, arch: str, fields: dict[str, Any]
) -> None:
    base = make_base(tmp_path / "base", arch, **fields)
    assert (own_logits(base) - transformers_logits(base)).abs().max() <= 1e-5


def test_defaults_are_transformers(tmp_path: Path) -> None:
    """Fields that a file leaves out: swish by another name, a base of 10,000, weights of experts
    that are not normalised."""
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
