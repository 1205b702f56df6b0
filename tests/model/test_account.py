"""The account of tensors: what a model needs against what a folder stores, both ways, before a
weight is read."""

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
from megalora.hf.tensor_names import published_name
from megalora.model import hf_weights as bridge_base
from megalora.model.account import needed_tensors, open_folder, unused_note
from megalora.model.fields import model_shape
from megalora.tiny import make_tiny
from tests.distributed.ranks import run_ranks
from tests.model.accounts import copy_of, refusal
from tests.named_tensors import cast, renamed, without
from tests.oracles.base import (
    Tensors,
    failure_of,
    make_base,
    own_logits,
    rewrite,
    stored_tensors,
    transformers_logits,
)

AT = "model.layers.1"
VARIANTS = [
    ("qwen3_moe", {}),
    ("qwen3_moe", {"mlp_only_layers": [1], "attention_bias": True}),
    ("qwen3_moe", {"tie_word_embeddings": True, "decoder_sparse_step": 2}),
    ("qwen3_moe", {"num_experts": 0, "num_experts_per_tok": 0}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    ("qwen2_moe", {"mlp_only_layers": [0]}),
    ("qwen2_moe", {"qkv_bias": False, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("arch", "overrides"), VARIANTS[:3] + VARIANTS[4:])
def test_needed_is_what_transformers_saves(
    tmp_path: Path, arch: str, overrides: dict[str, Any]
) -> None:
    folder = make_tiny(tmp_path / "base", arch=arch, **overrides)
    saved = {}
    for shard in weight_shards(folder):
        _, tensors = read_header(folder / shard)
        saved |= {tensor.name: tensor.shape for tensor in tensors}
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


LEFT = [
    ("qwen3_moe", f"{AT}.self_attn.q_proj.bias", (192,)),
    ("qwen3_moe", f"{AT}.mlp.gate.e_score_correction_bias", (8,)),
    ("qwen3_moe", f"{AT}.mlp.experts.8.gate_proj.weight", (80, 96)),
    ("qwen3_moe", f"{AT}.mlp.experts.gate_up_proj", (8, 160, 96)),  # the same experts twice
    ("qwen3_moe", "model.layers.0.mlp.gate.weight", (8, 96)),  # a router in a dense layer
    ("qwen3_moe", "model.layers.2.input_layernorm.weight", (96,)),
    ("qwen3_moe", f"{AT}.mlp.shared_expert.up_proj.weight", (80, 96)),
    ("qwen3_moe", f"{AT}.self_attn.sinks", (6,)),
    ("qwen3", f"{AT}.mlp.up_proj.bias", (144,)),
    ("qwen3", "model.visual.patch_embed.weight", (4, 4)),
    ("qwen3", "score.weight", (2, 96)),
    ("qwen3", f"{AT}.self_attn.q_proj.lora_A.weight", (4, 96)),
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
        ("qwen3_moe", "lm_head.weight", (511, 96), (512, 96)),
        ("qwen3_moe", f"{AT}.self_attn.q_proj.weight", (96, 192), (192, 96)),  # transposed
        ("qwen3_moe", f"{AT}.mlp.experts.3.down_proj.weight", (80, 96), (96, 80)),
        ("qwen3_moe", f"{AT}.self_attn.q_norm.weight", (192,), (32,)),  # over all heads
        ("qwen3_moe", "model.norm.weight", (1, 96), (96,)),
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
        kept = {name: t for name, t in tensors.items() if ".mlp.experts." not in name}
        return kept | {"a": torch.zeros(2), "model.norm.weight": torch.zeros(95)}

    said = refusal(rewrite(copy_of(bases["qwen3_moe"], tmp_path / "base"), change))
    assert "24 tensors are missing (" in said
    assert said.count(".experts.") == 3
    assert (
        "; 1 are left over, which nothing would read (a); 1 have another shape (model.norm.weight"
        " is [95]" in said
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t | {"lm_head.weight": torch.ones(512, 96, dtype=torch.int8)},
            "lm_head.weight is I8",
        ),
        (
            lambda t: t | {f"{AT}.mlp.gate.weight": torch.ones(8, 96).to(torch.float8_e5m2)},
            "mlp.gate.weight is F8_E5M2",
        ),
        (
            lambda t: t | {f"{AT}.self_attn.q_proj.weight_scale": torch.ones(1)},
            "q_proj.weight_scale",
        ),
        (
            lambda t: t | {f"{AT}.self_attn.q_proj.qweight": torch.ones(4, 4, dtype=torch.int32)},
            "q_proj.qweight",
        ),
        (
            lambda t: t | {f"{AT}.self_attn.q_proj.weight.absmax": torch.ones(4)},
            "q_proj.weight.absmax",
        ),
        (
            lambda t: (
                t | {f"{AT}.mlp.experts.gate_up_proj_blocks": torch.ones(4, dtype=torch.uint8)}
            ),
            "gate_up_proj_blocks",
        ),
    ],
)
def test_quantised_weights_and_other_dtypes(
    bases: dict[str, Path], tmp_path: Path, change: Any, said: str
) -> None:
    folder = rewrite(copy_of(bases["qwen3_moe"], tmp_path / "Qwen3-1B-AWQ"), change)
    text = refusal(folder)
    assert "1 tensors are of quantised weights or of a dtype that is not read (" in text
    assert said in text
    assert text.endswith(
        "megalora reads F32, BF16, F16: use the model they were quantised from, Qwen3-1B by this"
        " one's name"
    )


def test_double_precision_is_not_called_quantised(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = rewrite(
        copy_of(bases["qwen3"], tmp_path / "b"),
        cast(torch.float64),
    )
    assert refusal(folder).endswith("megalora reads F32, BF16, F16: save the model in one of these")


def test_half_precision_of_both_kinds_is_read(bases: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        # Neighbours by name, such as the two norms of a layer, get different dtypes.
        kinds = itertools.cycle((torch.float16, torch.bfloat16, torch.float32))
        return {name: tensors[name].to(next(kinds)) for name in sorted(tensors)}

    folder = rewrite(copy_of(bases["qwen3"], tmp_path / "base"), change)
    assert (own_logits(folder) - transformers_logits(folder)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "name_of",
    [
        lambda n: n.removeprefix("model."),
        lambda n: f"model.{n}",
        lambda n: f"model.{n}" if n.startswith("model.") else n,
    ],
    ids=["none", "twice, the head too", "twice"],
)
def test_prefixes_that_transformers_reads(
    bases: dict[str, Path], tmp_path: Path, name_of: Any
) -> None:
    folder = copy_of(bases["qwen2_moe"], tmp_path / "base")
    expected = own_logits(folder)
    rewrite(folder, renamed(name_of))
    assert torch.equal(own_logits(folder), expected)
    assert (transformers_logits(folder) - expected).abs().max() <= 1e-5


def test_the_text_model_of_a_vision_language_checkpoint(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_of(bases["qwen3_moe"], tmp_path / "base")
    expected = own_logits(folder)
    rewrite(folder, renamed(lambda name: name.replace("model.", "model.language_model.", 1)))
    assert torch.equal(own_logits(folder), expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda name: f"module.{name}",
            "All names begin with module.: save the model again without it",
        ),
        (
            lambda name: f"base_model.model.{name}",
            "All names begin with base_model.model.: save the model again",
        ),
        (
            lambda name: name.replace("_proj.weight", "_proj.base_layer.weight"),
            "An adapter is part of this model: merge it",
        ),
        (
            lambda name: "lm_head.bias" if name == "model.norm.weight" else name,
            "read (lm_head.bias)",
        ),
        (
            lambda name: (
                f"{name}.old" if name.endswith(("embed_tokens.weight", "lm_head.weight")) else name
            ),
            "embed_tokens.weight.old)",
        ),
    ],
)
def test_what_to_do_about_names(
    bases: dict[str, Path], tmp_path: Path, change: Any, said: str
) -> None:
    """Nothing is said of a tied head or of attention's biases where neither is at fault."""
    text = refusal(
        rewrite(
            copy_of(bases["qwen3_moe"], tmp_path / "b"),
            renamed(change),
        )
    )
    assert said in text.rsplit("; ", 1)[1]
    assert "tie_word_embeddings" not in text
    assert "Biases" not in text


def test_two_names_for_one_tensor_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = rewrite(
        copy_of(bases["qwen3"], tmp_path / "base"), lambda t: t | {"norm.weight": torch.ones(96)}
    )
    assert "holds model.norm.weight twice: as" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["base_model.norm.weight", "module.model.norm.weight", "_orig_mod.model.norm.weight"]
)
def test_other_prefixes_stay_what_they_are(name: str) -> None:
    assert published_name(name) == name


def test_what_may_be_left_over(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(bases["qwen3_moe"], tmp_path / "base")
    expected = own_logits(folder)
    more = {
        f"{AT}.self_attn.rotary_emb.inv_freq": torch.ones(16),
        "model.rotary_emb.inv_freq": torch.ones(16),
        "mtp.layers.0.input_layernorm.weight": torch.ones(96),
        "model.mtp.fc.weight": torch.ones(96, 192),
    }
    rewrite(folder, lambda tensors: tensors | more)
    assert torch.equal(own_logits(folder), expected)


def tied_variant(tensors: Tensors, kind: str) -> Tensors:
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
    # logits reach 100 here
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
    monkeypatch.setattr(bridge_base.FusedExpertsMapping, "hf_to_megatron", lambda *_: None)
    (found,) = run_ranks(failure_of, 1, bases["qwen3_moe"])
    names = ", ".join(f"decoder.layers.1.mlp.experts.{name}" for name in ("gate_up", "down"))
    said = (
        f"RuntimeError: 2 of 20 parameters were not written by loading {bases['qwen3_moe']}:"
        f" {names}."
    )
    assert found.startswith(said)


def test_weights_that_are_nan_are_the_folder_s(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(bases["qwen3"], tmp_path / "base")
    tensors = stored_tensors(folder)
    tensors["lm_head.weight"][500, 7] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (found,) = run_ranks(failure_of, 1, folder)
    assert re.match(r"ValueError: .*weights hold NaN, in 1 of 23 .*output_layer.weight", found)


def test_layers_that_predict_several_tokens_ahead_are_passed_over_and_said(tmp_path: Path) -> None:
    """GLM-4.5 stores one as the layer after the last; it is no part of what is trained."""
    base = make_base(tmp_path / "glm", arch="glm4_moe")
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

    other = make_base(tmp_path / "qwen")
    rewrite(other, lambda tensors: tensors | ahead)
    with pytest.raises(ValueError, match="2 are left over, which nothing would read"):
        open_folder(other)
