"""Refuse adapter folders that contradict themselves, that PEFT would not honour, or that belong to
another base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalora.adapters.files import CONFIG, read_config
from megalora.adapters.read.adapter import read_adapter
from megalora.lora.spec import tensor_name
from megalora.tiny import make_tiny
from tests.adapters.adapters import (
    EXPERTS,
    train,
)
from tests.adapters.folders import edit_config, edit_tensors, factors_of, refused, remove_tensors
from tests.adapters.stock import refusal
from tests.named_tensors import Tensors


@pytest.mark.parametrize(
    "options",
    [
        # Each leaves out what the file has tensors of: layers 2 and 3 here.
        {"layers_to_transform": [0, 1]},
        # One module of one layer.
        {"exclude_modules": ["layers.2.self_attn.q_proj"]},
        {"exclude_modules": r".*\.3\..*"},
        # A string is an expression for the whole name.
        {"target_modules": r".*\.[01]\..*q_proj"},
    ],
)
def test_what_peft_would_leave_out_is_refused(
    bases: dict[str, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    edit_config(trained.folder, **options)
    assert "PEFT would ignore them" in refusal(trained.folder, trained.base)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"alpha_pattern": {"q_proj": None}},
            "alpha_pattern must be names and numbers above 0, got {'q_proj': None}",
        ),
        ({"rank_pattern": [3]}, "rank_pattern must be names and ranks of at least 1, got [3]"),
        # A star repeats nothing here.
        ({"rank_pattern": {"*q": 2}}, "is neither a name nor a regular expression ("),
        (
            {"target_modules": "*q_proj"},
            "'*q_proj' is neither a name nor a regular expression (nothing to repeat)",
        ),
        ({"target_modules": 5}, "target_modules must be a name, or a list of names, got 5"),
        ({"auto_mapping": []}, "auto_mapping must be an object, got []"),
        # A text is true in Python, whatever it says.
        ({"use_rslora": "false"}, "use_rslora must be true or false, got 'false'"),
        # The scale is lora_alpha / r.
        ({"r": 0}, "r=0 and lora_alpha=32 must be a rank of at least 1 and a number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan must be a rank of at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_values_refused(
    bases: dict[str, Path], tmp_path: Path, option: dict[str, Any], message: str
) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    edit_config(trained.folder, **option)
    said = refusal(trained.folder, trained.base)
    assert said.startswith(str(trained.folder / CONFIG)) and message in said


def test_experts_that_are_not_there_are_zeros_and_named(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    trained = train(
        bases["moe"], tmp_path / "adapter", rank=2, target_modules=["down_proj"], layers=[1]
    )
    # As a tool writes it that keeps only the experts that tokens reached.
    remove_tensors(trained.folder, "experts.5.down_proj")
    read = read_adapter(trained.folder, trained.shape)
    assert read.absent == ["model.layers.1.mlp.experts.5.down_proj"]
    for factor in factors_of(read.tensors, "model.layers.1.mlp.experts.5.down_proj"):
        assert not factor.any()


def test_a_missing_tensor_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2)
    # An expert without both factors counts as zeros; with one of them, something was lost.
    remove_tensors(trained.folder, "experts.3.up_proj.lora_B")
    assert (
        refusal(trained.folder, trained.base)
        == f"{trained.folder}/adapter_model.safetensors has lora_A of"
        " model.layers.0.mlp.experts.3.up_proj and lacks its lora_B"
    )


def test_a_tensor_without_target_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    # PEFT computes without tensors that it has no module for, and does not say so.
    head = {tensor_name("lm_head", "A"): torch.ones(2, 96)}
    edit_tensors(trained.folder, lambda tensors: tensors | head)
    assert (
        refusal(trained.folder, trained.base)
        == f"{trained.folder}/adapter_model.safetensors has, but its config does not target, 1"
        " modules, such as lm_head: PEFT would ignore them. Add them to target_modules in"
        f" {trained.folder}/adapter_config.json"
    )


def test_another_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    # The adapter's base has a hidden size of 96.
    wider = make_tiny(tmp_path / "wider", hidden_size=100)
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["k_proj"])
    assert (
        refusal(trained.folder, wider) == f"{trained.folder}/adapter_model.safetensors:"
        " base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight is (2, 96), but this"
        " base model and rank need (2, 100)"
    )
    # A dense base has no router; the nearest name is another module's.
    router = train(bases["moe"], tmp_path / "router", rank=2, target_modules=["gate", "k_proj"])
    assert (
        refusal(router.folder, bases["dense"])
        == f"{router.folder}/adapter_model.safetensors: model.layers.0.mlp.gate is not a linear"
        " layer of this base model; the nearest is model.layers.0.mlp.gate_proj"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{folder} is not an adapter folder: it has no adapter_config.json"),
        (
            '{"peft_type": "LORA"',
            "{folder}/adapter_config.json:1: not valid JSON (Expecting ',' delimiter, column 21)",
        ),
        ('{"r": 2}', "{folder}/adapter_config.json: peft_type is None; megalora reads LORA only"),
        (
            '{"peft_type": "LOHA"}',
            "{folder}/adapter_config.json: peft_type is 'LOHA'; megalora reads LORA only",
        ),
        (
            '{"peft_type": "LORA", "r": 2}',
            "{folder}/adapter_config.json: lora_alpha must be a number, got None",
        ),
        (
            '{"peft_type": "LORA", "r": "2", "lora_alpha": 4}',
            "{folder}/adapter_config.json: r must be a number, got '2'",
        ),
    ],
)
def test_config_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / CONFIG).write_text(content)
    assert refused(lambda: read_config(tmp_path)) == message.format(folder=tmp_path)


@pytest.mark.parametrize(
    "option",
    [
        # Each changes what the model computes beside scale * B A.
        {"layer_replication": [[0, 2]]},
        {"fan_in_fan_out": True},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1]},
        {"init_lora_weights": "pissa_niter_4"},
        # Both have changed the base's own weights.
        {"init_lora_weights": "olora"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_is_not_plain_lora_is_refused(
    bases: dict[str, Path], tmp_path: Path, option: dict[str, Any]
) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    edit_config(trained.folder, **option)
    (name,) = option
    said = refusal(trained.folder, trained.base)
    assert said.startswith(f"{trained.folder / CONFIG}: {name}=")


def test_a_rank_the_config_does_not_say_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """As verl writes it: the scale would be wrong."""
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    # The file has factors of rank 2: which of the two scales is meant?
    edit_config(trained.folder, r=4)
    assert refusal(trained.folder, trained.base) == (
        f"{trained.folder}/adapter_model.safetensors:"
        " base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight has rank 2, but"
        " adapter_config.json says 4 (scales follow from it)"
    )


def test_experts_of_different_rank_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(
        bases["moe"], tmp_path / "adapter", rank=2, target_modules=["down_proj"], layers=[1]
    )
    edit_config(trained.folder, rank_pattern={r"experts\.3\.down_proj": 1})
    module = "model.layers.1.mlp.experts.3.down_proj"

    # Rank 1 of expert 3, in the file as in the pattern.
    def narrow(tensors: Tensors) -> Tensors:
        a, b = factors_of(tensors, module)
        return tensors | {tensor_name(module, "A"): a[:1], tensor_name(module, "B"): b[:, :1]}

    edit_tensors(trained.folder, narrow)
    assert "experts of layer 1 have different ranks or scales in down_proj ([1, 2];" in refusal(
        trained.folder, trained.base
    )


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (
            # Of DoRA, on what has none here.
            {"base_model.model.lm_head.lora_magnitude_vector": torch.ones(4)},
            "megalora has DoRA on attention, MLPs, shared experts and each routed expert",
        ),
        (
            # An embedding's.
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 9)},
            "lora_embedding_A is no LoRA factor of a",
        ),
        (
            # Tinker's spelling: all experts of a layer in one tensor; its B is missing.
            {"base_model.model.model.layers.0.mlp.experts.w1.lora_A.weight": torch.ones(8, 2, 96)},
            "w1.lora_A.weight has no partner",
        ),
        (
            {
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(
                    2, 96, 1
                )
            },
            "a factor is a matrix in F64",
        ),
        # One such number would make every logit NaN.
        (
            {
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.full(
                    (2, 96), float("nan")
                )
            },
            "has NaN or infinite",
        ),
        (
            # The same name with and without PEFT's prefix.
            {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 96)},
            "two tensors are lora_A of model.layers.0.self_attn.q_proj",
        ),
        (
            # The base has four layers.
            {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(2, 96)},
            "model.layers.9.self_attn.q_proj is not a linear",
        ),
        # Stacked experts: 8 experts of rank 2 at an intermediate size of 80, A without B.
        (
            {"base_model.model.model.layers.1.mlp.experts.lora_A.weight": torch.ones(16, 80)},
            "has no partner (lora_A and lora_B)",
        ),
    ],
)
def test_tensors_refused(
    bases: dict[str, Path], tmp_path: Path, add: dict[str, Tensor], message: str
) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    edit_tensors(trained.folder, lambda tensors: tensors | add)
    assert message in refusal(trained.folder, trained.base)


def test_an_empty_file_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    # Every tensor of the file. PEFT would warn of missing keys and compute the base.
    remove_tensors(trained.folder, "lora")
    assert (
        refusal(trained.folder, trained.base)
        == f"{trained.folder}/adapter_model.safetensors holds no tensors: nothing was adapted, or"
        " saving went wrong"
    )


def test_a_target_without_tensors_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj", *EXPERTS])
    remove_tensors(trained.folder, "experts")
    assert "has no tensors for down_proj, which its config targets: they were lost" in refusal(
        trained.folder, trained.base
    )
