"""The table: every linear LoRA can adapt, its names, shapes and splits, and which gradients must be
summed.

Layers, initialisation, checkpoints, export, parameter counts and the planner read it; names stand
nowhere else.

A factor is split over its kind's group along one dimension, or it is replicated. A replicated
factor sees only part of the sum that makes its gradient (S/t tokens under sequence parallelism, I/n
features under expert tensor parallelism), so its gradient is summed over the very group it is
replicated on. Expert factors exist once per expert, and experts are shared out over EP.

    kind            group   A [r, in]    B [out, r]
    column          tp      replicated   dim 0         (k, v: into KV heads at most)
    row             tp      dim 1        replicated
    router          tp      replicated   replicated
    expert_column   etp     replicated   dim 0
    expert_row      etp     dim 1        replicated
"""

import math
from dataclasses import dataclass
from typing import Literal

from megalora.hf.tensor_names import FactorName, tensor_name
from megalora.model.projections import Kind, Projection
from megalora.model.shape import ModelShape


@dataclass(frozen=True)
class Sharding:
    """How both factors of one kind of projection lie on the ranks of a group."""

    group: Literal["tp", "etp"]
    split_a: int | None
    """Dimension of A that is cut over the group; None where A is replicated."""
    split_b: int | None
    """Dimension of B, likewise."""

    def split(self, factor: FactorName) -> int | None:
        """Dimension of the factor that is cut over the group; None where it is replicated."""
        return self.split_a if factor == "A" else self.split_b


SHARDINGS: dict[Kind, Sharding] = {
    "column": Sharding("tp", None, 0),
    "row": Sharding("tp", 1, None),
    "router": Sharding("tp", None, None),
    "expert_column": Sharding("etp", None, 0),
    "expert_row": Sharding("etp", 1, None),
}


@dataclass(frozen=True)
class Adapted:
    """One projection of one layer with its adapter; for routed experts, of all experts of that
    layer."""

    projection: Projection
    layer: int | None
    """None outside the decoder layers (lm_head)."""
    rank: int
    alpha: float
    scale: float
    out_features: int
    in_features: int
    num_experts: int
    """Experts of the whole model; 0 where there are none."""
    max_shards: int | None = None
    """Largest number of parts that B can be cut into; None for as many as there are ranks."""

    @property
    def name(self) -> str:
        return self.projection.name

    def hf_module(self, expert: int | None = None) -> str:
        """Full HF module name, such as ``model.layers.3.mlp.experts.7.gate_proj``."""
        return self.projection.hf.format(layer=self.layer, expert=expert)

    def hf_modules(self) -> list[str]:
        """The HF module of a dense linear; for routed experts, one per expert."""
        if not self.num_experts:
            return [self.hf_module()]
        return [self.hf_module(expert) for expert in range(self.num_experts)]

    def shape(self, factor: FactorName) -> tuple[int, int]:
        """Shape of the whole factor, of one expert where there are several."""
        if factor == "A":
            return self.rank, self.in_features
        return self.out_features, self.rank

    def num_shards(self, factor: FactorName, group_size: int) -> int:
        """Number of parts that the factor is cut into over a group of ``group_size`` ranks; 1 where
        every rank holds all of it.

        With fewer parts than ranks, neighbours hold the same part and each has a partial gradient
        of it.
        """
        if SHARDINGS[self.projection.kind].split(factor) is None:
            return 1
        # Only B can run out of parts: k and v have as many as there are key/value heads.
        if factor == "B" and self.max_shards:
            return min(group_size, self.max_shards)
        return group_size

    def num_parameters(self) -> int:
        """Parameters of A and B, of all experts of the whole model."""
        return max(1, self.num_experts) * self.rank * (self.in_features + self.out_features)


def expected_tensors(adapted: list[Adapted]) -> dict[str, tuple[int, int]]:
    """Name -> shape of every adapter tensor there must be."""
    tensors: dict[str, tuple[int, int]] = {}
    for a in adapted:
        for module in a.hf_modules():
            tensors[tensor_name(module, "A")] = a.shape("A")
            tensors[tensor_name(module, "B")] = a.shape("B")
    return tensors


def lora_scale(alpha: float, rank: int, use_rslora: bool) -> float:
    """The factor before ``B A``: alpha / rank, or alpha / sqrt(rank) for rsLoRA
    (https://arxiv.org/abs/2312.03732)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def make_adapted(
    projection: Projection, layer: int | None, rank: int, alpha: float, scale: float, s: ModelShape
) -> Adapted:
    """``projection`` of one layer of the model ``s``, with these adapter settings."""
    # (out, in) of the whole weight: of one expert, of all heads.
    out_features, in_features = projection.features(s)
    experts = s.num_experts if projection.is_expert else 0
    max_shards = projection.max_shards(s) if projection.max_shards else None
    return Adapted(
        projection, layer, rank, alpha, scale, out_features, in_features, experts, max_shards
    )
