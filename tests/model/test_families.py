"""Check every registered family against transformers and PEFT: sizes, names, rotary scaling.

A family that stands in ``FAMILIES`` is tested here by itself; layouts are in ``tests/parity``, the
planner's ranks in ``tests/planner/test_dryrun.py``.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from megalora.config import LoRAConfig, ModelConfig, ParallelConfig
from megalora.hf.json_file import read_hf_config
from megalora.lora.select import resolve
from megalora.model.account import needed_tensors, open_folder
from megalora.model.build import build_model
from megalora.model.families import FAMILIES, layer_projections
from megalora.model.families.family import Family
from megalora.model.fields import check_fields, model_shape
from megalora.model.shape import ModelShape
from megalora.parallel import parallel_groups
from megalora.planner.weights import layer_parameters
from megalora.tiny import make_tiny
from megalora.verify.layer import check_layers
from tests.distributed.ranks import run_ranks
from tests.model.published import PUBLISHED
from tests.parity.models import MODELS, arch_of

# Settings of each kind of rotary scaling, short enough for a tiny model's 4,096 positions.
ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    # Megatron's own defaults are 1 and 4: where they are used instead, the test notices.
    "llama3": {
        "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 5.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def base(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(
        tmp_path_factory.mktemp("families") / family.model_type, arch=family.model_type
    )


@pytest.fixture(scope="module")
def shape(base: Path) -> ModelShape:
    return model_shape(read_hf_config(base))


def in_transformers(base: Path) -> Any:
    """The model without weights: names and sizes are all that is asked of it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    model.tie_weights()
    return model


def names_of(shape: ModelShape) -> list[str]:
    """Every projection of the model's layers."""
    names = set()
    for layer in range(shape.num_layers):
        for projection in layer_projections(shape, layer):
            names.add(projection.name)
    return sorted(names)


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def num_adapted(config: LoRAConfig, shape: ModelShape) -> int:
    """Parameters of the adapter that a config asks for."""
    return sum(adapted.num_parameters() for adapted in resolve(config, shape))


def test_the_grid_and_the_published_configs_have_every_family() -> None:
    assert {arch_of(options) for options in MODELS.values()} == FAMILIES.keys()
    assert PUBLISHED.keys() == FAMILIES.keys()


def test_transformers_knows_the_class(family: Family) -> None:
    assert getattr(transformers, family.causal_lm).config_class.model_type == family.model_type


def test_no_two_sizes_of_the_tiny_model_are_equal(family: Family, shape: ModelShape) -> None:
    """A transposed matrix, or one in the place of another, does not fit then."""
    sizes = [shape.hidden, shape.vocab, shape.num_layers, shape.num_heads, shape.num_kv_heads]
    sizes.append(shape.num_kv_heads * shape.head_dim)
    # OLMoE's norm of all queries is as wide as the hidden states, as published.
    if not shape.full_width_norms:
        sizes.append(shape.num_heads * shape.head_dim)
    if shape.moe_layers:
        sizes += [shape.num_experts, shape.top_k, shape.expert_intermediate]
    if shape.shared_intermediate:
        sizes.append(shape.shared_intermediate)
    if len(shape.moe_layers) < shape.num_layers:
        sizes.append(shape.intermediate)
    assert len(set(sizes)) == len(sizes), sizes
    # The smallest head that vLLM's attention on CPUs takes.
    assert family.tiny.get("head_dim", 32) == 32


def test_every_parameter_of_transformers_is_accounted_for(base: Path, shape: ModelShape) -> None:
    """The folder that transformers saved holds the needed tensors and no other."""
    needed = needed_tensors(shape)
    assert open_folder(base).places.keys() == needed.keys()
    num_needed = 0
    for size in needed.values():
        num_needed += math.prod(size)
    # GLM's correction biases are stored, but are buffers: no parameters.
    num_buffers = len(shape.moe_layers) * shape.num_experts * shape.correction_bias
    expected = num_parameters(in_transformers(base))
    assert num_needed - num_buffers == expected
    assert shape.num_parameters() == expected


def test_the_planner_counts_each_layer_s_parameters(base: Path, shape: ModelShape) -> None:
    model = in_transformers(base)
    for number, layer in enumerate(model.model.layers):
        counted = layer_parameters(shape, ParallelConfig(), shape.is_moe(number))
        assert counted == num_parameters(layer)


def test_an_unknown_field_is_refused_by_name(base: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json has attention_sinks=4, a field megalora"):
        check_fields(read_hf_config(base) | {"attention_sinks": 4})


def test_attention_s_adapter_has_the_size_of_stock_peft_s(base: Path, shape: ModelShape) -> None:
    targets = []
    for projection in layer_projections(shape, 0):
        if ".self_attn." in projection.hf:
            targets.append(projection.name)
    stock = get_peft_model(in_transformers(base), LoraConfig(r=5, target_modules=targets))
    # A has r * in, B out * r numbers; a projection that is missed or too wide changes the sum.
    config = LoRAConfig(rank=5, target_modules=targets)
    assert num_adapted(config, shape) == stock.get_nb_trainable_parameters()[0]


def test_all_linear_is_stock_peft_s_in_a_dense_model(base: Path, shape: ModelShape) -> None:
    # PEFT looks for nn.Linear, and transformers 5 holds experts as packed parameters: there its
    # all-linear leaves them out.
    if shape.moe_layers:
        return
    stock = get_peft_model(in_transformers(base), LoraConfig(r=5, target_modules="all-linear"))
    assert num_adapted(LoRAConfig(rank=5), shape) == stock.get_nb_trainable_parameters()[0]


def _check_bases(bases: dict[str, Path]) -> dict[str, str]:
    """In a world that exists: what the check before step 1 says of each."""
    # One forked rank for all: starting one takes longer than a check.
    lines = {}
    for name, folder in bases.items():
        with parallel_groups(ParallelConfig()) as groups:
            shape = open_folder(folder).shape
            config = ModelConfig(path=str(folder), dtype="float32")
            chunks = build_model(config, ParallelConfig(), shape, folder)
            try:
                lines[name] = check_layers(chunks, groups, folder, torch.float32)
            except ValueError as error:
                lines[name] = str(error)
    return lines


def test_every_kind_of_rotary_scaling_is_transformers(family: Family, tmp_path: Path) -> None:
    """The check before step 1 compares tables, attention and all other modules of a layer."""
    bases = {}
    # Not 1e6, the tiny model's own theta: a forgotten one shows too.
    for kind in family.rope_kinds:
        rope = {"rope_type": kind, "rope_theta": 1e5, **ROPE[kind]}
        bases[kind] = make_tiny(
            tmp_path / kind, arch=family.model_type, num_hidden_layers=2, rope_parameters=rope
        )
    for kind, line in run_ranks(_check_bases, 1, bases)[0].items():
        assert line.startswith("base: layer"), f"{kind}: {line}"


def test_a_kind_of_rotary_scaling_that_was_not_tried_is_refused(
    family: Family, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A family whose list is shorter, as a new one's would be.
    alone = replace(family, rope_kinds=("default",))
    monkeypatch.setitem(FAMILIES, family.model_type, alone)
    rope = {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
    hf = read_hf_config(base) | {"rope_parameters": rope}
    with pytest.raises(ValueError, match=r"type 'linear'; for .*, megalora computes default$"):
        check_fields(hf)
