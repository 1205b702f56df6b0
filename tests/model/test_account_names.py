"""Check under which names a base's tensors are read, and what a refusal advises about others."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megalora.hf.tensor_names import published_name
from tests.model.accounts import copy_of, refusal
from tests.named_tensors import renamed
from tests.oracles.base import own_logits, rewrite, transformers_logits


# A model saved without its head's wrapper has no "model."; one that was wrapped once more has it
# twice. transformers reads all of them.
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
    # The same numbers in the same places, so the same bits.
    assert torch.equal(own_logits(folder), expected)
    # transformers sums in another order than Megatron's parts do.
    assert (transformers_logits(folder) - expected).abs().max() <= 1e-5


def test_the_text_model_of_a_vision_language_checkpoint(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_of(bases["qwen3_moe"], tmp_path / "base")
    expected = own_logits(folder)
    rewrite(folder, renamed(lambda name: name.replace("model.", "model.language_model.", 1)))
    assert torch.equal(own_logits(folder), expected)


def with_a_bias_for_a_norm(name: str) -> str:
    return "lm_head.bias" if name == "model.norm.weight" else name


def with_old_vocabulary(name: str) -> str:
    """Embedding and head under other names, as after an extension of the vocabulary by hand."""
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return f"{name}.old"
    return name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        # DDP's wrapper, PEFT's wrapper, and an adapter's layers inside the model.
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
        # A bias that is none of attention's, and a missing head that is not alone: no advice fits.
        (with_a_bias_for_a_norm, "read (lm_head.bias)"),
        (with_old_vocabulary, "embed_tokens.weight.old)"),
    ],
)
def test_what_to_do_about_names(
    bases: dict[str, Path], tmp_path: Path, change: Any, said: str
) -> None:
    """Nothing is said of a tied head or of attention's biases where neither is at fault."""
    text = refusal(rewrite(copy_of(bases["qwen3_moe"], tmp_path / "b"), renamed(change)))
    assert said in text.rsplit("; ", 1)[1]
    assert "tie_word_embeddings" not in text
    assert "Biases" not in text


def test_two_names_for_one_tensor_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    # With and without "model.": which of the two counts would depend on the order of loading.
    folder = rewrite(
        copy_of(bases["qwen3"], tmp_path / "base"), lambda t: t | {"norm.weight": torch.ones(96)}
    )
    assert "holds model.norm.weight twice: as" in refusal(folder)


# Prefixes that end in or contain "model." but that transformers does not read.
@pytest.mark.parametrize(
    "name", ["base_model.norm.weight", "module.model.norm.weight", "_orig_mod.model.norm.weight"]
)
def test_other_prefixes_stay_what_they_are(name: str) -> None:
    assert published_name(name) == name
