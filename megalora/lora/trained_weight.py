"""Weights and biases that are trained whole beside the factors, and rows of the embedding that are
trained alone: an entry for each says its name, shape and split.

Initialisation, marks, gathering, checkpoints, coverage and the drift check follow from the entry,
as those of factors follow from the table in ``spec.py``.

    weight                     in memory                           shape    over TP      gradient
    embed_tokens               embedding.word_embeddings           [V, H]   dim 0        whole
    lm_head                    output_layer                        [V, H]   dim 0        whole
    norm                       decoder.final_layernorm             [H]      replicated   partial
    input_layernorm            input_layernorm                     [H]      replicated   partial
    post_attention_layernorm   pre_mlp_layernorm                   [H]      replicated   partial
    q_norm, k_norm             self_attention.q_layernorm, k_...   [d]      replicated   partial
    the same of all heads      the same                            [h d]    dim 0        whole
    gate                       mlp.router                          [E, H]   replicated   partial
    score                      output_layer (the head)             [C, H]   replicated   partial
    bias of q, k and v         self_attention.linear_qkv          [out]    dim 0 (*)    whole
    bias of o                  self_attention.linear_proj         [H]      replicated   partial
    trained tokens             embedding.rows, output_layer.rows   [n, H]   replicated   partial

Partial: a rank has the gradient of its own S/t tokens, of its own heads, or, of trained tokens in a
head, of its V/t logits. (*) Of k and v into as many parts as there are key/value heads: ranks that
share a part have a partial gradient each, as of a B. Biases lie beside the base's fused one, as the
parameters of ``biases.py``. A tied embedding is one weight, which the first and the last pipeline
stage each hold; its gradient is the sum of both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megalora.hf.tensor_names import (
    EMBED_TOKENS,
    LAYER,
    SCORE,
    bias_name,
    tokens_name,
    weight_name,
)
from megalora.model.families import layer_projections
from megalora.model.projections import HEAD, has_bias
from megalora.model.shape import ModelShape

NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
}
"""Norms that every layer has -> their modules in memory."""
QK_NORMS = {
    "self_attn.q_norm": "self_attention.q_layernorm",
    "self_attn.k_norm": "self_attention.k_layernorm",
}
"""Norms of queries and keys -> their modules in memory."""


@dataclass(frozen=True)
class TrainedWeight:
    """A weight of the base, or a new one, that is trained whole; or rows of the embedding."""

    module: str
    """Its HF module, as PEFT's ``modules_to_save`` names it; of a bias, its linear."""
    size: tuple[int, ...]
    """Shape of the whole weight, or of all trained rows."""
    layer: int | None = None
    """None outside the decoder layers."""
    path: str = "output_layer"
    """Its module in memory: in the layer, or else in the chunk."""
    split: bool = False
    """Whether it is cut along dim 0 over TP; replicated otherwise, with a partial gradient."""
    tied: bool = False
    """Whether lm_head is the same weight."""
    max_shards: int | None = None
    """Largest number of parts that it can be cut into; None for as many as there are ranks."""
    is_bias: bool = False
    """Whether it is the linear's bias, and not its weight."""
    tokens: tuple[int, ...] = ()
    """Token ids of the rows, where only these are trained."""
    other_name: str = ""
    """Its module in checkpoints, where that is another than in transformers' model."""

    @property
    def published(self) -> str:
        """Its module's name in checkpoints."""
        return self.other_name or self.module

    @property
    def stored(self) -> str:
        """Name of the base's tensor in checkpoints."""
        return f"{self.published}.{'bias' if self.is_bias else 'weight'}"

    @property
    def is_router(self) -> bool:
        return self.path == "mlp.router"

    @property
    def tensor(self) -> str:
        """Name of the tensor in an adapter's file, where PEFT may have ``base_layer`` in that of a
        bias."""
        if self.is_bias:
            return bias_name(self.module)
        return tokens_name(self.module) if self.tokens else weight_name(self.module)

    @property
    def num_parameters(self) -> int:
        total = 1
        for size in self.size:
            total *= size
        return total

    def num_shards(self, group_size: int) -> int:
        """Number of parts that it is cut into over TP."""
        if not self.split:
            return 1
        return min(group_size, self.max_shards or group_size)

    def mark(self, parameter: Any, group: Any) -> None:
        """Set on a parameter what reductions read off it (``shards.py``)."""
        num_shards = self.num_shards(group.size())
        # Ranks 0 .. replicas - 1 hold shard 0, the next ones shard 1, as of factors.
        replicas = group.size() // num_shards
        parameter.num_shards = num_shards
        parameter.shard = group.rank() // replicas
        # Ranks that hold the same values saw different tokens, heads or entries of the vocabulary.
        parameter.sum_group = "tp" if replicas > 1 else None
        parameter.allreduce = True
        parameter.is_trained_whole = True
        # One replica of each part counts in the gradient's norm.
        parameter.tensor_model_parallel = self.split and group.rank() % replicas == 0
        parameter.partition_dim = 0 if self.split else -1
        parameter.partition_stride = 1


def trained_weights(shape: ModelShape) -> list[TrainedWeight]:
    """All such weights of a model: those of ``shape.saved`` and the biases of ``shape.biases`` in
    the order of its layers, rows of the embedding, the score head."""
    weights: list[TrainedWeight] = []
    # Most models have none, and hundreds of candidates.
    if shape.saved:
        weights = [weight for weight in savable(shape) if weight.module in shape.saved]
    if shape.biases:
        weights += [weight for weight in biases(shape) if weight.module in shape.biases]
    if shape.tokens:
        rows = (len(shape.tokens), shape.hidden)
        tied = shape.has_tied_head
        weights.append(
            TrainedWeight(EMBED_TOKENS, rows, path="embedding", tied=tied, tokens=shape.tokens)
        )
    if shape.num_scores:
        weights.append(TrainedWeight(SCORE, (shape.num_scores, shape.hidden)))
    return weights


def biases(shape: ModelShape) -> Iterator[TrainedWeight]:
    """The bias of every linear of the base that has one, in the order of its layers."""
    for layer in range(shape.num_layers):
        for projection in layer_projections(shape, layer):
            if has_bias(projection, shape):
                out_features, _ = projection.features(shape)
                yield TrainedWeight(
                    projection.hf.format(layer=layer), (out_features,), layer, projection.module,
                    split=projection.kind == "column", is_bias=True,
                    max_shards=projection.max_shards(shape) if projection.max_shards else None,
                )  # fmt: skip


def savable(shape: ModelShape) -> Iterator[TrainedWeight]:
    """Every weight of the base that can be trained whole, in the order of its layers."""
    hidden = (shape.hidden,)
    vocabulary = (shape.vocab, shape.hidden)
    yield TrainedWeight(
        EMBED_TOKENS, vocabulary, path="embedding.word_embeddings",
        split=True, tied=shape.has_tied_head,
    )  # fmt: skip
    for layer in range(shape.num_layers):
        at = LAYER.format(layer=layer)
        for name, path in NORMS.items():
            yield TrainedWeight(f"{at}{name}", hidden, layer, path)
        if shape.qk_norm:
            for name, path in QK_NORMS.items():
                yield _qk_norm(shape, layer, name, path)
        for projection in layer_projections(shape, layer):
            # With a correction bias PEFT saves that too, which is no parameter.
            if projection.kind == "router" and not shape.correction_bias:
                # As PEFT finds it, whatever checkpoints are published with.
                router = projection.loaded.format(layer=layer)
                published = projection.hf.format(layer=layer)
                yield TrainedWeight(
                    router, projection.features(shape), layer, projection.module,
                    other_name=published,
                )  # fmt: skip
    yield TrainedWeight("model.norm", hidden, path="decoder.final_layernorm")
    # A tied head is the embedding, and a score head stands in its place.
    if not shape.tied_embeddings and not shape.num_scores:
        yield TrainedWeight(HEAD[0].hf, vocabulary, split=True)


def _qk_norm(shape: ModelShape, layer: int, name: str, path: str) -> TrainedWeight:
    """A norm of queries or of keys: one head's weights for all heads, or a weight for each feature
    of all heads."""
    module = f"{LAYER.format(layer=layer)}{name}"
    if not shape.full_width_norms:
        return TrainedWeight(module, (shape.head_dim,), layer, path)
    heads = shape.num_heads if name.endswith("q_norm") else shape.num_kv_heads
    return TrainedWeight(module, (heads * shape.head_dim,), layer, path, split=True)
