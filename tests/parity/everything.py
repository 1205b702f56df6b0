"""One small model with everything in it that can be adapted: routed experts, a shared expert, a
dense layer, few KV heads."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megalora.config import LoRAConfig, RunConfig
from megalora.data.order import global_batch_indices
from megalora.data.splits import load_split, split_off_eval
from tests.parity.runs import make_config

NAMES = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate",
    "lm_head",
]
WITHOUT_ROUTER = [name for name in NAMES if name != "gate"]
LORA = LoRAConfig(rank=3, alpha=12.0, target_modules=NAMES)
"""Rank 3, which no parallel size divides; a scale of 4, so that one applied twice or not at all
shows."""
# Layer 0 has routed experts and a shared one, layer 1 is dense; 12 query heads go over four ranks
# while make_tiny's 2 KV heads do not, so at TP 4 two ranks share a KV head.
EVERYTHING = {
    "arch": "qwen2_moe", "num_hidden_layers": 2, "mlp_only_layers": [1], "num_attention_heads": 12,
    "head_dim": 16,
}  # fmt: skip


def config_of(
    base: Path,
    chats: Path,
    out: Path,
    parallel: dict,
    lora: LoRAConfig = LORA,
    recompute: str = "off",
    **train,
) -> RunConfig:
    options = {"global_batch_size": 8, "steps": 2, **train}
    return make_config(base, chats, out, parallel, recompute, lora=lora, **options)


def first_batch(base: Path, chats: Path, size: int = 8) -> list[Any]:
    """The samples of step 0 of such a run, from the words of the data file alone."""
    split = load_split(
        str(chats), AutoTokenizer.from_pretrained(base), format="auto", max_length=256
    )
    # 21 samples held out, as ``make_config`` has it: another number would shift the order.
    train, _ = split_off_eval(split, 21, seed=0)
    # Which samples step 0 has is the product's own: tests/data checks that order by itself.
    indices = global_batch_indices(0, size, len(train.samples), 0)
    return [train.samples[i] for i in indices]
