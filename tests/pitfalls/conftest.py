"""One small model with everything in it that can be adapted: routed experts, a shared expert, a dense layer, few KV heads."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megalora.config import LoRAConfig, RunConfig
from megalora.tiny import make_tiny
from tests.distributed.test_layouts import make_config

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
    """The same with experts 6 and 7 never chosen: of the logits ±a, ±b, ±c three are above zero, and theirs are zero."""
    folder = make_tiny(tmp_path_factory.mktemp("models") / "idle", **EVERYTHING)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in [n for n in tensors if n.endswith("mlp.gate.weight")]:
            tensors[name][1::2] = -tensors[name][::2]
            tensors[name][6:] = 0
        save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def config_of(
    base: Path, chats: Path, out: Path, parallel: dict, lora: LoRAConfig = LORA, recompute: str = "off", **train
) -> RunConfig:
    options = {"global_batch_size": 8, "steps": 2, **train}
    return replace(make_config(base, chats, out, parallel, recompute, **options), lora=lora)
