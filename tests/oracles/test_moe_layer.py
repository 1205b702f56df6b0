"""The plain layer against transformers' own blocks, so that it can judge ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call

from megalora.config import LoRAConfig
from megalora.tiny import make_tiny
from tests.oracles.moe_layer import MoELayer, layer_of
from tests.oracles.training import Oracle
from tests.parity.built import random_factors

MLP = "base_model.model.model.layers.0.mlp."


@pytest.mark.parametrize(
    "options",
    [{}, {"norm_topk_prob": False}, {"arch": "qwen2_moe"}],
    ids=["qwen3", "raw probabilities", "qwen2"],
)
def test_values_and_gradients_of_transformers_block(
    options: dict[str, Any], tmp_path: Path
) -> None:
    base = make_tiny(tmp_path / "base", num_hidden_layers=1, **options)
    lora = LoRAConfig(
        rank=3, alpha=12.0, target_modules=["gate", "gate_proj", "up_proj", "down_proj"]
    )
    _, factors = random_factors(lora, base)
    oracle = Oracle(base, factors, scale=4.0)
    x_TH, dy_TH = torch.randn(
        2, 11, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    theirs = x_TH.clone().requires_grad_()
    mine = x_TH.clone().requires_grad_()

    block = oracle.model.model.layers[0].mlp
    merged = {name.removeprefix("model.layers.0.mlp."): t for name, t in oracle.merged().items()}
    expected = functional_call(block, merged, (theirs[None],))[0]
    (expected * dy_TH).sum().backward()

    layer: MoELayer = layer_of(base, 0, factors, scale=4.0)
    found, _ = layer(mine)
    (found * dy_TH).sum().backward()

    # transformers' router takes its softmax in float32, whatever the model's dtype: 2^-24 of a
    # probability, times a few.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-6)
    assert {MLP + name for name in layer.factors} == oracle.factors.keys()
    for name, factor in layer.factors.items():
        torch.testing.assert_close(factor.grad, oracle.factors[MLP + name].grad, rtol=0, atol=1e-5)
        assert factor.grad is not None and factor.grad.any(), name
