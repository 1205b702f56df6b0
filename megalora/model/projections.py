"""List every linear that LoRA can adapt: its names, sizes and place in Megatron's fused weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from megalora.model.shape import ModelShape

QKV = "self_attention.linear_qkv"
"""Megatron's module of attention's q, k and v."""
O_PROJ = "self_attention.linear_proj"
"""That of its o."""
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

    in_memory: str = ""
    """Its name in transformers' loaded model, where checkpoints are published under another:
    Mixtral's ``block_sparse_moe.experts.E.w1`` is a part of ``mlp.experts``, and would be
    ``mlp.experts.E.gate_proj`` there."""

    @property
    def name(self) -> str:
        return self.hf.rsplit(".", 1)[-1]

    @property
    def loaded(self) -> str:
        """Its name in transformers' loaded model, which PEFT looks for."""
        return self.in_memory or self.hf

    @property
    def role(self) -> str:
        """What the linear is for, by its name in Qwen3-MoE: gate_proj, up_proj, down_proj, ..."""
        return self.loaded.rsplit(".", 1)[-1]

    @property
    def is_expert(self) -> bool:
        return self.kind.startswith("expert")


def _qkv(name: str, heads: Callable[[ModelShape], int]) -> Projection:
    return Projection(
        f"model.layers.{{layer}}.self_attn.{name}", QKV, "column",
        lambda s: (heads(s) * s.head_dim, s.hidden), lambda s: s.num_kv_heads, heads,
    )  # fmt: skip


_MLP = "model.layers.{layer}.mlp"
_EXPERT = "model.layers.{layer}.mlp.experts.{expert}"
_SHARED = "model.layers.{layer}.mlp.shared_expert"
ATTENTION = (
    _qkv("q_proj", lambda s: s.num_heads),
    _qkv("k_proj", lambda s: s.num_kv_heads),
    _qkv("v_proj", lambda s: s.num_kv_heads),
    Projection("model.layers.{layer}.self_attn.o_proj", O_PROJ, "row",
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


def has_bias(projection: Projection, shape: ModelShape) -> bool:
    """Whether a linear of the base has a bias; those outside of attention have none in any
    family."""
    if projection.module == QKV:
        return shape.qkv_bias
    return projection.module == O_PROJ and shape.o_bias


@dataclass(frozen=True)
class StoredAs:
    """Rows of a tensor of a base folder that are one linear's weight."""

    tensor: str
    size: tuple[int, ...]
    """Shape of the whole tensor."""
    expert: int | None = None
    """Place in the first dimension of a tensor for all experts; None for a matrix."""
    first_row: int = 0
    """First row of the linear among the rows of that expert."""


def ways_to_store(
    projection: Projection, shape: ModelShape, layer: int | None, expert: int | None
) -> Iterator[StoredAs]:
    """Every way in which a base folder may store a linear, the published one first."""
    size = projection.features(shape)
    yield StoredAs(f"{projection.hf.format(layer=layer, expert=expert)}.weight", size)
    if not projection.is_expert:
        # transformers writes its own names with save_pretrained(..., save_original_format=False).
        if projection.in_memory:
            yield StoredAs(f"{projection.in_memory.format(layer=layer)}.weight", size)
        return
    # transformers packs experts: gate_up_proj [E, 2I, H], an expert's rows of gate, then those of
    # up; down_proj [E, H, I].
    rows, columns = size
    block = projection.loaded.split(".{expert}.")[0].format(layer=layer)
    if projection.kind == "expert_row":
        yield StoredAs(f"{block}.down_proj", (shape.num_experts, rows, columns), expert)
        return
    # [E, 2I, H]: up's rows follow gate's.
    first = rows if projection.role == "up_proj" else 0
    yield StoredAs(f"{block}.gate_up_proj", (shape.num_experts, 2 * rows, columns), expert, first)
