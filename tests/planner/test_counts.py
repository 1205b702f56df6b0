"""Compare parameter counts with what is published, with transformers' models on the meta device and
with stock PEFT."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from megalora.config import LoRAConfig, ParallelConfig
from megalora.lora.select import resolve
from megalora.lora.spec import Adapted
from megalora.model.shape import ModelShape
from megalora.planner.adapter_count import adapter_parameters
from megalora.planner.models import active_parameters, load_shape, read_architecture
from megalora.planner.weights import (
    PlannedModel,
    base_parameters,
    chunks_of,
    layer_parameters,
)

MODELS = Path(__file__).parents[2] / "configs" / "models"
PUBLISHED = {
    "qwen3_30b_a3b": (30_532_122_624, 3.3, 48),
    "qwen3_235b_a22b": (235_093_634_560, 22.2, 94),
    "mixtral_8x7b_v0.1": (46_702_792_704, 12.9, 32),
}
"""Parameters (total_size of the published index, halved), billions a token uses, layers."""


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def num_lora_parameters(stock: nn.Module) -> int:
    """Of stock PEFT's model; whatever else it trains does not count."""
    count = 0
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            count += parameter.numel()
    return count


def num_adapted(adapted: Iterable[Adapted]) -> int:
    """Parameters of our adapter, from the table in ``lora/spec.py``."""
    return sum(one.num_parameters() for one in adapted)


def transformers_model(name: str) -> nn.Module:
    """The model at its full size, without memory for its weights."""
    fields = read_architecture(MODELS / f"{name}.yaml")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))


@pytest.mark.parametrize("name", PUBLISHED)
def test_base_parameters(name: str) -> None:
    shape = load_shape(MODELS / f"{name}.yaml")
    total, active, layers = PUBLISHED[name]
    model = transformers_model(name)
    assert num_parameters(model) == total
    assert shape.num_parameters() == total
    # Model cards give one decimal.
    assert abs(active_parameters(shape) / 1e9 - active) < 0.06
    for layer in (0, layers - 1):
        theirs = num_parameters(model.model.layers[layer])  # pyright: ignore
        assert theirs == layer_parameters(shape, ParallelConfig(), shape.is_moe(layer))


@pytest.mark.parametrize("name", PUBLISHED)
def test_active_parameters_are_what_a_token_meets(name: str) -> None:
    """Counted in transformers' model: the fused experts' part for k of E, everything else whole."""
    shape = load_shape(MODELS / f"{name}.yaml")
    # Qwen3-30B-A3B: 8 of 128 experts, which makes 3.3 of 30.5 billion.
    found = 0
    for full_name, parameter in transformers_model(name).named_parameters():
        # [E, ...]: transformers 5 holds all experts of a layer in one tensor.
        if ".mlp.experts." in full_name:
            parameter = parameter[: shape.top_k]
        found += parameter.numel()
    assert active_parameters(shape) == found


# One stage; embedding and head on different stages; chunks that the stages take in turn.
@pytest.mark.parametrize(
    ("pp", "vpp", "sizes"),
    [
        (1, 1, None),
        (2, 1, None),
        (2, 3, None),
        (6, 2, None),
        (3, 1, (9, 20, 19)),
        (2, 2, (3, 7, 30, 8)),
    ],
)
def test_stages_add_up_to_the_model(pp: int, vpp: int, sizes: tuple[int, ...] | None) -> None:
    shape = load_shape(MODELS / "qwen3_30b_a3b.yaml")
    p = ParallelConfig(pp=pp, vpp=vpp, stage_layers=sizes)
    model = PlannedModel.of(
        shape, LoRAConfig(target_modules=["q_proj", "down_proj", "lm_head", "gate"])
    )
    chunks = []
    layers = []
    for stage in range(pp):
        for chunk in chunks_of(shape, p, stage):
            chunks.append(chunk)
            layers += chunk.layers
    assert sorted(layers) == list(range(48))
    num_base = 0
    num_trained = 0
    for chunk in chunks:
        num_base += base_parameters(shape, p, chunk)
        count = adapter_parameters(model, p, chunk)
        num_trained += count.dense + count.expert
    # Without TP and EP nothing is on two ranks, so the stages hold the model once.
    assert num_base == shape.num_parameters()
    assert num_trained == num_adapted(model.adapted)


class OneLayer(nn.Module):
    """A decoder layer's linears under their HF names, experts apart, as PEFT's adapter files name
    them.

    transformers 5 holds experts as packed parameters, of which PEFT would adapt no single one.
    """

    def __init__(self, s: ModelShape) -> None:
        super().__init__()

        def linear(n: int, k: int) -> nn.Linear:
            return nn.Linear(k, n, bias=False)

        h = s.hidden
        q = s.num_heads * s.head_dim
        kv = s.num_kv_heads * s.head_dim
        i = s.expert_intermediate
        self.self_attn = nn.ModuleDict({
            "q_proj": linear(q, h), "k_proj": linear(kv, h), "v_proj": linear(kv, h),
            "o_proj": linear(h, q),
        })  # fmt: skip
        self.experts = nn.ModuleList()
        for _ in range(s.num_experts):
            expert = {"gate_proj": linear(i, h), "up_proj": linear(i, h), "down_proj": linear(h, i)}
            self.experts.append(nn.ModuleDict(expert))


@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("name", PUBLISHED)
def test_adapter_parameters_against_peft(name: str, rank: int) -> None:
    shape = load_shape(MODELS / f"{name}.yaml")
    layers = PUBLISHED[name][2]
    # One layer stands for all, which are alike: PEFT takes minutes for 48 layers of 128 experts.
    with torch.device("meta"):
        layer = OneLayer(shape)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    stock = get_peft_model(
        layer, LoraConfig(r=rank, target_modules=targets), low_cpu_mem_usage=True
    )  # pyright: ignore
    theirs = num_lora_parameters(stock)
    adapted = resolve(LoRAConfig(rank=rank), shape)
    assert num_adapted(adapted) == layers * theirs
    model = PlannedModel(shape, tuple(adapted))
    p = ParallelConfig()
    count = adapter_parameters(model, p, chunks_of(shape, p, 0)[0])
    # Megatron puts experts into the dense buffer where EP = 1 and ETP = TP.
    assert (count.dense + count.expert, count.expert) == (layers * theirs, 0)


def test_attention_of_transformers_adapted_by_peft() -> None:
    name = "qwen3_30b_a3b"
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=16, target_modules=targets)
    stock = get_peft_model(transformers_model(name), config, low_cpu_mem_usage=True)  # pyright: ignore
    theirs = num_lora_parameters(stock)
    adapted = resolve(
        LoRAConfig(rank=16, target_modules=targets), load_shape(MODELS / f"{name}.yaml")
    )
    assert num_adapted(adapted) == theirs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold the fields of a model's config.json"),
        ("a: [", "not a YAML file of a model's config.json"),
        ("model_type: gpt2", "model_type 'gpt2' is not supported"),
        ("model_type: qwen3_moe", "must have num_hidden_layers"),
    ],
)
def test_mistakes_name_the_file(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_shape(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.yaml: no such file"):
        load_shape(tmp_path / "nothing.yaml")
