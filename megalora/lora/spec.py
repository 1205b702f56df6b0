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

Every other factor is split, and its gradient summed, like one of these two (``FACTORS``).

With ``lora.share_outer`` all experts of a layer have one A of gate, one of up and one B of down,
the factors that touch the hidden size. Such a factor is a dense parameter. Each rank of a stage has
the gradient of the rows of its own experts, and the ranks of a stage are tp x dp, which is
etp x ep x edp: data parallelism sums one part, tp the other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megalora.hf.tensor_names import FactorName, tensor_name
from megalora.lora.trained_weight import TrainedWeight
from megalora.model.projections import HEAD, Kind, Projection
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
        return self.split_a if FACTORS[factor].like == "A" else self.split_b


@dataclass(frozen=True)
class Factor:
    """What holds of one factor, whatever linear it belongs to.

    A's of all projections of a fused weight are stacked into one parameter, and so is what is like
    them; of B, and of what is like it, each projection has its own.
    """

    like: Literal["A", "B"]
    """Which of the two it is split and summed like, and has the learning rate of."""
    is_vector: bool = False
    """Whether it is ``[out]``, one number for each row of B, instead of a matrix."""
    trained: bool = True
    float32: bool = False
    """Whether its values are float32 also where the model is bfloat16."""
    decays: bool = True
    """Whether weight decay applies to it."""


FACTORS: dict[FactorName, Factor] = {
    "A": Factor("A"),
    "B": Factor("B"),
    # In bfloat16 a magnitude could not be the norm of its row, so training would not start from
    # the base. Decay would pull it to zero, which is far from the base too.
    "M": Factor("B", is_vector=True, float32=True, decays=False),
    # A bias of B, which the linear's own bias gets times the scale.
    "C": Factor("B", is_vector=True, decays=False),
    # Factors of the base weights. Beside them "A" and "B" are the differences to them that are
    # trained (``base_factors.py``).
    "A0": Factor("A", trained=False),
    "B0": Factor("B", trained=False),
}


PLAIN: tuple[FactorName, ...] = ("A", "B")
"""Factors of a linear with LoRA."""
WITH_MAGNITUDE: tuple[FactorName, ...] = ("A", "B", "M")
"""Factors of a linear with DoRA."""
WITH_BIAS: tuple[FactorName, ...] = ("A", "B", "C")
"""Factors of a linear with ``lora_bias``."""
WITH_START: tuple[FactorName, ...] = ("A", "B", "A0", "B0")
"""Factors of a linear whose adapter is initialised from the base weights."""
FACTORS_BY_NAME = {"".join(factors): factors for factors in (WITH_MAGNITUDE, WITH_BIAS, WITH_START)}
"""As a checkpoint's state names them, where they are more than A and B."""


SHARDINGS: dict[Kind, Sharding] = {
    "column": Sharding("tp", None, 0),
    "row": Sharding("tp", 1, None),
    "router": Sharding("tp", None, None),
    "expert_column": Sharding("etp", None, 0),
    "expert_row": Sharding("etp", 1, None),
}

OUTER: dict[Kind, FactorName] = {"expert_column": "A", "expert_row": "B"}
"""The factor of an expert's projection that touches the hidden size."""


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
    factors: tuple[FactorName, ...] = PLAIN
    """Factors of each of its linears, in the order of ``FACTORS``."""
    shared: FactorName | None = None
    """The factor that all experts of the layer share; None where each has its own."""
    expert_ranks: tuple[int, ...] = ()
    """Rank of each expert where they differ, ``rank`` being the largest: rows of A and columns of B
    behind an expert's rank are zero and stay so. Empty where all have ``rank``."""
    kept: int = 0
    """Adapters of earlier cycles of the same rank that lie beside this one, frozen, at the end of a
    run (``kept.py``)."""

    @property
    def name(self) -> str:
        return self.projection.name

    @property
    def product_rank(self) -> int:
        """Rank of what is added to the base: ``B A``, or ``[dB, B0] [A0 + dA; dA]``, or at the end
        of a run with kept cycles all of them."""
        return 2 * self.rank if "A0" in self.factors else (1 + self.kept) * self.rank

    def hf_module(self, expert: int | None = None) -> str:
        """Full HF module name, such as ``model.layers.3.mlp.experts.7.gate_proj``."""
        return self.projection.hf.format(layer=self.layer, expert=expert)

    def hf_modules(self) -> list[str]:
        """The HF module of a dense linear; for routed experts, one per expert."""
        if not self.num_experts:
            return [self.hf_module()]
        return [self.hf_module(expert) for expert in range(self.num_experts)]

    def factor_module(self, factor: FactorName, expert: int | None = None) -> str:
        """The module under whose name the factor is trained: ``hf_module``, and for a factor that
        experts share that name without a number, ``model.layers.3.mlp.experts.gate_proj``."""
        if factor != self.shared:
            return self.hf_module(expert)
        return self.projection.hf.replace(".{expert}.", ".").format(layer=self.layer)

    def tensor_name(self, factor: FactorName, expert: int | None = None) -> str:
        """Name of the tensor that is trained of the factor, as in a checkpoint's state."""
        return tensor_name(self.factor_module(factor, expert), factor)

    def group(self, factor: FactorName) -> Literal["tp", "etp"]:
        """Name of the group over which the factor is split or replicated."""
        # What experts share is never split: it is as wide as the hidden size.
        return "tp" if factor == self.shared else SHARDINGS[self.projection.kind].group

    def num_tensors(self, factor: FactorName) -> int:
        """Number of tensors that there are of the factor in the whole model."""
        return 1 if factor == self.shared else max(1, self.num_experts)

    def shape(self, factor: FactorName) -> tuple[int, ...]:
        """Shape of the whole factor, of one expert where there are several."""
        if FACTORS[factor].is_vector:
            return (self.out_features,)
        if FACTORS[factor].like == "A":
            return self.rank, self.in_features
        return self.out_features, self.rank

    def shard_shape(self, factor: FactorName, group_size: int) -> list[int]:
        """``shape`` of the part of the factor on each of ``group_size`` ranks."""
        sizes = list(self.shape(factor))
        split = SHARDINGS[self.projection.kind].split(factor)
        if split is not None:
            sizes[split] //= self.num_shards(factor, group_size)
        return sizes

    def num_shards(self, factor: FactorName, group_size: int) -> int:
        """Number of parts that the factor is cut into over a group of ``group_size`` ranks; 1 where
        every rank holds all of it.

        With fewer parts than ranks, neighbours hold the same part and each has a partial gradient
        of it.
        """
        if SHARDINGS[self.projection.kind].split(factor) is None:
            return 1
        # Only B can run out of parts: k and v have as many as there are key/value heads.
        if FACTORS[factor].like == "B" and self.max_shards:
            return min(group_size, self.max_shards)
        return group_size

    def num_parameters(self) -> int:
        """Trained parameters, of all experts of the whole model."""
        total = 0
        for factor in self.factors:
            if FACTORS[factor].trained:
                total += self.num_tensors(factor) * math.prod(self.shape(factor))
        # Zeros behind the ranks of experts, of A and of B, are stored and never change.
        zeros = sum(self.rank - rank for rank in self.expert_ranks)
        return total - zeros * (self.in_features + self.out_features)


def expected_tensors(
    adapted: list[Adapted], whole: Sequence[TrainedWeight] = ()
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every adapter tensor there must be, weights that are trained whole last."""
    tensors: dict[str, tuple[int, ...]] = {}
    for a in adapted:
        # A before B of each expert, as files have them.
        for expert in range(max(1, a.num_experts)):
            for factor in a.factors:
                tensors[a.tensor_name(factor, expert)] = a.shape(factor)
    for weight in whole:
        tensors[weight.tensor] = weight.size
    return tensors


def has_dora(projection: Projection) -> bool:
    """Whether a linear may have a magnitude: not the router and lm_head."""
    return projection.kind != "router" and projection not in HEAD


def has_biases(adapted: Sequence[Adapted]) -> bool:
    """Whether an adapter has a bias of every B."""
    return any("C" in a.factors for a in adapted)


def has_magnitudes(adapted: list[Adapted]) -> bool:
    """Whether an adapter has DoRA, on some linears at least."""
    return any("M" in a.factors for a in adapted)


def has_start(adapted: Sequence[Adapted]) -> bool:
    """Whether an adapter is initialised from the base weights, of which it has A0 and B0."""
    return any("A0" in a.factors for a in adapted)


def in_parts(adapted: list[Adapted]) -> bool:
    """Whether some linears of an adapter have DoRA and others have none."""
    return len({"M" in a.factors for a in adapted}) == 2


def trained_sizes(adapted: list[Adapted], group_size: int) -> list[tuple[FactorName, int]]:
    """(factor, elements) of each trained parameter of one module on one of ``group_size`` ranks, of
    one expert where there are several: one for the A's of its projections, a B of each."""
    stacked: dict[FactorName, int] = {}
    sizes: list[tuple[FactorName, int]] = []
    for a in adapted:
        for factor in a.factors:
            row = FACTORS[factor]
            size = math.prod(a.shard_shape(factor, group_size))
            if row.trained and row.like == "A":
                stacked[factor] = stacked.get(factor, 0) + size
            elif row.trained:
                sizes.append((factor, size))
    return [*stacked.items(), *sizes]


def lora_scale(alpha: float, rank: int, use_rslora: bool) -> float:
    """The factor before ``B A``: alpha / rank, or alpha / sqrt(rank) for rsLoRA
    (https://arxiv.org/abs/2312.03732)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def make_adapted(
    projection: Projection, layer: int | None, rank: int, alpha: float, scale: float, s: ModelShape,
    factors: tuple[FactorName, ...] = PLAIN,
    *, share_outer: bool = False, expert_ranks: tuple[int, ...] = (),
) -> Adapted:  # fmt: skip
    """``projection`` of one layer of the model ``s``, with these adapter settings.

    ``share_outer``: whether routed experts share the factor that ``OUTER`` names."""
    # (out, in) of the whole weight: of one expert, of all heads.
    out_features, in_features = projection.features(s)
    experts = s.num_experts if projection.is_expert else 0
    max_shards = projection.max_shards(s) if projection.max_shards else None
    shared = OUTER.get(projection.kind) if share_outer else None
    return Adapted(
        projection, layer, rank, alpha, scale, out_features, in_features, experts, max_shards,
        factors, shared, expert_ranks, s.kept_cycles,
    )  # fmt: skip
