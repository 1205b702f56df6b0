"""Find tensors that vLLM would refuse, or accept and ignore, and numbers that are not finite."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megalora.adapters.files import CONFIG, WEIGHTS
from megalora.adapters.read.weights import AdapterWeights
from megalora.serve.check import Limits, check_adapter
from megalora.serve.errors import AdapterError, AdapterForOtherBase, AdapterInvalid
from tests.adapters.folders import edit_tensors
from tests.named_tensors import Change, Tensors, cast, renamed, without_parts

Q = "base_model.model.model.layers.1.self_attn.q_proj"
EXPERT = "base_model.model.model.layers.2.mlp.experts.5"


def with_(name: str, value: torch.Tensor) -> Change:
    """Add a tensor, or replace it."""
    return lambda tensors: tensors | {name: value}


def spoil(number: float, dtype: torch.dtype) -> Change:
    """Write a file of ``dtype``, in which ``number`` occurs once."""

    def change(tensors: Tensors) -> Tensors:
        tensors = cast(dtype)(tensors)
        # B is [192, 4].
        tensors[f"{Q}.lora_B.weight"][3, 1] = number
        return tensors

    return change


def transposed(tensors: Tensors) -> Tensors:
    """Every factor as [in, out], as libraries outside of torch store linears."""
    return {name: tensor.T for name, tensor in tensors.items()}


def one_expert_more(tensors: Tensors) -> Tensors:
    """The base has eight, 0 to 7."""
    copy = renamed(lambda name: name.replace("experts.7", "experts.8"))
    return tensors | copy(tensors)


# A change of the file, the error, and what it says. What vLLM 0.32 would do stands in check.py.
BROKEN_TENSORS: dict[str, tuple[Change, type[AdapterError], str]] = {
    "no tensors": (lambda _: {}, AdapterInvalid, "holds no tensors: nothing was adapted"),
    "NaN": (
        spoil(math.nan, torch.float32),
        AdapterInvalid,
        rf"{Q}.lora_B.weight holds NaN or an infinite number",
    ),
    "infinite": (spoil(-math.inf, torch.float32), AdapterInvalid, "q_proj.lora_B.weight holds NaN"),
    "NaN, bfloat16": (
        spoil(math.nan, torch.bfloat16),
        AdapterInvalid,
        "q_proj.lora_B.weight holds NaN",
    ),
    "infinite, float16": (
        spoil(math.inf, torch.float16),
        AdapterInvalid,
        "q_proj.lora_B.weight holds NaN",
    ),
    "B missing": (
        without_parts(f"{Q}.lora_B"),
        AdapterInvalid,
        r"layers.1.self_attn.q_proj has A only; a factor is missing",
    ),
    "A missing": (without_parts(f"{Q}.lora_A"), AdapterInvalid, "has B only"),
    # vLLM stacks all experts of a layer, so that it needs each of them.
    "one expert missing": (
        without_parts(f"{EXPERT}."),
        AdapterInvalid,
        r"layers.2.mlp.experts.5 lacks down_proj, gate_proj, up_proj; .* \(zeros do\)",
    ),
    "the last expert missing": (without_parts("experts.7."), AdapterInvalid, "experts.7 lacks"),
    "one projection missing": (
        without_parts("up_proj"),
        AdapterInvalid,
        r"experts.0 lacks up_proj",
    ),
    # A whole weight beside the factors, and what belongs to another method.
    "no LoRA factor": (
        with_("base_model.model.lm_head.weight", torch.zeros(2, 2)),
        AdapterInvalid,
        "is not a LoRA factor",
    ),
    "DoRA's vector": (
        with_(f"{Q}.lora_magnitude_vector", torch.zeros(2)),
        AdapterInvalid,
        "is not a LoRA factor",
    ),
    # As PEFT's target_parameters writes experts: rows of all 8 above each other.
    "stacked": (
        with_("base_model.model.model.layers.0.mlp.experts.lora_A.weight", torch.zeros(32, 80)),
        AdapterInvalid,
        "stacks all experts",
    ),
    "stacked gate and up": (
        with_(
            "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight",
            torch.zeros(32, 96),
        ),
        AdapterInvalid,
        "stacks all experts",
    ),
    # As a quantized file has them.
    "integers": (
        with_(f"{Q}.lora_A.weight", torch.zeros(4, 96, dtype=torch.int8)),
        AdapterInvalid,
        r"is I8 \[4, 96\]",
    ),
    "a vector": (
        with_(f"{Q}.lora_A.weight", torch.zeros(96)),
        AdapterInvalid,
        "must be a matrix of floats",
    ),
    "A's rank is not B's": (
        with_(f"{Q}.lora_A.weight", torch.zeros(5, 96)),
        AdapterInvalid,
        r"has A \[5, 96\] and B \[192, 4\]",
    ),
    "transposed": (transposed, AdapterInvalid, "A's rows"),
    # A rank of 4 and an input of 64, where the base has 96.
    "another width": (
        with_(f"{Q}.lora_A.weight", torch.zeros(4, 64)),
        AdapterForOtherBase,
        r"q_proj is 192 x 64, and the base model's is 192 x 96",
    ),
    "a smaller output": (
        with_(f"{Q}.lora_B.weight", torch.zeros(128, 4)),
        AdapterForOtherBase,
        "is 128 x 96",
    ),
    # The base has layers 0 to 3.
    "a module of another model": (
        renamed(lambda name: name.replace("layers.3", "layers.9")),
        AdapterForOtherBase,
        r"\(qwen3_moe, 4 layers, 8 experts\) has no model.layers.9",
    ),
    "an expert too many": (
        one_expert_more,
        AdapterForOtherBase,
        "has no model.layers.0.mlp.experts.8",
    ),
}


@pytest.mark.parametrize("case", BROKEN_TENSORS)
def test_broken_tensors(adapter: Path, tiny: Path, case: str) -> None:
    change, error, message = BROKEN_TENSORS[case]
    edit_tensors(adapter, change)
    with pytest.raises(error, match=message) as caught:
        check_adapter(adapter, Limits(64, base=tiny))
    # The very type, no subclass: clients choose what to do by it.
    assert type(caught.value) is error
    assert str(adapter) in str(caught.value)


def test_finite_numbers_of_every_dtype(tmp_path: Path) -> None:
    """The largest numbers, the smallest and both zeros are finite; torch says the same."""
    path = tmp_path / WEIGHTS
    (tmp_path / CONFIG).write_text("{}")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        limits = torch.finfo(dtype)
        numbers = torch.tensor(
            [0.0, -0.0, limits.max, limits.min, limits.tiny], dtype=torch.float64
        )
        # A NaN has a sign too, which a test of bits must not trip over.
        for bad in (None, math.nan, -math.nan, math.inf, -math.inf):
            tensor = numbers.to(dtype)
            if bad is not None:
                tensor = torch.cat([tensor, torch.tensor([bad], dtype=dtype)])
            save_file({"a": torch.zeros(1, dtype=dtype), "b": tensor.clone()}, path)
            found = AdapterWeights(tmp_path).not_finite()
            assert found == (None if torch.isfinite(tensor).all() else "b")
