"""Read base folders as users bring them: as transformers does, or refused in one line before a
weight is read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megalora.cli.main import main
from megalora.model.account import open_folder
from tests.named_tensors import Tensors, without
from tests.oracles.base import (
    make_base,
    own_logits,
    rewrite,
    stored_tensors,
    transformers_logits,
)

CONFIG = """
model: {{path: {base}, dtype: float32}}
data: {{train: {data}, max_length: 64}}
train: {{steps: 2, global_batch_size: 4, lr: 1.0e-3}}
checkpoint: {{dir: {run}}}
"""


def refusals(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], *, plan: bool
) -> list[str]:
    """What ``megalora train``, and ``plan`` where ``plan`` is set, say on one line; both must end
    with exit code 2."""
    # Two steps of four samples.
    lines = []
    for n in range(8):
        question = {"role": "user", "content": f"{n} + 1?"}
        answer = {"role": "assistant", "content": str(n + 1)}
        lines.append(json.dumps({"messages": [question, answer]}) + "\n")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(lines))
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(base=base, data=data, run=tmp_path / "run"))
    said = []
    commands = [["train", str(config), "--nproc", "1"]]
    if plan:
        commands.append(["plan", str(config), "--gpus", "1", "--gpu", "h100"])
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 2
        text = capsys.readouterr().err.strip()
        assert "Traceback" not in text
        assert len(text.splitlines()) == 1, text
        said.append(text)
    # A run that did not begin leaves no folder.
    assert not (tmp_path / "run").exists()
    return said


def assert_reads(base: Path) -> None:
    """megalora's logits are transformers'; rounding moves logits of size 4 by a few 1e-6."""
    expected = transformers_logits(base)
    assert (own_logits(base) - expected).abs().max() <= 1e-5


def with_biases(tensors: Tensors) -> Tensors:
    """With biases of q, k, v and o in both layers, as large as the projections' outputs."""
    generator = torch.Generator().manual_seed(1)
    for layer in range(2):
        for name in "qkvo":
            at = f"model.layers.{layer}.self_attn.{name}_proj"
            num_outputs = tensors[f"{at}.weight"].shape[0]
            tensors[f"{at}.bias"] = torch.randn(num_outputs, generator=generator)
    return tensors


@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen3"])
def test_attention_bias_is_computed(tmp_path: Path, arch: str) -> None:
    base = rewrite(make_base(tmp_path / "base", arch), with_biases, attention_bias=True)
    assert_reads(base)


def test_biases_without_the_field_are_left_over(tmp_path: Path) -> None:
    base = rewrite(make_base(tmp_path / "base"), with_biases)
    with pytest.raises(
        ValueError, match=r"8 are left over.*attention_bias \(Qwen2-MoE: qkv_bias\)"
    ):
        open_folder(base)


def to_fp8(tensors: Tensors) -> Tensors:
    """Linears of the layers in FP8 with a scale for each block, as Qwen publishes them."""
    quantised = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            blocks = [-(-size // 128) for size in tensor.shape]
            quantised[f"{name}_scale_inv"] = torch.full(blocks, 0.01)
            quantised[name] = (tensor / 0.01).to(torch.float8_e4m3fn)
    return tensors | quantised


# What config.json says of Qwen's FP8 models.
FP8: dict[str, Any] = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}  # fmt: skip


def test_fp8_is_read(tmp_path: Path) -> None:
    """transformers decodes such a folder too: rightly, since all scales are one number."""
    assert_reads(rewrite(make_base(tmp_path / "base"), to_fp8, quantization_config=FP8))


def test_int8_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}
    base = rewrite(make_base(tmp_path / "Qwen3-30B-A3B-bnb-8bit"), quantization_config=settings)
    for said in refusals(tmp_path, base, capsys, plan=True):
        assert "config.json has quantization_config, of which megalora does not read this" in said
        # The folder's name is all that tells.
        assert said.endswith(
            "use the model they were quantised from, Qwen3-30B-A3B by this one's name"
        )


def test_fp8_without_the_config_s_word_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The tensors alone: ``plan`` does not look at them.
    base = rewrite(make_base(tmp_path / "base"), to_fp8)
    (said,) = refusals(tmp_path, base, capsys, plan=False)
    # 4 matrices of attention and 3 of each of 8 experts, in 2 layers, and a scale for each.
    assert "112 tensors are of quantised weights" in said
    assert "is F8_E4M3" in said


# transformers would draw each of them at random and go on with a warning.
@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.layers.1.mlp.gate.weight", "model.norm.weight"]
)
def test_a_missing_weight_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    base = rewrite(make_base(tmp_path / "base"), without(name))
    (said,) = refusals(tmp_path, base, capsys, plan=False)
    assert f"1 tensors are missing ({name})" in said


def packed(tensors: Tensors) -> Tensors:
    """As transformers 5 saves with save_original_format=False."""
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts"
        gate_up = []
        down = []
        for expert in range(8):
            gate = tensors.pop(f"{at}.{expert}.gate_proj.weight")
            up = tensors.pop(f"{at}.{expert}.up_proj.weight")
            gate_up.append(torch.cat([gate, up]))
            down.append(tensors.pop(f"{at}.{expert}.down_proj.weight"))
        # [E, 2I, H], gate's rows first, and [E, H, I].
        tensors[f"{at}.gate_up_proj"] = torch.stack(gate_up)
        tensors[f"{at}.down_proj"] = torch.stack(down)
    return tensors


def test_packed_experts_are_read(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    plain = own_logits(base)
    assert_reads(rewrite(base, packed))
    # The same numbers in the same places: the same bits.
    assert torch.equal(own_logits(base), plain)


def test_names_of_transformers_are_read(tmp_path: Path) -> None:
    """Mixtral as published, and as transformers holds it: packed, and the router renamed."""
    base = make_base(tmp_path / "base", arch="mixtral")
    assert_reads(base)
    plain = own_logits(base)
    renamed = tmp_path / "renamed"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.save_pretrained(renamed, save_original_format=False)
    # No name of the published form is left.
    for name in stored_tensors(renamed):
        assert ".block_sparse_moe." not in name
    shutil.copyfile(base / "config.json", renamed / "config.json")
    assert torch.equal(own_logits(renamed), plain)


# Within the 40 tokens of the comparison, frequencies of an original length of 32 are corrected.
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
    ],
    ids=lambda scaling: scaling["rope_type"],
)  # fmt: skip
def test_rope_scaling_is_computed(tmp_path: Path, scaling: dict[str, Any]) -> None:
    base = rewrite(
        make_base(tmp_path / "base"), rope_parameters=None, rope_theta=1e6, rope_scaling=scaling
    )
    assert_reads(base)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_scaling_by_length_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    scaling = {"rope_type": kind, "factor": 4.0}
    base = rewrite(
        make_base(tmp_path / "base"), rope_parameters=None, rope_theta=1e6, rope_scaling=scaling
    )
    for said in refusals(tmp_path, base, capsys, plan=True):
        assert (
            f"rope_scaling is of type '{kind}', whose frequencies depend on the length of each"
            " input" in said
        )


def test_partial_rotary_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # transformers ignores it for this family, or fails on it.
    base = rewrite(make_base(tmp_path / "base"), partial_rotary_factor=0.5)
    for said in refusals(tmp_path, base, capsys, plan=True):
        assert "config.json has partial_rotary_factor=0.5" in said


# Qwen's way to longer contexts, in the three spellings that files have.
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen3", "qwen2_moe"])
@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", **YARN}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
    ],
    ids=["type", "rope_type", "rope_parameters"],
)
def test_yarn_is_computed(tmp_path: Path, arch: str, config: dict[str, Any]) -> None:
    assert_reads(rewrite(make_base(tmp_path / "base", arch), **config))
