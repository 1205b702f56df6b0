"""Compare the plain layer with transformers' own blocks, so that it can judge ours."""

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


# Qwen3 divides the chosen probabilities by their sum, or does not; Qwen2 adds a shared expert.
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
    # PEFT's scaling: alpha / rank = 12 / 3.
    oracle = Oracle(base, factors, scale=4.0)
    # 11 tokens of the tiny model's hidden size, and the gradient of the output for each.
    x_TH, dy_TH = torch.randn(
        2, 11, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    theirs = x_TH.clone().requires_grad_()
    mine = x_TH.clone().requires_grad_()

    block = oracle.model.model.layers[0].mlp
    # W + scale B A under the names that the block itself has for its parameters.
    merged = {}
    for name, weight in oracle.merged().items():
        merged[name.removeprefix("model.layers.0.mlp.")] = weight
    # The block takes [batch, tokens, hidden].
    expected = functional_call(block, merged, (theirs[None],))[0]
    (expected * dy_TH).sum().backward()

    layer: MoELayer = layer_of(base, 0, factors, scale=4.0)
    found, _ = layer(mine)
    (found * dy_TH).sum().backward()

    # transformers' router takes its softmax in float32, whatever the model's dtype: 2^-24 of a
    # probability, times a few.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-6)
    # A factor that neither side has would not be compared at all.
    assert {MLP + name for name in layer.factors} == oracle.factors.keys()
    for name, factor in layer.factors.items():
        # Sums over 11 tokens, times the scale of 4: ten times what one output may be off by.
        torch.testing.assert_close(factor.grad, oracle.factors[MLP + name].grad, rtol=0, atol=1e-5)
        assert factor.grad is not None and factor.grad.any(), name
