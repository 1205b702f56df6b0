"""Benchmark what trains weights of the base beside adapters: what is trained, and its FLOPs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from megalora.bench.command import predicted
from megalora.bench.flops import flops_per_token
from megalora.bench.rows import BenchOptions
from megalora.bench.steps import measure_layout, one_step, training
from megalora.config import LoRAConfig, RunConfig
from megalora.hf.json_file import read_hf_config
from megalora.lora.whole import with_trained
from megalora.model.fields import model_shape
from megalora.planner.gpus import GPUS
from megalora.tiny import make_tiny
from tests.distributed.ranks import run_ranks
from tests.parity.built import whole_adapter
from tests.parity.runs import make_config

LENGTH = 41
H100 = replace(GPUS["h100"], dtype="float32")


def flops_of(folder: Path, **lora: Any) -> int:
    """By our formula, without adapters."""
    shape = model_shape(read_hf_config(folder))
    return flops_per_token(with_trained(LoRAConfig(**lora), shape), [], 64).model


def counted(folder: Path, trained: list[str]) -> int:
    """Products of a pass of transformers over 16 tokens and back, by torch's counter."""
    # Experts one by one: products of a token with all of them would be counted, too.
    model: Any = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    model.requires_grad_(False)
    for name in trained:
        model.get_submodule(name).weight.requires_grad_(True)
    # Something below the first layer is trained, as an adapter there would be.
    hidden = model.get_input_embeddings()(torch.arange(16)[None]).detach().requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=hidden, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_flops_are_those_that_torch_counts(tied: bool, tiny: Path, tmp_path: Path) -> None:
    """What training a weight adds to a pass of transformers' own model."""
    folder = make_tiny(tmp_path / "tied", tie_word_embeddings=True) if tied else tiny
    head = "embed_tokens" if tied else "lm_head"
    shape = model_shape(read_hf_config(folder))
    plain = counted(folder, [])
    layers = [f"model.layers.{number}" for number in range(shape.num_layers)]
    for saved, names, expected in (
        # The head's weight is the embedding's where they are tied.
        ([head], ["lm_head"], 2 * shape.vocab * shape.hidden),
        (
            ["gate"],
            [f"{layer}.mlp.gate" for layer in layers],
            2 * shape.num_experts * shape.hidden * shape.num_layers,
        ),
        (["norm", "input_layernorm"], ["model.norm", f"{layers[0]}.input_layernorm"], 0),
    ):
        ours = flops_of(folder, modules_to_save=saved) - flops_of(folder)
        assert ours == expected, saved
        assert counted(folder, names) - plain == 16 * expected, saved


def test_flops_of_rows_by_hand(tiny: Path, tmp_path: Path) -> None:
    """Looked up; where the head is tied, their logits are products of their own as well."""
    tied = make_tiny(tmp_path / "tied", tie_word_embeddings=True)
    rows = {"trainable_token_indices": [3, 77, 250]}
    assert flops_of(tiny, **rows) == flops_of(tiny)
    hidden = model_shape(read_hf_config(tied)).hidden
    assert flops_of(tied, **rows) - flops_of(tied) == 3 * 2 * 3 * hidden
    # An embedding that is not tied is looked up, too.
    assert flops_of(tiny, modules_to_save=["embed_tokens"]) == flops_of(tiny)


def moved(config: RunConfig) -> dict[str, float]:
    """By how much a step of the benchmark moves each tensor of the adapter, at most; a rank
    function."""
    with training(config, BenchOptions(weights="real")) as run:
        before = whole_adapter(run) or {}
        before = {name: tensor.clone() for name, tensor in before.items()}
        one_step(run, 0)
        found = {}
        for name, tensor in (whole_adapter(run) or {}).items():
            found[name] = (tensor - before[name]).abs().max().item()
        return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "sizes"),
    [
        ({"modules_to_save": ["lm_head", "gate", "norm"]}, {"tp": 2}),
        ({"trainable_token_indices": list(range(3, 250, 5))}, {"pp": 2}),
    ],
    ids=["saved", "rows"],
)
def test_for_real(lora: dict, sizes: dict, tiny: Path, chats: Path, tmp_path: Path) -> None:
    lora = {"rank": 4, "target_modules": ["q_proj", "v_proj"], **lora}
    config = make_config(
        tiny, chats, tmp_path, sizes, lora=LoRAConfig(**lora), micro_batch_size=2,
        global_batch_size=4,
    )  # fmt: skip
    config = replace(config, data=replace(config.data, max_length=LENGTH))
    (found, _) = run_ranks(moved, 2, config)
    whole = {name for name in found if ".lora_" not in name}
    if "modules_to_save" in lora:
        assert {name.split(".")[-2] for name in whole} == {"lm_head", "gate", "norm"}
    else:
        assert len(whole) == 1
    for name in whole:
        assert found[name] > 0, name
    m, _ = run_ranks(measure_layout, 2, config, BenchOptions(steps=1, warmup=2, weights="real"))
    flops = flops_of(tiny, **lora)
    # Adapters of q and v on every layer.
    s = model_shape(read_hf_config(tiny))
    heads = s.head_dim * (s.num_heads + s.num_kv_heads)
    flops += 6 * 4 * (2 * s.hidden + heads) * s.num_layers
    # Attention over 40 positions, and not 64.
    flops -= 6 * (64 - LENGTH + 1) * s.num_heads * s.head_dim * s.num_layers
    per_step = 4 * (LENGTH - 1)
    assert m.model_tflops == pytest.approx(per_step * flops / m.step_seconds / 2 / 1e12)
    plan = predicted(config, 2, H100)
    # Single temporaries matter on so small a model; tests/planner compares far more closely.
    assert 0.75 * plan.peak_bytes < max(m.peak_bytes) < 1.25 * plan.peak_bytes
