"""The small models and the adapters that the grid crosses with layouts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from megalora.config import LoRAConfig
from megalora.model.families import FAMILIES
from megalora.model.fields import model_shape
from megalora.model.shape import ModelShape
from megalora.tiny import make_tiny


def arch_of(options: dict[str, Any]) -> str:
    """The family of a model that ``make_tiny`` makes with these options."""
    return options.get("arch", "qwen3_moe")


SIZES: dict[str, Any] = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 16}
"""So that four tensor-parallel ranks get whole query heads."""
TEACHER: dict[str, Any] = {
    **SIZES, "hidden_size": 64, "num_hidden_layers": 5, "mlp_only_layers": [2], "seed": 3,
}  # fmt: skip
"""Options of the model that others learn from: it has the vocabulary of all, and other sizes. Five
layers are no multiple of any number of stages."""
VARIANTS: dict[str, dict[str, Any]] = {
    "moe": {},
    "2 kv heads": {"num_key_value_heads": 2},
    "mixed": {"mlp_only_layers": [1]},
    # One of four layers has experts, so with two pipeline stages one stage has none.
    "one moe layer": {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "tied": {"tie_word_embeddings": True, "norm_topk_prob": False},
    # Qwen2-MoE has a shared expert beside the routed ones.
    "shared": {"arch": "qwen2_moe"},
    # ``make_model`` rewrites its routers.
    "idle": {},
    "dense": {"arch": "qwen3"},
    # No number of stages but 7 divides them.
    "7 layers": {"num_hidden_layers": 7, "mlp_only_layers": [1, 4]},
}
"""Qwen's families under names of their own, and variants of them."""
NAMED_OTHERWISE = {arch_of(options) for options in VARIANTS.values()}
MODELS: dict[str, dict[str, Any]] = dict(VARIANTS)
"""Options of ``make_tiny`` by name; every registered family is among them."""
for _family in FAMILIES:
    if _family not in NAMED_OTHERWISE:
        MODELS[_family] = {"arch": _family}
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Scales of 3 where patterns do not change them, not PEFT's usual 1 or 2: a forgotten or doubled one
# shows.
ADAPTERS: dict[str, LoRAConfig] = {
    "all": LoRAConfig(rank=4, alpha=12.0),
    # Projections whose A's are stacked have different ranks: q, k and v 3, 4 and 5, gate and up 4
    # and 2.
    "ranks": LoRAConfig(
        rank=4, alpha=12.0, rank_pattern={"q_proj": 3, "v_proj": 5, "up_proj": 2, "down_proj": 6},
        alpha_pattern={"k_proj": 3.0, "gate_proj": 20.0},
    ),
    "rslora": LoRAConfig(rank=4, alpha=6.0, expert_rank=2, use_rslora=True),
    "shared outer": LoRAConfig(rank=4, alpha=12.0, rank_pattern={"up_proj": 3}, share_outer=True),
    "router": LoRAConfig(rank=4, alpha=12.0, target_modules=[*NAMES, "gate", "lm_head"]),
    "some": LoRAConfig(rank=4, alpha=12.0, target_modules=["k_proj", "up_proj", "o_proj"],
                       layers="1-"),
    # DoRA on all linears, with norms of each expert, and on some of them.
    "dora": LoRAConfig(rank=4, alpha=12.0, target_modules=NAMES, use_dora=True,
                       rank_pattern={"q_proj": 3, "v_proj": 5, "up_proj": 2}),
    "some dora": LoRAConfig(rank=4, alpha=12.0, target_modules=[*NAMES, "gate", "lm_head"],
                            use_dora=["q_proj", "o_proj", "up_proj"]),
    # A bias of every B, on linears with biases: ``adapter`` takes it out where there are none.
    "lora bias": LoRAConfig(rank=4, alpha=12.0, target_modules=NAMES[:3], lora_bias=True,
                            rank_pattern={"q_proj": 3}),
    # Biases of the base: of k and o too, which have no adapter.
    "biases": LoRAConfig(rank=4, alpha=12.0, target_modules=["q_proj", "v_proj"], bias="all"),
    # A and B beside a pair that stays as it is, which the grid draws as it draws them.
    "begun": LoRAConfig(rank=4, alpha=12.0, target_modules=[*NAMES, "gate"], init="olora",
                        rank_pattern={"q_proj": 3, "v_proj": 5, "up_proj": 2}),
    # Weights of the base beside adapters: of those that a model has.
    "saved": LoRAConfig(rank=4, alpha=12.0, modules_to_save=[
                            "embed_tokens", "lm_head", "norm", "input_layernorm", "k_norm", "gate",
                        ]),
    # Rows of the embedding: one that nearly all samples have, and some that few or none have.
    "tokens": LoRAConfig(rank=4, alpha=12.0, trainable_token_indices=[220, 17, 300, 510]),
}  # fmt: skip


def make_model(name: str, folder: Path) -> Path:
    make_tiny(folder, **{**SIZES, **MODELS[name]})
    if name == "idle":
        silence_experts(folder, first=6)
    return folder


def make_teacher(base: Path) -> Path:
    """The second model that students of all models learn from, beside ``base``; made once."""
    folder = teacher_of(base)
    if not folder.exists():
        make_tiny(folder, **TEACHER)
    return folder


def teacher_of(base: Path) -> Path:
    """Where ``make_teacher`` puts it."""
    return base.with_name("teacher")


def shape_of(name: str) -> ModelShape:
    """The model's sizes, without making it; ``make_model``'s folders are compared with them."""
    options = dict(MODELS[name])
    arch = arch_of(options)
    # An option of make_tiny, not a field of a config.
    options.pop("arch", None)
    return model_shape({**FAMILIES[arch].tiny, **SIZES, **options, "model_type": arch})


def adapter(name: str, shape: ModelShape) -> LoRAConfig:
    """The adapter's settings for a model; one without experts has no router to adapt."""
    lora = ADAPTERS[name]
    if not shape.qkv_bias:
        lora = replace(lora, lora_bias=False, bias="none")
    # Without experts there is nothing to share, and asking for it is an error.
    if not shape.moe_layers:
        lora = replace(lora, share_outer=False)
    # Nor has every model norms of keys, or a router that can be trained whole.
    lacking = set()
    if not shape.qk_norm:
        lacking.add("k_norm")
    if not shape.moe_layers or shape.correction_bias:
        lacking.add("gate")
    lora = replace(lora, modules_to_save=[m for m in lora.modules_to_save if m not in lacking])
    if shape.moe_layers or "gate" not in lora.target_modules:
        return lora
    # A target that matches nothing is an error, so it cannot stay.
    without_router = [target for target in lora.target_modules if target != "gate"]
    return replace(lora, target_modules=without_router)


def silence_experts(folder: Path, first: int) -> None:
    """Rewrite the routers so that experts from ``first`` = 2 * top-k on are never chosen.

    The others' logits come in pairs of a number and its negative, so top-k of them are above zero;
    the silent ones' are zero.
    """
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, router in tensors.items():
            if name.endswith("mlp.gate.weight"):
                # [E, H]: odd rows become the negatives of the even ones before them.
                router[1::2] = -router[::2]
                router[first:] = 0
        save_file(tensors, shard, metadata={"format": "pt"})
