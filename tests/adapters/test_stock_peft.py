"""Read adapters that stock PEFT makes with unusual options, as PEFT computes them."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel

from megalora.adapters.files import CONFIG, WEIGHTS, read_config
from tests.adapters.adapters import ATTENTION, EXPERTS, logits
from tests.adapters.stock import (
    base_model,
    check_equal,
    loaded_by_peft,
    new_adapter,
    randomized,
    untrained_adapter,
)
from tests.peft_warnings import IGNORED

pytestmark = IGNORED

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Base and PEFT's options.
READ: dict[str, tuple[str, dict[str, Any]]] = {
    # PEFT resolves all-linear when it wraps the model, and writes the result into the config.
    "all-linear without a list of modules": (
        "dense",
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.2.mlp.down_proj"]},
    ),
    "all-linear of a MoE without a list": (
        "moe",
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    ),
    "all-linear without an expression": (
        "moe",
        {"target_modules": "all-linear", "exclude_modules": r".*\.[02]\..*[qo]_proj"},
    ),
    # Qwen2-MoE weighs its shared expert by a linear of one row, which megalora does not adapt.
    "all-linear without the gate of the shared expert": (
        "shared",
        {"target_modules": "all-linear", "exclude_modules": ["shared_expert_gate"]},
    ),
    "one layer excluded": (
        "moe",
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.k_proj"]},
    ),
    # A string is an expression for the whole name, here and in exclude_modules.
    "an expression without an expression": (
        "dense",
        {"target_modules": r".*_proj", "exclude_modules": r".*layers\.[13]\..*"},
    ),
    # Expressions that Python's re knows and simpler matchers do not.
    "look ahead": ("moe", {"target_modules": r"^(?!.*layers\.0\.).*self_attn\.(q|v)_proj$"}),
    "look behind": ("dense", {"target_modules": r".*(?<!self_attn)\.(up|down)_proj"}),
    "an expression that names experts": (
        "moe",
        {"target_modules": r".*(gate_proj|up_proj|down_proj|o_proj)"},
    ),
    # layers_pattern is the name before a layer's number; here it says what PEFT assumes anyway.
    "layers and their pattern": (
        "moe",
        {
            "target_modules": ["q_proj", "o_proj"],
            "layers_to_transform": [0, 3],
            "layers_pattern": "layers",
        },
    ),
    "one layer, several patterns": (
        "dense",
        {"target_modules": EXPERTS, "layers_to_transform": 2, "layers_pattern": ["h", "layers"]},
    ),
    # PEFT turns targets of stacked experts into parameters, to which layers do not apply.
    "layers do not hold for experts": (
        "moe",
        {"target_modules": [*EXPERTS, "q_proj"], "layers_to_transform": [1]},
    ),
    # A full name is taken as it is.
    "layers do not hold for full names": (
        "moe",
        {
            "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
            "layers_to_transform": [2],
        },
    ),
    # The first key that matches decides, so that o_proj of layer 0 has rank 2 and others 3.
    "ranks and alphas by expression": (
        "moe",
        {
            "target_modules": ATTENTION,
            "rank_pattern": {
                r"layers\.[12]\..*\.(q|k)_proj": 7,
                "^model.layers.0.self_attn.o_proj": 2,
                "v_proj|o_proj": 3,
            },
            "alpha_pattern": {r".*layers\.3.*": 5, r"layers\.0.*(v)_proj": 9},
        },
    ),
    "rsLoRA": (
        "mixed",
        {
            "target_modules": [*ATTENTION, *EXPERTS],
            "use_rslora": True,
            "rank_pattern": {"q_proj": 9},
        },
    ),
    # exclude_modules is about modules alone.
    "parameters are not excluded": (
        "moe",
        {
            "target_modules": [],
            "target_parameters": PARAMETERS,
            "exclude_modules": ["gate_proj", "down_proj", "experts"],
        },
    ),
    "one parameter of one layer": (
        "moe",
        {
            "target_modules": None,
            "rank_pattern": {"experts.down_proj": 3},
            "target_parameters": ["layers.1.mlp.experts.down_proj"],
        },
    ),
    # The router is no linear in transformers 5, and PEFT adapts its weight as a parameter.
    "router": ("moe", {"target_modules": ["gate", "q_proj"]}),
    "a router's rank and alpha, by the name of its weight": (
        "moe",
        {
            "target_modules": ["gate", "q_proj"],
            "rank_pattern": {"gate.weight": 3},
            "alpha_pattern": {"gate.weight": 60},
        },
    ),
    "patterns that miss the router, because its weight is adapted": (
        "moe",
        {
            "target_modules": ["gate", "q_proj"],
            "rank_pattern": {"gate": 3},
            "alpha_pattern": {"gate": 60},
        },
    ),
    "gaussian start": ("moe", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "random start": ("dense", {"target_modules": EXPERTS, "init_lora_weights": False}),
    "orthogonal start": (
        "dense",
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    ),
    # Starts that leave the base as it is: what is trained is still scale * B A.
    "MiCA": ("dense", {"target_modules": ["v_proj"], "init_lora_weights": "mica"}),
    "VeLoRA": (
        "dense",
        {
            "target_modules": ["q_proj"],
            "velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4),
        },
    ),
}


@pytest.mark.parametrize("case", READ)
def test_read_as_peft_computes_it(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    base, options = READ[case]
    model = new_adapter(bases[base], **options)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    check_equal(tmp_path, bases[base], logits(model))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_changed_the_base_is_read_once_converted(
    bases: dict[str, Path], tmp_path: Path, init: str
) -> None:
    """PEFT's own conversion: twice the rank, and the base as it was."""
    model = untrained_adapter(bases["dense"], target_modules=["q_proj"], init_lora_weights=init)
    # As PEFT's documentation says: loading the start would change the base once more otherwise.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    # Training, of some kind: B A moves from what was taken out of the base.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-0.5)
    model.peft_config["default"].init_lora_weights = init
    model.save_pretrained(
        tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    # The difference of two products of rank 4 has rank 8: [B, B0] [A; -A0].
    assert read_config(tmp_path / "end")["r"] == 8
    check_equal(tmp_path / "end", bases["dense"], logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_file_in_half_precision(
    bases: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    model = new_adapter(bases["moe"], target_modules=[*EXPERTS, "q_proj"], use_rslora=True)
    for name, parameter in model.named_parameters():
        # The base stays in float32.
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(tmp_path)
    read = check_equal(tmp_path, bases["moe"], loaded_by_peft(tmp_path, bases["moe"]))
    assert {tensor.dtype for tensor in read.tensors.values()} == {dtype}


def test_two_adapters_of_one_model(bases: dict[str, Path], tmp_path: Path) -> None:
    """The first lies in the folder, the second in a sub-folder of its name; each is read as it
    is."""
    model = new_adapter(bases["moe"], target_modules=["q_proj", "o_proj"])
    code = peft.LoraConfig(r=3, lora_alpha=9, target_modules=["v_proj"], task_type="CAUSAL_LM")
    model.add_adapter("code", code)
    randomized(model, 5).save_pretrained(tmp_path)
    for folder, name in ((tmp_path, "default"), (tmp_path / "code", "code")):
        model.set_adapter(name)
        check_equal(folder, bases["moe"], logits(model))


# Factors side by side, of rank 4 + 3, or the best approximation of their sum.
@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_a_combination_of_adapters(
    bases: dict[str, Path], tmp_path: Path, combination: str
) -> None:
    """PEFT writes another rank and alpha than either had."""
    model = new_adapter(bases["dense"], target_modules=["q_proj", "o_proj"])
    other = peft.LoraConfig(
        r=3, lora_alpha=9, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    model.add_adapter("other", other)
    randomized(model, 5)
    model.add_weighted_adapter(
        ["default", "other"], [0.7, -0.4], "both", combination_type=combination
    )
    model.set_adapter("both")
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    check_equal(tmp_path / "both", bases["dense"], logits(model))


def test_keys_that_peft_sorts_when_it_saves(bases: dict[str, Path], tmp_path: Path) -> None:
    """v_proj of layer 1 trains with alpha 4, and everybody who reads the file has 40, PEFT among
    them: that is said."""
    model = new_adapter(
        bases["moe"],
        target_modules=["q_proj", "v_proj"],
        alpha_pattern={"v_proj": 4, r".*layers\.1.*": 40},
    )
    model.save_pretrained(tmp_path)
    expected = loaded_by_peft(tmp_path, bases["moe"])
    # PEFT sorts the keys as it saves, a dot before a letter, and the first that matches decides.
    assert (expected - logits(model)).abs().max() > 0.05
    (note,) = check_equal(tmp_path, bases["moe"], expected).notes
    assert note.startswith(
        f"{CONFIG}: alpha_pattern says 40 (.*layers\\.1.*) and 4 (v_proj) for"
        " model.layers.1.self_attn.v_proj"
    )


def test_all_linear_that_was_never_written_out(bases: dict[str, Path], tmp_path: Path) -> None:
    """As tools write it that do not resolve it: what is there counts."""
    model = new_adapter(bases["dense"], target_modules=["q_proj", "up_proj"])
    model.save_pretrained(tmp_path)
    options = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(options | {"target_modules": "all-linear"}))
    assert read_config(tmp_path)["target_modules"] == "all-linear"
    check_equal(tmp_path, bases["dense"], logits(model))


def test_peft_loads_what_it_reads_back(bases: dict[str, Path], tmp_path: Path) -> None:
    """The tests above hold megalora against the model that was saved; here PEFT reads the file
    itself."""
    new_adapter(
        bases["moe"], target_modules=["q_proj", "k_proj"], exclude_modules=["k_proj"]
    ).save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).is_file()
    model = PeftModel.from_pretrained(base_model(bases["moe"]), str(tmp_path)).eval()
    check_equal(tmp_path, bases["moe"], logits(model))
