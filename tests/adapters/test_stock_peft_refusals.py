"""Refuse adapters of stock PEFT that are not plain LoRA, by the name of the option, and files that
lost what their config names."""

from pathlib import Path
from typing import Any

import peft
import pytest

from tests.adapters.folders import remove_tensors
from tests.adapters.stock import new_adapter, read_logits
from tests.peft_warnings import IGNORED

pytestmark = IGNORED

# Base, PEFT's options, and what the refusal says.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    # modules_to_save trains whole weights beside the adapter, of which not all are read.
    "a saved linear": (
        "moe",
        {"modules_to_save": ["o_proj"]},
        r"modules_to_save='o_proj' trains whole what megalora does not .model.layers.0.self_attn.o",
    ),
    "a saved expert": (
        "moe",
        {"modules_to_save": ["mlp.experts"]},
        "modules_to_save='mlp.experts' trains whole .* .no module that megalora knows",
    ),
    "trained tokens of a head": (
        "dense",
        {"trainable_token_indices": {"lm_head": [3, 5]}},
        "trainable_token_indices=.'lm_head': .3, 5.. with 1 tensors of rows; megalora reads token",
    ),
    "repeated layers": (
        "dense",
        {"layer_replication": [[0, 2], [1, 4]]},
        "layer_replication=.*: it repeats layers",
    ),
    # The adapter acts on the tokens behind a text that invokes it, and on no others.
    "activated LoRA": (
        "dense",
        {"alora_invocation_tokens": [5]},
        r"alora_invocation_tokens=\[5\] .* invocation text",
    ),
    # Their base was changed when training began; PEFT can convert the adapter back.
    "PiSSA": (
        "dense",
        {"init_lora_weights": "pissa"},
        "init_lora_weights='pissa' .* path_initial_model_for_weight_conversion",
    ),
    "OLoRA": (
        "dense",
        {"init_lora_weights": "olora"},
        "init_lora_weights='olora' .* changed the base model too",
    ),
    "block-diagonal": (
        "dense",
        {
            "use_bdlora": peft.tuners.lora.config.BdLoraConfig(
                target_modules_bd_a=["q_proj"], nblocks=2
            )
        },
        "use_bdlora=.*: BD-LoRA's factors are block-diagonal",
    ),
    "KaSA": (
        "dense",
        {"kasa_config": peft.tuners.lora.config.KasaConfig()},
        "kasa_config=.*: KaSA truncates the base",
    ),
    # Its A is looked up, not multiplied with.
    "an embedding": (
        "moe",
        {"target_modules": ["q_proj", "embed_tokens"]},
        "embed_tokens has an adapter; megalora does not adapt embeddings. Merge it with PEFT",
    ),
    "the shared expert's gate": (
        "shared",
        {"target_modules": ["shared_expert_gate", "q_proj"]},
        (
            "layers.0.mlp.shared_expert_gate has an adapter; megalora does not adapt it. Merge it"
            " with PEFT"
        ),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    base, options, message = REFUSED[case]
    options = {"target_modules": ["q_proj"]} | options
    new_adapter(bases[base], **options).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        read_logits(tmp_path, bases[base])
    assert "\n" not in str(caught.value)


def test_a_lost_layer_is_missed_where_layers_are_named(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """Without layers_to_transform nobody could tell a lost layer from one that was not adapted."""
    model = new_adapter(
        bases["moe"], target_modules=["q_proj", "o_proj"], layers_to_transform=[0, 3]
    )
    model.save_pretrained(tmp_path)
    remove_tensors(tmp_path, "layers.3.self_attn.o")
    with pytest.raises(
        ValueError,
        match="has no tensors for model.layers.3.self_attn.o_proj, which its config targets",
    ):
        read_logits(tmp_path, bases["moe"])
