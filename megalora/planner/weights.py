"""Count the parameters that ``build_model`` and ``inject`` leave on one rank, from sizes alone.

Each count is exact: ``dryrun.py`` builds the same rank on the meta device and finds the same
number.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from megalora.config import Level, LoRAConfig, ParallelConfig, Recompute, RecomputeLayers
from megalora.lora.select import resolve
from megalora.lora.spec import Adapted
from megalora.lora.trained_weight import TrainedWeight, trained_weights
from megalora.lora.whole import check_apart, with_biases, with_trained
from megalora.model.projections import O_PROJ
from megalora.model.shape import ModelShape


def stacked_rank(adapted: Iterable[Adapted]) -> int:
    """R: the ranks of the projections whose A's one module stacks, added up; with what they began
    as, where that is beside them."""
    return sum(a.product_rank for a in adapted)


@dataclass(frozen=True)
class PlannedModel:
    """Sizes of a model and the projections that LoRA adapts in it, resolved once for all
    layouts."""

    shape: ModelShape
    adapted: tuple[Adapted, ...]
    has_dropout: bool = False
    """Whether every A reads a dropped-out copy of its input; how much is dropped changes
    nothing."""

    @classmethod
    def of(cls, shape: ModelShape, lora: LoRAConfig) -> "PlannedModel":
        """Raises ``ValueError`` for targets that match nothing, as training does."""
        shape = with_trained(lora, shape)
        adapted = tuple(resolve(lora, shape))
        shape = with_biases(lora, shape, adapted)
        check_apart(adapted, shape)
        return cls(shape, adapted, has_dropout=lora.dropout > 0)

    @cached_property
    def by_layer(self) -> dict[int | None, dict[str, list[Adapted]]]:
        """Layer (None: outside) -> Megatron module -> its adapted projections, in table order."""
        found: dict[int | None, dict[str, list[Adapted]]] = {}
        for a in self.adapted:
            found.setdefault(a.layer, {}).setdefault(a.projection.module, []).append(a)
        return found

    def modules_of(self, layer: int | None) -> dict[str, list[Adapted]]:
        """Adapted projections of a layer by Megatron module; empty for a layer without
        adapters."""
        return self.by_layer.get(layer, {})

    @cached_property
    def whole(self) -> dict[int | None, list[TrainedWeight]]:
        """Layer (None: outside) -> its weights that are trained whole, trained rows and a score
        head among those outside."""
        found: dict[int | None, list[TrainedWeight]] = {}
        for weight in trained_weights(self.shape):
            found.setdefault(weight.layer, []).append(weight)
        return found

    def trains(self, layer: int | None, path: str) -> bool:
        """Whether the weight of a Megatron module is trained whole."""
        return any(weight.path == path for weight in self.whole.get(layer, []))

    def trains_in_attention(self, layer: int) -> bool:
        """Whether norms of queries or keys, or biases of q, k or v are trained: behind them core
        attention needs a gradient."""
        for weight in self.whole.get(layer, []):
            if weight.path.startswith("self_attention.") and weight.path != O_PROJ:
                return True
        return False

    @property
    def trains_embedding(self) -> bool:
        """Whether the embedding or some rows of it are trained: backward goes down to it."""
        return any(weight.path.startswith("embedding") for weight in self.whole.get(None, []))

    @cached_property
    def kinds(self) -> list[int]:
        """For each layer the first layer that is like it, which stands for both. Models have one or
        two kinds."""
        first: dict[object, int] = {}
        kinds = []
        for layer in range(self.shape.num_layers):
            # Layers are alike when their MLPs are of one sort and the same projections are adapted
            # with the same ranks, and with magnitudes or without, and the same weights are trained.
            ranks = []
            for adapted in self.modules_of(layer).values():
                ranks.extend((a.projection.module, a.name, a.rank, a.factors) for a in adapted)
            whole = tuple((weight.path, weight.size) for weight in self.whole.get(layer, []))
            likeness = (self.shape.is_moe(layer), tuple(ranks), whole)
            kinds.append(first.setdefault(likeness, layer))
        return kinds

    @cached_property
    def memo(self) -> dict[tuple[object, ...], Any]:
        """Results of earlier counts, by name and sizes: many layers are of one kind, and many
        layouts cut them alike."""
        return {}

    @cached_property
    def first_adapted(self) -> int:
        """The first layer with an adapter or a weight that is trained; nothing below it takes part
        in backward. The number of layers where the head alone is adapted; -1 where the embedding is
        trained, whose output needs a gradient as that of a layer does."""
        if self.trains_embedding:
            return -1
        layers = [layer for layer in (*self.by_layer, *self.whole) if layer is not None]
        return min(layers, default=self.shape.num_layers)


@dataclass(frozen=True)
class Chunk:
    """One model chunk of a pipeline stage."""

    stage: int
    layers: range
    has_embedding: bool
    has_head: bool
    layers_before: int = 0
    """Layers of the stage's chunks before this one."""

    def levels(self, recompute: Recompute) -> tuple[int, Level]:
        """(how many of its layers, from the first on, are recomputed fully, what the others
        recompute)."""
        num_layers = len(self.layers)
        if isinstance(recompute, RecomputeLayers):
            num_full = min(max(recompute.layers - self.layers_before, 0), num_layers)
            return num_full, recompute.rest
        return (num_layers if recompute == "full" else 0), recompute


Content = tuple[tuple[tuple[int, int], ...], int, bool, bool]
"""What a chunk holds: runs of layers as (kind, how many), its layers below the first adapter, and
whether it has the embedding and the head."""


def content_of(model: PlannedModel, chunk: Chunk) -> Content:
    """Chunks of the same content need the same bytes and seconds."""
    key = ("content", chunk.layers, chunk.has_embedding, chunk.has_head)
    if key not in model.memo:
        runs = []
        for kind, layers in groupby(model.kinds[layer] for layer in chunk.layers):
            runs.append((kind, len(list(layers))))
        # Layers below the first adapter take no part in backward, so their number counts.
        below = min(max(model.first_adapted - chunk.layers.start, 0), len(chunk.layers))
        model.memo[key] = tuple(runs), below, chunk.has_embedding, chunk.has_head
    return model.memo[key]


def chunks_of(shape: ModelShape, p: ParallelConfig, stage: int) -> list[Chunk]:
    """The ``vpp`` chunks of a stage: chunk v of stage s is the (v * pp + s)th piece of the
    layers."""
    assert 0 <= stage < p.pp, f"stage {stage} of {p.pp}"
    pieces = p.chunk_layers(shape.num_layers)
    found = []
    before = 0
    for piece in range(stage, len(pieces), p.pp):
        layers = pieces[piece]
        found.append(Chunk(stage, layers, piece == 0, piece == len(pieces) - 1, before))
        before += len(layers)
    return found


def stage_chunks(model: PlannedModel, p: ParallelConfig, stage: int) -> list[Chunk]:
    """``chunks_of``, kept for all microbatches and levels of recomputation."""
    key = ("chunks", p, stage)
    if key not in model.memo:
        model.memo[key] = chunks_of(model.shape, p, stage)
    return model.memo[key]


def base_parameters(shape: ModelShape, p: ParallelConfig, chunk: Chunk) -> int:
    """Frozen parameters of a chunk on one rank.

    Layers as in ``layer_parameters``; embedding and head V H / tp each (one of them where both are
    on this rank and tied); the final norm H with the head.
    """
    num_moe = sum(map(shape.is_moe, chunk.layers))
    num_dense = len(chunk.layers) - num_moe
    total = 0
    # Asked for only where there are such layers: a model of one kind has no sizes of the other.
    if num_moe:
        total += num_moe * layer_parameters(shape, p, True)
    if num_dense:
        total += num_dense * layer_parameters(shape, p, False)
    embedding = shape.vocab // p.tp * shape.hidden
    if chunk.has_embedding:
        total += embedding
    if chunk.has_head:
        total += shape.hidden
        # A tied head on the embedding's rank is the embedding; on another rank it is a copy.
        is_tied = shape.tied_embeddings and chunk.has_embedding
        # A score head stands in place of lm_head, and is trained.
        if not (is_tied or shape.num_scores):
            total += embedding
    return total


def router_buffer_bytes(shape: ModelShape, chunk: Chunk) -> int:
    """Bytes of a chunk's router buffers: GLM's correction bias and Megatron's count of tokens
    beside it, each float32 for every expert. Other routers have none."""
    if not shape.correction_bias:
        return 0
    num_routers = sum(map(shape.is_moe, chunk.layers))
    return num_routers * shape.num_experts * 2 * 4


def token_buffer_bytes(shape: ModelShape, p: ParallelConfig, chunk: Chunk, tp_rank: int) -> int:
    """Bytes of a chunk's buffers for trained rows: all their token ids beside the embedding, and
    beside a tied head which rows make a logit of this rank, and which logit; int64 each."""
    total = 0
    if chunk.has_embedding:
        total += len(shape.tokens)
    if chunk.has_head and shape.has_tied_head:
        width = shape.vocab // p.tp
        total += 2 * sum(token // width == tp_rank for token in shape.tokens)
    return 8 * total


def layer_parameters(shape: ModelShape, p: ParallelConfig, is_moe: bool) -> int:
    """Frozen parameters of one decoder layer on one rank.

    Attention: (q + 2 kv) (H + bias) + (q + bias) H with q = heads d / tp and kv = max(kv heads, tp)
        d / tp, for a head is repeated on ranks beyond the number of heads; two norms 2 H, and 2 d
        of q and k (q + kv where these norms run over all heads). MoE: router E H, experts
        (E / ep) 3 H I / etp, shared expert 3 H I_s / tp and H where it has a gate. Dense:
        3 H I / tp.
    """
    h = shape.hidden
    q, kv = attention_widths(shape, p)
    # qkv's bias is split like its outputs; o's bias is whole on every rank, H of them.
    total = (q + 2 * kv) * (h + shape.qkv_bias) + (q + shape.o_bias) * h + 2 * h
    if shape.qk_norm:
        total += q + kv if shape.full_width_norms else 2 * shape.head_dim
    # The factor 3 in each MLP: gate, up and down have the same number of elements.
    if not is_moe:
        return total + 3 * h * (shape.intermediate // p.tp)
    # The router is whole on every rank: it scores all experts.
    total += shape.num_experts * h
    total += shape.num_experts // p.ep * 3 * h * (shape.expert_intermediate // p.etp)
    if shape.shared_intermediate:
        total += 3 * h * (shape.shared_intermediate // p.tp) + shape.shared_gate * h
    return total


def attention_widths(shape: ModelShape, p: ParallelConfig) -> tuple[int, int]:
    """(features of q, features of k and of v) on one rank."""
    heads = shape.num_heads // p.tp
    # With more ranks than key/value heads, Megatron repeats a head: one on each rank.
    kv_heads = max(shape.num_kv_heads, p.tp) // p.tp
    return heads * shape.head_dim, kv_heads * shape.head_dim


def first_of_their_like(model: PlannedModel, p: ParallelConfig) -> list[tuple[int, int]]:
    """(stage, number of such stages) for stages that differ in what they hold; of those alike the
    first, which has the most microbatches in flight."""
    if ("alike", p) in model.memo:
        return model.memo["alike", p]
    alike: dict[tuple[Content, ...], list[int]] = {}
    for stage in range(p.pp):
        content = tuple(content_of(model, chunk) for chunk in stage_chunks(model, p, stage))
        alike.setdefault(content, []).append(stage)
    # In ascending order: an earlier stage has more microbatches in flight than a later one.
    found = [(stages[0], len(stages)) for stages in alike.values()]
    model.memo["alike", p] = found
    return found
