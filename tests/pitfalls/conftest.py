"""One small model with everything in it that can be adapted: routed experts, a shared expert, a dense layer, few KV heads."""

from pathlib import Path

import pytest

from megalora.config import LoRAConfig, RunConfig
from megalora.tiny import make_tiny
from tests.parity.models import silence_experts
from tests.parity.runs import make_config

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate", "lm_head"]
LORA = LoRAConfig(rank=3, alpha=12.0, target_modules=NAMES)
EVERYTHING = {
    "arch": "qwen2_moe", "num_hidden_layers": 2, "mlp_only_layers": [1], "num_attention_heads": 12, "head_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 0: 8 routed experts and a shared one; layer 1: dense; 12 query heads on 2 key/value heads."""
    return make_tiny(tmp_path_factory.mktemp("models") / "everything", **EVERYTHING)


@pytest.fixture(scope="session")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with experts 6 and 7 never chosen."""
    folder = make_tiny(tmp_path_factory.mktemp("models") / "idle", **EVERYTHING)
    silence_experts(folder, first=6)
    return folder


def config_of(
    base: Path, chats: Path, out: Path, parallel: dict, lora: LoRAConfig = LORA, recompute: str = "off", **train
) -> RunConfig:
    options = {"global_batch_size": 8, "steps": 2, **train}
    return make_config(base, chats, out, parallel, recompute, lora=lora, **options)
