"""Check the account of tensors: what a model needs against what a folder stores, both ways, before
a weight is read."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megalora.hf.folder import weight_shards
from megalora.hf.json_file import read_hf_config
from megalora.hf.safetensors import read_header
from megalora.model import hf_weights as bridge_base
from megalora.model.account import needed_tensors, open_folder, unused_note
from megalora.model.fields import model_shape
from megalora.tiny import make_tiny
from tests.distributed.ranks import run_ranks
from tests.model.accounts import copy_of, refusal
from tests.named_tensors import cast, without, without_parts
from tests.oracles.base import (
    Tensors,
    failure_of,
    make_base,
    own_logits,
    rewrite,
    stored_tensors,
    transformers_logits,
)

# The second layer: of the MoE bases, the first is dense.
AT = "model.layers.1"


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {"mlp_only_layers": [1], "attention_bias": True}),
        ("qwen3_moe", {"tie_word_embeddings": True, "decoder_sparse_step": 2}),
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
        ("qwen2_moe", {"mlp_only_layers": [0]}),
        ("qwen2_moe", {"qkv_bias": False, "tie_word_embeddings": True}),
    ],
)
def test_needed_is_what_transformers_saves(
    tmp_path: Path, arch: str, overrides: dict[str, Any]
) -> None:
    folder = make_tiny(tmp_path / "base", arch=arch, **overrides)
    saved = {}
    for shard in weight_shards(folder):
        _, tensors = read_header(folder / shard)
        for tensor in tensors:
            saved[tensor.name] = tensor.shape
    # transformers' own model wrote these files, so names and shapes are its answer, not ours.
    assert needed_tensors(model_shape(read_hf_config(folder))) == saved
    assert open_folder(folder).places.keys() == saved.keys()


# A tensor of every kind of layer, and of its first and last expert.
MISSING = [
    ("qwen3_moe", "model.embed_tokens.weight"),
    ("qwen3_moe", "lm_head.weight"),
    ("qwen3_moe", "model.norm.weight"),
    ("qwen3_moe", f"{AT}.input_layernorm.weight"),
    ("qwen3_moe", f"{AT}.post_attention_layernorm.weight"),
    ("qwen3_moe", f"{AT}.self_attn.q_proj.weight"),
    ("qwen3_moe", f"{AT}.self_attn.v_proj.weight"),
    ("qwen3_moe", f"{AT}.self_attn.o_proj.weight"),
    ("qwen3_moe", f"{AT}.self_attn.k_norm.weight"),
    ("qwen3_moe", f"{AT}.mlp.gate.weight"),
    ("qwen3_moe", f"{AT}.mlp.experts.0.gate_proj.weight"),
    ("qwen3_moe", f"{AT}.mlp.experts.7.down_proj.weight"),
    ("qwen3_moe", "model.layers.0.mlp.up_proj.weight"),
    ("qwen3", f"{AT}.self_attn.q_proj.bias"),
    ("qwen3", f"{AT}.self_attn.o_proj.bias"),
    ("qwen3", f"{AT}.mlp.down_proj.weight"),
    ("qwen2_moe", f"{AT}.self_attn.k_proj.bias"),
    ("qwen2_moe", f"{AT}.mlp.shared_expert_gate.weight"),
    ("qwen2_moe", f"{AT}.mlp.shared_expert.gate_proj.weight"),
]


@pytest.mark.parametrize(("arch", "name"), MISSING)
def test_a_missing_tensor_is_named(
    bases: dict[str, Path], tmp_path: Path, arch: str, name: str
) -> None:
    folder = copy_of(bases[arch], tmp_path / "base")
    rewrite(folder, without(name))
    said = refusal(folder)
    assert said.startswith(
        f"{folder} does not hold the model that its config.json describes: 1 tensors are missing"
        f" ({name})"
    )
    # A missing head is most often a tied one whose flag was lost.
    assert ("tie_word_embeddings=true" in said) == (name == "lm_head.weight")


# Tensors that change what the model computes, so that a run without them would train another model.
LEFT = [
    # A bias that the config does not announce, and DeepSeek's bias of the router.
    ("qwen3_moe", f"{AT}.self_attn.q_proj.bias", (192,)),
    ("qwen3_moe", f"{AT}.mlp.gate.e_score_correction_bias", (8,)),
    # A ninth of 8 experts, and the same experts twice: packed beside one by one.
    ("qwen3_moe", f"{AT}.mlp.experts.8.gate_proj.weight", (80, 96)),
    ("qwen3_moe", f"{AT}.mlp.experts.gate_up_proj", (8, 160, 96)),
    # A router in a dense layer, and a third of two layers.
    ("qwen3_moe", "model.layers.0.mlp.gate.weight", (8, 96)),
    ("qwen3_moe", "model.layers.2.input_layernorm.weight", (96,)),
    # Parts that other families have: shared experts, GPT-OSS's sinks, biases of the MLP.
    ("qwen3_moe", f"{AT}.mlp.shared_expert.up_proj.weight", (80, 96)),
    ("qwen3_moe", f"{AT}.self_attn.sinks", (6,)),
    ("qwen3", f"{AT}.mlp.up_proj.bias", (144,)),
    # The tower of a vision model, the head of a classifier, an adapter that was not merged.
    ("qwen3", "model.visual.patch_embed.weight", (4, 4)),
    ("qwen3", "score.weight", (2, 96)),
    ("qwen3", f"{AT}.self_attn.q_proj.lora_A.weight", (4, 96)),
    # Qwen2 has biases of q, k and v alone, and no norms of heads.
    ("qwen2_moe", f"{AT}.self_attn.o_proj.bias", (96,)),
    ("qwen2_moe", f"{AT}.self_attn.q_norm.weight", (32,)),
]


@pytest.mark.parametrize(("arch", "name", "shape"), LEFT)
def test_a_tensor_that_nothing_reads_is_named(
    bases: dict[str, Path], tmp_path: Path, arch: str, name: str, shape: tuple[int, ...]
) -> None:
    folder = rewrite(
        copy_of(bases[arch], tmp_path / "base"),
        lambda tensors: tensors | {name: torch.zeros(shape)},
    )
    assert f"describes: 1 are left over, which nothing would read ({name})" in refusal(folder)


@pytest.mark.parametrize(
    ("arch", "name", "shape", "needed"),
    [
        # Sizes of the tiny models: 512 entries in the vocabulary, 96 hidden features, 6 heads and
        # 2 key/value heads of 32, experts of 80.
        ("qwen3_moe", "lm_head.weight", (511, 96), (512, 96)),
        # Transposed, as GPT-2's Conv1D stores its weights.
        ("qwen3_moe", f"{AT}.self_attn.q_proj.weight", (96, 192), (192, 96)),
        ("qwen3_moe", f"{AT}.mlp.experts.3.down_proj.weight", (80, 96), (96, 80)),
        # A norm over all heads at once, as OLMoE has it.
        ("qwen3_moe", f"{AT}.self_attn.q_norm.weight", (192,), (32,)),
        # As many numbers in another form, which copying would not notice.
        ("qwen3_moe", "model.norm.weight", (1, 96), (96,)),
        # The queries' bias in place of the values'.
        ("qwen3", f"{AT}.self_attn.v_proj.bias", (192,), (64,)),
        ("qwen2_moe", f"{AT}.mlp.shared_expert_gate.weight", (96,), (1, 96)),
    ],
)
def test_another_shape_is_named_with_both(
    bases: dict[str, Path],
    tmp_path: Path,
    arch: str,
    name: str,
    shape: tuple[int, ...],
    needed: tuple[int, ...],
) -> None:
    folder = rewrite(
        copy_of(bases[arch], tmp_path / "base"),
        lambda tensors: tensors | {name: torch.zeros(shape)},
    )
    assert (
        f"describes: 1 have another shape ({name} is {list(shape)}, needed {list(needed)})"
        in refusal(folder)
    )


def test_many_are_counted_and_three_named(bases: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        kept = without_parts(".mlp.experts.")(tensors)
        return kept | {"a": torch.zeros(2), "model.norm.weight": torch.zeros(95)}

    said = refusal(rewrite(copy_of(bases["qwen3_moe"], tmp_path / "base"), change))
    # Gate, up and down of 8 experts in the one layer that has some.
    assert "24 tensors are missing (" in said
    assert said.count(".experts.") == 3
    assert (
        "; 1 are left over, which nothing would read (a); 1 have another shape (model.norm.weight"
        " is [95]" in said
    )


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        # A weight of the model in a dtype that is not read ...
        ("lm_head.weight", torch.ones(512, 96, dtype=torch.int8), "lm_head.weight is I8"),
        (
            f"{AT}.mlp.gate.weight",
            torch.ones(8, 96).to(torch.float8_e5m2),
            "mlp.gate.weight is F8_E5M2",
        ),
        # ... or tensors beside it that give the format away: FP8 and compressed-tensors, GPTQ and
        # AWQ, bitsandbytes, MXFP4.
        (f"{AT}.self_attn.q_proj.weight_scale", torch.ones(1), "q_proj.weight_scale"),
        (
            f"{AT}.self_attn.q_proj.qweight",
            torch.ones(4, 4, dtype=torch.int32),
            "q_proj.qweight",
        ),
        (f"{AT}.self_attn.q_proj.weight.absmax", torch.ones(4), "q_proj.weight.absmax"),
        (
            f"{AT}.mlp.experts.gate_up_proj_blocks",
            torch.ones(4, dtype=torch.uint8),
            "gate_up_proj_blocks",
        ),
    ],
)
def test_quantised_weights_and_other_dtypes(
    bases: dict[str, Path], tmp_path: Path, name: str, tensor: torch.Tensor, said: str
) -> None:
    folder = copy_of(bases["qwen3_moe"], tmp_path / "Qwen3-1B-AWQ")
    rewrite(folder, lambda tensors: tensors | {name: tensor})
    text = refusal(folder)
    assert "1 tensors are of quantised weights or of a dtype that is not read (" in text
    assert said in text
    assert text.endswith(
        "megalora reads F32, BF16, F16: use the model they were quantised from, Qwen3-1B by this"
        " one's name"
    )


def test_double_precision_is_not_called_quantised(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = rewrite(copy_of(bases["qwen3"], tmp_path / "b"), cast(torch.float64))
    assert refusal(folder).endswith("megalora reads F32, BF16, F16: save the model in one of these")


def test_half_precision_of_both_kinds_is_read(bases: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        # Neighbours by name, such as the two norms of a layer, get different dtypes.
        kinds = itertools.cycle((torch.float16, torch.bfloat16, torch.float32))
        return {name: tensors[name].to(next(kinds)) for name in sorted(tensors)}

    folder = rewrite(copy_of(bases["qwen3"], tmp_path / "base"), change)
    # Both widen what is stored to float32, and compute the same.
    assert (own_logits(folder) - transformers_logits(folder)).abs().max() <= 1e-5


def test_what_may_be_left_over(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(bases["qwen3_moe"], tmp_path / "base")
    expected = own_logits(folder)
    # Inverse frequencies, which older transformers stored and the config implies, and layers that
    # predict several tokens ahead (Qwen3-Next). Ones would change the logits if they were read.
    more = {
        f"{AT}.self_attn.rotary_emb.inv_freq": torch.ones(16),
        "model.rotary_emb.inv_freq": torch.ones(16),
        "mtp.layers.0.input_layernorm.weight": torch.ones(96),
        "model.mtp.fc.weight": torch.ones(96, 192),
    }
    rewrite(folder, lambda tensors: tensors | more)
    assert torch.equal(own_logits(folder), expected)


def tied_variant(tensors: Tensors, kind: str) -> Tensors:
    """The tensors with head and embedding stored as ``kind`` says; they are different as made."""
    embedding = tensors["model.embed_tokens.weight"]
    if kind == "both equal":
        return tensors | {"lm_head.weight": embedding}
    if kind == "head alone":
        return without("model.embed_tokens.weight")(tensors)
    if kind == "embedding alone":
        return without("lm_head.weight")(tensors)
    return tensors


@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen3", "qwen2_moe"])
@pytest.mark.parametrize("kind", ["both equal", "head alone", "embedding alone", "both, different"])
def test_a_tie_flag_and_the_weights(
    bases: dict[str, Path], tmp_path: Path, arch: str, kind: str
) -> None:
    """tie_word_embeddings=true means what transformers 5 makes of it, whatever is stored."""
    folder = copy_of(bases[arch], tmp_path / "base")
    rewrite(folder, lambda tensors: tied_variant(tensors, kind), tie_word_embeddings=True)
    assert open_folder(folder).shape.tied_embeddings == (kind != "both, different")
    # An embedding as the head gives logits up to 100, whose last bit is 8e-6 in float32.
    assert (own_logits(folder) - transformers_logits(folder)).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["head alone", "embedding alone"])
def test_an_untied_model_needs_both(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """transformers would draw the missing one at random."""
    folder = rewrite(
        copy_of(bases["qwen3"], tmp_path / "base"), lambda tensors: tied_variant(tensors, kind)
    )
    assert "1 tensors are missing" in refusal(folder)


def test_a_parameter_that_loading_leaves_out_stops_the_run(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bridge passes over what a mapping returns nothing for, and uninitialised memory would
    train."""
    # The two fused weights of the MoE layer are left as they were allocated.
    monkeypatch.setattr(bridge_base.FusedExpertsMapping, "hf_to_megatron", lambda *_: None)
    (found,) = run_ranks(failure_of, 1, bases["qwen3_moe"])
    experts = "decoder.layers.1.mlp.experts"
    said = (
        f"RuntimeError: 2 of 20 parameters were not written by loading {bases['qwen3_moe']}:"
        f" {experts}.gate_up, {experts}.down."
    )
    assert found.startswith(said)


def test_weights_that_are_nan_are_the_folder_s(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(bases["qwen3"], tmp_path / "base")
    tensors = stored_tensors(folder)
    # One number of one token's row: without a check, the loss would be NaN from the first step on.
    tensors["lm_head.weight"][500, 7] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (found,) = run_ranks(failure_of, 1, folder)
    assert re.match(r"ValueError: .*weights hold NaN, in 1 of 23 .*output_layer.weight", found)


def test_layers_that_predict_several_tokens_ahead_are_passed_over_and_said(tmp_path: Path) -> None:
    """GLM-4.5 stores one as the layer after the last; it is no part of what is trained."""
    base = make_base(tmp_path / "glm", arch="glm4_moe")
    # Layer 2 of a model with layers 0 and 1.
    ahead = {
        "model.layers.2.eh_proj.weight": torch.randn(96, 192),
        "model.layers.2.mlp.gate.weight": torch.randn(8, 96),
    }
    plain = open_folder(base)
    assert unused_note(plain) is None
    found = open_folder(rewrite(base, lambda tensors: tensors | ahead))
    assert found.places.keys() == plain.places.keys()
    note = unused_note(found)
    assert note is not None
    assert "2 tensors under model.layers.2. are not read: that layer predicts several" in note

    # In a family without such layers they are a sign of another model.
    other = make_base(tmp_path / "qwen")
    rewrite(other, lambda tensors: tensors | ahead)
    with pytest.raises(ValueError, match="2 are left over, which nothing would read"):
        open_folder(other)
