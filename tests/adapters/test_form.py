"""Write adapter folders that stock PEFT and vLLM load: logits equal those of a merge by hand,
whatever was adapted and however."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import transformers_weight_conversion
from safetensors.torch import load_file

from megalora.adapters.files import CONFIG, WEIGHTS, read_config
from megalora.adapters.read.adapter import read_adapter
from megalora.adapters.write.engines import FileFormat
from megalora.adapters.write.form import export_form
from megalora.verify.stock_peft import load_by_peft
from tests.adapters.adapters import (
    ATTENTION,
    CASES,
    EXPERTS,
    Trained,
    load_base,
    logits,
    merged_by_hand,
    train,
)
from tests.adapters.folders import factors_of
from tests.named_tensors import only_parts
from tests.peft_warnings import IGNORED

pytestmark = IGNORED


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
@pytest.mark.parametrize(("base", "options"), CASES)
def test_stock_peft_computes_the_trained_model(
    bases: dict[str, Path], tmp_path: Path, base: str, options: dict[str, Any], layout: FileFormat
) -> None:
    trained = train(bases[base], tmp_path / "adapter", layout=layout, **options)
    expected = logits(merged_by_hand(trained))
    effect = (expected - logits(load_base(trained.base))).abs().max()
    assert effect > 0.1, "an adapter without effect proves nothing"
    found = logits(PeftModel.from_pretrained(load_base(trained.base), str(trained.folder)).eval())
    # float32 through 4 layers errs by some 2^-24 * 100 of the largest logit, which is about 5.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_peft_as_it_is_refuses_qwen2_moe_experts_loudly(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When this fails, PEFT has learnt the name and README's remark can go."""
    monkeypatch.delitem(transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN, "qwen2_moe")
    trained = train(bases["shared"], tmp_path / "adapter", rank=4, alpha=12.0)
    with pytest.raises(ValueError, match="Make sure that this layer is not also targeted"):
        PeftModel.from_pretrained(load_base(trained.base), str(trained.folder))
    # What chat and verify say of it, and the way out.
    with pytest.raises(ValueError, match="its table lacks that model.*--layout stacked"):
        load_by_peft(load_base(trained.base), trained.folder)
    stacked = train(bases["shared"], tmp_path / "stacked", rank=4, alpha=12.0, layout="stacked")
    load_by_peft(load_base(trained.base), stacked.folder)


@pytest.mark.parametrize("layout", ["per_expert", "stacked", "uniform"])
@pytest.mark.parametrize(("base", "options"), CASES)
def test_the_folder_reads_back_as_what_was_trained(
    bases: dict[str, Path], tmp_path: Path, base: str, options: dict[str, Any], layout: FileFormat
) -> None:
    trained = train(bases[base], tmp_path / "adapter", layout=layout, **options)
    again = read_adapter(trained.folder, trained.shape)
    read = Trained(trained.base, trained.shape, again.adapted, again.tensors, trained.folder)
    found = {}
    for a, expert, delta in read.deltas():
        found[a.hf_module(expert)] = delta
    for a, expert, delta in trained.deltas():
        torch.testing.assert_close(found.pop(a.hf_module(expert)), delta, rtol=1e-6, atol=1e-7)
    # What is left was added so that others can load the file.
    for module, delta in found.items():
        assert not delta.count_nonzero(), f"{module} must do nothing"
    # An A and a B for each linear, and no linear is missing.
    num_modules = sum(len(a.hf_modules()) for a in again.adapted)
    assert len(again.tensors) == 2 * num_modules
    assert not again.absent


@pytest.mark.parametrize(("base", "options"), CASES)
def test_experts_are_written_as_vllm_and_peft_need_them(
    bases: dict[str, Path], tmp_path: Path, base: str, options: dict[str, Any]
) -> None:
    trained = train(bases[base], tmp_path / "adapter", **options)
    config = read_config(trained.folder)
    tensors = load_file(trained.folder / WEIGHTS)
    # Scales are written as alphas, and dropout is for training.
    assert config["use_rslora"] is False
    assert config["lora_dropout"] == 0.0
    assert config["modules_to_save"] is None
    # PEFT needs all three projections of every expert of such a layer.
    adapted_layers = set()
    for a in trained.adapted:
        if a.projection.is_expert:
            adapted_layers.add(a.layer)
    for layer in adapted_layers:
        for name in EXPERTS:
            ranks = set()
            for expert in range(trained.shape.num_experts):
                a, _ = factors_of(tensors, f"model.layers.{layer}.mlp.experts.{expert}.{name}")
                ranks.add(a.shape[0])
            # PEFT stacks all experts of a layer: one rank, for gate and up that of the config.
            assert len(ranks) == 1
            if name != "down_proj":
                assert ranks == {config["r"]}
    # Layers without an adapted expert get no zeros.
    written_layers = set()
    for name in only_parts(".mlp.experts.")(tensors):
        # base_model.model.model.layers.N.mlp.experts...
        written_layers.add(int(name.split(".")[4]))
    assert written_layers == adapted_layers


def test_config_in_full(bases: dict[str, Path], tmp_path: Path) -> None:
    """Scales of rsLoRA, alpha / sqrt(rank), are written as alphas: alpha = scale * rank, with the
    rank that is written."""
    trained = train(
        bases["moe"], tmp_path / "adapter", rank=4, alpha=12.0,
        target_modules=[*EXPERTS, "q_proj", "v_proj", "gate"],
        use_rslora=True,
        rank_pattern={r"layers\.3\.self_attn\.v_proj": 16, "down_proj": 9, "up_proj": 1},
        alpha_pattern={"gate": 2.0},
    )  # fmt: skip
    assert json.loads((trained.folder / CONFIG).read_text()) == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(bases["moe"]),
        # Gate and up have no patterns in PEFT: both are padded to r = 4 and scaled as the default.
        "inference_mode": True, "r": 4, "lora_alpha": 24,  # 12 / sqrt(4) * 4
        "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True, "modules_to_save": None, "target_parameters": None,
        "target_modules": ["down_proj", "gate", "gate_proj", "q_proj", "up_proj", "v_proj"],
        "rank_pattern": {"down_proj": 9, r"model\.layers\.3\.self_attn\.v_proj": 16},
        "alpha_pattern": {
            # PEFT looks settings of the router up by the name of its weight.
            r"gate(\.weight)?": 4,  # 2 / sqrt(4) * 4
            "down_proj": 36,  # 12 / sqrt(9) * 9
            r"model\.layers\.3\.self_attn\.v_proj": 48,  # 12 / sqrt(16) * 16
        },
    }  # fmt: skip


def test_dense_layers_among_moe_layers_are_named_as_parameters(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """Where a model has experts, PEFT takes their names among targets for experts' alone."""
    config = read_config(train(bases["mixed"], tmp_path / "a", rank=4).folder)
    assert config["target_modules"] == sorted(ATTENTION + EXPERTS)
    assert config["target_parameters"] == [
        "mlp.down_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
    ]
    # The dense layer alone: up_proj among the targets would adapt experts too.
    dense_only = train(
        bases["mixed"], tmp_path / "b", rank=4, layers=[1], target_modules=["up_proj", "k_proj"]
    )
    config = read_config(dense_only.folder)
    assert config["target_modules"] == ["k_proj"]
    assert config["target_parameters"] == ["mlp.up_proj.weight"]


def test_tensors_of_a_half_adapted_expert(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(
        bases["moe"], tmp_path / "adapter", rank=5, alpha=10.0, target_modules=["gate_up_proj"],
        layers=[1],
        rank_pattern={"up_proj": 3}, alpha_pattern={"up_proj": 12.0},
    )  # fmt: skip
    # What is written -> what of it was trained.
    origins = {}
    for written, own in export_form(trained.adapted, trained.shape):
        origins[written.name] = own and own.name
    assert origins == {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": None}
    tensors = load_file(trained.folder / WEIGHTS)
    size = trained.shape.expert_intermediate
    hidden = trained.shape.hidden
    # A and B of three projections, in one layer.
    assert len(tensors) == 2 * 3 * trained.shape.num_experts
    for expert in range(trained.shape.num_experts):
        stem = f"model.layers.1.mlp.experts.{expert}"
        gate_a, gate_b = factors_of(tensors, f"{stem}.gate_proj")
        own_a, own_b = factors_of(trained.tensors, f"{stem}.gate_proj")
        assert torch.equal(gate_a, own_a)
        assert torch.equal(gate_b, own_b)

        # Rank 3 is padded to 5; the scale 12 / 3 = 4 is written as the file's 10 / 5 = 2.
        up_a, up_b = factors_of(tensors, f"{stem}.up_proj")
        own_a, own_b = factors_of(trained.tensors, f"{stem}.up_proj")
        assert torch.equal(up_a, torch.cat([own_a, torch.zeros(2, hidden)]))
        assert torch.equal(up_b, torch.cat([2 * own_b, torch.zeros(size, 2)], dim=1))

        down_a, down_b = factors_of(tensors, f"{stem}.down_proj")
        assert torch.equal(down_a, torch.zeros(5, size))
        assert torch.equal(down_b, torch.zeros(hidden, 5))


def test_dtype_is_kept(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", torch.bfloat16, target_modules=["up_proj"])
    # The zeros that fill up gate and down among them.
    tensors = load_file(trained.folder / WEIGHTS)
    assert only_parts("gate_proj")(tensors) and only_parts("down_proj")(tensors)
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16, name
