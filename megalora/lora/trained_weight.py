"""Weights that are trained whole beside the factors, and rows of the embedding that are trained
alone: an entry for each says its name, shape and split.

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
    trained tokens             embedding.rows, output_layer.rows   [n, H]   replicated   partial

Partial: a rank has the gradient of its own S/t tokens, of its own heads, or, of trained tokens in a
head, of its V/t logits. A tied embedding is one weight, which the first and the last pipeline stage
each hold; its gradient is the sum of both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megalora.hf.tensor_names import EMBED_TOKENS, LAYER, SCORE, tokens_name, weight_name
from megalora.model.families import layer_projections
from megalora.model.projections import HEAD
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
    """Its HF module, as PEFT's ``modules_to_save`` names it."""
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
    tokens: tuple[int, ...] = ()
    """Token ids of the rows, where only these are trained."""
    other_name: str = ""
    """Its module in checkpoints, where that is another than in transformers' model."""

    @property
    def published(self) -> str:
        """Its module's name in checkpoints."""
        return self.other_name or self.module

    @property
    def is_router(self) -> bool:
        return self.path == "mlp.router"

    @property
    def tensor(self) -> str:
        """Name of the tensor in an adapter's file."""
        return tokens_name(self.module) if self.tokens else weight_name(self.module)

    @property
    def num_parameters(self) -> int:
        total = 1
        for size in self.size:
            total *= size
        return total

    def num_shards(self, group_size: int) -> int:
        """Number of parts that it is cut into over TP."""
        return group_size if self.split else 1

    def mark(self, parameter: Any, group: Any) -> None:
        """Set on a parameter what reductions read off it (``shards.py``)."""
        parameter.num_shards = self.num_shards(group.size())
        parameter.shard = group.rank() if self.split else 0
        # Ranks that hold the same values saw different tokens, heads or entries of the vocabulary.
        is_partial = group.size() > 1 and not self.split
        parameter.sum_group = "tp" if is_partial else None
        parameter.allreduce = True
        parameter.is_trained_whole = True
        parameter.tensor_model_parallel = self.split
        parameter.partition_dim = 0 if self.split else -1
        parameter.partition_stride = 1


def trained_weights(shape: ModelShape) -> list[TrainedWeight]:
    """All such weights of a model: those of ``shape.saved`` in the order of its layers, rows of the
    embedding, the score head."""
    weights: list[TrainedWeight] = []
    # Most models have none, and hundreds of candidates.
    if shape.saved:
        weights = [weight for weight in savable(shape) if weight.module in shape.saved]
    if shape.tokens:
        rows = (len(shape.tokens), shape.hidden)
        tied = shape.has_tied_head
        weights.append(
            TrainedWeight(EMBED_TOKENS, rows, path="embedding", tied=tied, tokens=shape.tokens)
        )
    if shape.num_scores:
        weights.append(TrainedWeight(SCORE, (shape.num_scores, shape.hidden)))
    return weights


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
