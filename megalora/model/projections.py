"""List every linear that LoRA can adapt: its names, sizes and place in Megatron's fused weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megalora.model.shape import ModelShape

Kind = Literal["column", "row", "router", "expert_column", "expert_row"]


@dataclass(frozen=True)
class Projection:
    """One HF linear. Projections with the same ``module`` are rows of one fused Megatron weight, in
    table order."""

    hf: str
    module: str
    kind: Kind
    features: Callable[[ModelShape], tuple[int, int]]
    """(out, in) of the whole weight."""
    row_groups: Callable[[ModelShape], int] = lambda s: 1
    """The fused weight repeats its projections this many times over TP: query groups, or 1 for one
    block a rank."""
    max_shards: Callable[[ModelShape], int] | None = None
    """B can be cut into at most so many parts; with more ranks than that, several hold the same
    part."""

    like: str = ""
    """The name that this linear has in Qwen3-MoE, where the family calls it otherwise: "gate_proj"
    for Mixtral's w1."""

    @property
    def name(self) -> str:
        return self.hf.rsplit(".", 1)[-1]

    @property
    def role(self) -> str:
        """What the linear is for, by its name in Qwen3-MoE: gate_proj, up_proj, down_proj, ..."""
        return self.like or self.name

    @property
    def is_expert(self) -> bool:
        return self.kind.startswith("expert")


def _qkv(name: str, heads: Callable[[ModelShape], int]) -> Projection:
    return Projection(
        f"model.layers.{{layer}}.self_attn.{name}", "self_attention.linear_qkv", "column",
        lambda s: (heads(s) * s.head_dim, s.hidden), lambda s: s.num_kv_heads, heads,
    )  # fmt: skip


_MLP = "model.layers.{layer}.mlp"
_EXPERT = "model.layers.{layer}.mlp.experts.{expert}"
_SHARED = "model.layers.{layer}.mlp.shared_expert"
ATTENTION = (
    _qkv("q_proj", lambda s: s.num_heads),
    _qkv("k_proj", lambda s: s.num_kv_heads),
    _qkv("v_proj", lambda s: s.num_kv_heads),
    Projection("model.layers.{layer}.self_attn.o_proj", "self_attention.linear_proj", "row",
               lambda s: (s.hidden, s.num_heads * s.head_dim)),
)  # fmt: skip
DENSE_MLP = (
    Projection(
        f"{_MLP}.gate_proj", "mlp.linear_fc1", "column", lambda s: (s.intermediate, s.hidden)
    ),
    Projection(f"{_MLP}.up_proj", "mlp.linear_fc1", "column", lambda s: (s.intermediate, s.hidden)),
    Projection(f"{_MLP}.down_proj", "mlp.linear_fc2", "row", lambda s: (s.hidden, s.intermediate)),
)
MOE = (
    Projection(f"{_MLP}.gate", "mlp.router", "router", lambda s: (s.num_experts, s.hidden)),
    Projection(
        f"{_EXPERT}.gate_proj",
        "mlp.experts.gate_up",
        "expert_column",
        lambda s: (s.expert_intermediate, s.hidden),
    ),
    Projection(
        f"{_EXPERT}.up_proj",
        "mlp.experts.gate_up",
        "expert_column",
        lambda s: (s.expert_intermediate, s.hidden),
    ),
    Projection(
        f"{_EXPERT}.down_proj",
        "mlp.experts.down",
        "expert_row",
        lambda s: (s.hidden, s.expert_intermediate),
    ),
)
SHARED_EXPERT = (
    Projection(f"{_SHARED}.gate_proj", "mlp.shared_experts.linear_fc1", "column",
               lambda s: (s.shared_intermediate, s.hidden)),
    Projection(f"{_SHARED}.up_proj", "mlp.shared_experts.linear_fc1", "column",
               lambda s: (s.shared_intermediate, s.hidden)),
    Projection(f"{_SHARED}.down_proj", "mlp.shared_experts.linear_fc2", "row",
               lambda s: (s.hidden, s.shared_intermediate)),
)  # fmt: skip
_SHARED_EXPERTS = "model.layers.{layer}.mlp.shared_experts"
SHARED_EXPERTS = (
    Projection(f"{_SHARED_EXPERTS}.gate_proj", "mlp.shared_experts.linear_fc1", "column",
               lambda s: (s.shared_intermediate, s.hidden)),
    Projection(f"{_SHARED_EXPERTS}.up_proj", "mlp.shared_experts.linear_fc1", "column",
               lambda s: (s.shared_intermediate, s.hidden)),
    Projection(f"{_SHARED_EXPERTS}.down_proj", "mlp.shared_experts.linear_fc2", "row",
               lambda s: (s.hidden, s.shared_intermediate)),
)  # fmt: skip
"""As ``SHARED_EXPERT``, under the name of families that may have several, side by side in one."""
HEAD = (Projection("lm_head", "output_layer", "column", lambda s: (s.vocab, s.hidden)),)
