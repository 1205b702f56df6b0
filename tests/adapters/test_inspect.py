"""Describe adapters whose every number is known, as ``megalora inspect`` does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megalora.adapters.inspect import describe
from tests.named_tensors import cast

HEADER = "projection    rank        out x in  layers  experts    parameters  mean |A|  mean |B|"


def factors(
    module: str, rank: int, out: int, into: int, norm_a: float, norm_b: float
) -> dict[str, Tensor]:
    """A and B with all elements equal and the given Frobenius norms."""
    stem = f"base_model.model.{module}.lora_"
    # n equal elements x have the norm x sqrt(n).
    return {
        f"{stem}A.weight": torch.full((rank, into), norm_a / (rank * into) ** 0.5),
        f"{stem}B.weight": torch.full((out, rank), norm_b / (out * rank) ** 0.5),
    }


def described(folder: Path, tensors: dict[str, Tensor], **options: Any) -> list[str]:
    """The lines about an adapter of these tensors, whose config ``options`` change."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "base_model_name_or_path": "Qwen/Tiny"}
    config |= options
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return describe(folder).splitlines()


def test_table(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    # The mean of three norms is 3, and no norm is 3 itself. Layer 11 comes before 2 as text.
    for layer, norm in ((0, 1.0), (2, 2.0), (11, 6.0)):
        tensors |= factors(f"model.layers.{layer}.self_attn.q_proj", 4, 192, 96, norm, norm / 2)
        for expert in (0, 7):
            tensors |= factors(
                f"model.layers.{layer}.mlp.experts.{expert}.down_proj", 3, 96, 80, 0.5, 0.25
            )
    # A dense layer's down_proj has a row of its own, apart from that of experts.
    tensors |= factors("model.layers.5.mlp.down_proj", 8, 96, 1440, 7.0, 8.0)
    tensors |= factors("model.layers.5.mlp.gate", 2, 8, 96, 1.5, 2.5)
    tensors |= factors("lm_head", 4, 512, 96, 1.25, 3.0)
    # rank * (out + in) of each, in three layers, and in three layers for two experts.
    q = 3 * 4 * (192 + 96)
    experts = 3 * 2 * 3 * (96 + 80)
    dense = 8 * (96 + 1440)
    total = q + experts + dense + 2 * (8 + 96) + 4 * (512 + 96)
    head, *lines = described(tmp_path, tensors)
    # float32 has 4 bytes.
    assert (
        head == f"{tmp_path}: LoRA for Qwen/Tiny, r=4, alpha=12, {total:,} parameters,"
        f" {4 * total / 1e6:.1f} MB"
    )
    assert (lines[0], sorted(lines[1:])) == (HEADER, [
        "down_proj        3         96 x 80       3        2         3,168     0.500     0.250",
        "down_proj        8       96 x 1440       1        -        12,288     7.000     8.000",
        "gate             2          8 x 96       1        -           208     1.500     2.500",
        "lm_head          4        512 x 96       -        -         2,432     1.250     3.000",
        "q_proj           4        192 x 96       3        -         3,456     3.000     1.500",
    ])  # fmt: skip


def test_several_ranks_are_all_shown(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    # (8 + 2 + 8 + 5) * (96 + 192) = 6,624 parameters.
    for layer, rank in enumerate((8, 2, 8, 5)):
        tensors |= factors(f"model.layers.{layer}.self_attn.o_proj", rank, 96, 192, 1.0, 1.0)
    assert described(tmp_path, tensors)[2:] == [
        "o_proj       2/5/8        96 x 192       4        -         6,624     1.000     1.000"
    ]


def test_size_is_counted_in_the_dtype_of_the_file(tmp_path: Path) -> None:
    tensors = factors("model.layers.0.self_attn.k_proj", 500, 900, 1100, 2, 1)
    head, _, line = described(tmp_path, cast(torch.bfloat16)(tensors))
    # 500 * (900 + 1100) numbers of 2 bytes.
    assert head.endswith("1,000,000 parameters, 2.0 MB")
    # All elements are equal, and so are their rounding errors: up to 2^-8 of each.
    norm_a, norm_b = map(float, line.split()[-2:])
    assert norm_a == pytest.approx(2, rel=2**-8)
    assert norm_b == pytest.approx(1, rel=2**-8)


def test_zero_b(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    # Norms of A and B in five layers. An A of zeros is no reason to warn: MiCA starts with it.
    for layer, (norm_a, norm_b) in enumerate([(1, 0), (0, 0), (1, 0), (1, 1), (1, 1)]):
        module = f"model.layers.{layer}.self_attn.v_proj"
        tensors |= factors(module, 4, 64, 96, norm_a, norm_b)
    *_, line, warning = described(tmp_path, tensors)
    # Means over the five layers.
    assert line.split()[-2:] == ["0.800", "0.400"]
    assert warning == "B is zero in 3 tensors: these adapters do nothing"


def test_nan_and_infinity(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for layer in range(3):
        tensors |= factors(f"model.layers.{layer}.self_attn.v_proj", 4, 64, 96, 1.0, 1.0)
    # One number of a tensor is enough: it reaches every logit.
    stem = "base_model.model.model.layers.{}.self_attn.v_proj.lora_{}.weight"
    tensors[stem.format(1, "A")][2, 3] = float("nan")
    tensors[stem.format(2, "B")][0, 0] = float("-inf")
    warning = described(tmp_path, tensors)[-1]
    assert warning == f"NaN or infinite in 2 tensors, such as {stem.format(1, 'A')}"


def test_what_is_no_lora_factor(tmp_path: Path) -> None:
    tensors = factors("model.layers.0.self_attn.v_proj", 4, 64, 96, 1.0, 1.0) | {
        "base_model.model.lm_head.base_layer.weight": torch.ones(7, 3),
        "base_model.model.model.layers.0.conv.lora_A.weight": torch.ones(4, 3, 1),
        "base_model.model.model.layers.0.norm.lora_diag": torch.ones(5),
    }
    head, _, line, *warnings = described(tmp_path, tensors)
    assert line.startswith("v_proj")
    # v_proj alone is counted.
    assert head.endswith(f" {4 * (64 + 96)} parameters, 0.0 MB")
    assert sorted(warnings) == [
        (
            "no LoRA factor but the diagonal of KaSA (kasa_config), which import, merge and export"
            " refuse: base_model.model.model.layers.0.norm.lora_diag"
        ),
        (
            "not a factor of a linear, being F32 of 3 dimensions:"
            " base_model.model.model.layers.0.conv.lora_A.weight"
        ),
        (
            "weights of the base, not compared with it here (import, merge and export do): "
            "base_model.model.lm_head.base_layer.weight"
        ),
    ]


def test_a_healthy_adapter_gets_no_warning(tmp_path: Path) -> None:
    # The adapter, the table's header and its only row.
    assert len(described(tmp_path, factors("lm_head", 4, 512, 96, 1.0, 1.0))) == 3


def test_an_option_that_a_server_does_not_follow_is_named(tmp_path: Path) -> None:
    tensors = factors("lm_head", 4, 512, 96, 1.0, 1.0)
    *_, pattern = described(tmp_path, tensors, alpha_pattern={"lm_head": 3})
    assert pattern == (
        "adapter_config.json: alpha_pattern={'lm_head': 3} is not followed by SGLang 0.5.23, which"
        " reads one rank and one alpha for all modules; megalora export --for sglang writes the"
        " adapter without it"
    )
    *_, rslora = described(tmp_path, tensors, use_rslora=True, rank_pattern={})
    assert "use_rslora=True is not followed by SGLang 0.5.23, which scales by alpha / r" in rslora


def test_unreadable_weights(tmp_path: Path) -> None:
    described(tmp_path, factors("lm_head", 4, 512, 96, 1.0, 1.0))
    weights = tmp_path / "adapter_model.safetensors"
    # As a download that broke off: the header is whole, and its last tensor is not.
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=f"^{weights} is not a whole safetensors file .*its tensors end at byte"
    ):
        describe(tmp_path)
    weights.unlink()
    with pytest.raises(
        ValueError, match=f"^{tmp_path} is not an adapter folder: it has no {weights.name}$"
    ):
        describe(tmp_path)
