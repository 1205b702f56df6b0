"""Make bases of several families for the tests of the account of tensors."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases by family, together with every kind of tensor: biases, norms, a dense MLP among MoE
    layers, a shared expert with its gate."""
    # A conftest is imported before the host is prepared, which Megatron must come after.
    from tests.oracles.base import make_base

    folder = tmp_path_factory.mktemp("account")
    return {
        "qwen3_moe": make_base(folder / "qwen3_moe", mlp_only_layers=[0]),
        "qwen3": make_base(folder / "qwen3", "qwen3", attention_bias=True),
        "qwen2_moe": make_base(folder / "qwen2_moe", "qwen2_moe"),
    }
