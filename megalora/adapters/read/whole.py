"""Read what an adapter's file holds of the base's own weights, trained: modules that PEFT trains
whole (``modules_to_save``), biases (``bias``) and rows of the embedding
(``trainable_token_indices``).

PEFT trains a module whose name ends in an entry. What it means for a tied embedding follows from
``ensure_weight_tying``: with it embedding and head stay one weight, which the file has twice;
without it the trained one is a copy, and the model is not tied any more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megalora.adapters.read.named_tensors import checked
from megalora.adapters.read.weights import AdapterWeights
from megalora.hf.tensor_names import (
    EMBED_TOKENS,
    SCORE,
    parse_bias,
    parse_factor,
    parse_tokens,
    parse_weight,
    tokens_name,
)
from megalora.lora.modules import projection_places
from megalora.lora.trained_weight import TrainedWeight, biases, savable
from megalora.lora.whole import LM_HEAD
from megalora.model.shape import ModelShape
from megalora.wording import shorten

ONLY_IN_CLASSIFIERS = (SCORE, "classifier")
"""Names that PEFT lists for the heads of classifiers, whatever the model calls its own."""


@dataclass(frozen=True)
class Whole:
    """What is trained beside factors."""

    saved: tuple[str, ...] = ()
    """As ``ModelShape.saved``."""
    tokens: tuple[int, ...] = ()
    """As ``ModelShape.tokens``."""
    biases: tuple[str, ...] = ()
    """As ``ModelShape.biases``."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """By the name that training has for them."""
    taken: frozenset[str] = frozenset()
    """Names in the file that these were read from."""


def whole_of(weights: AdapterWeights, config: Mapping[str, Any], shape: ModelShape) -> Whole:
    """All such tensors of a folder for a model of this shape.

    Raises:
        ValueError: an entry means what megalora does not train whole, a tensor is missing or has
            another shape, or the tied model would not be tied any more.
    """
    saved = _meant(weights, config.get("modules_to_save") or (), shape)
    tensors: dict[str, Tensor] = {}
    taken: set[str] = set()
    # Each must be there, whole: PEFT goes on with the base's where it is not.
    for weight in saved:
        own = _one(weights, weight)
        taken.add(own)
        tensors[weight.tensor] = checked(weights, own, len(weight.size)).contiguous()
        if weight.tied:
            taken.add(_twin(weights, config, weight, tensors[weight.tensor]))
    trained_biases = _trained_biases(weights, config, shape)
    for weight in trained_biases:
        own = _one(weights, weight, f"bias={config['bias']}")
        taken.add(own)
        tensors[weight.tensor] = checked(weights, own, 1).contiguous()
    rows = _rows(weights, config, shape)
    if rows.tokens and any(weight.module == EMBED_TOKENS for weight in saved):
        raise ValueError(
            f"{weights.where}: modules_to_save has all of embed_tokens and trainable_token_indices"
            " rows of it; PEFT refuses both together"
        )
    return Whole(
        tuple(weight.module for weight in saved),
        rows.tokens,
        tuple(weight.module for weight in trained_biases),
        tensors | rows.tensors,
        rows.taken | taken,
    )


def _trained_biases(
    weights: AdapterWeights, config: Mapping[str, Any], shape: ModelShape
) -> list[TrainedWeight]:
    """Biases that ``bias`` means by PEFT's rule, in the order of the model."""
    option = config.get("bias") or "none"
    if option == "none":
        return []
    if config.get("lora_bias"):
        raise ValueError(
            f"{weights.where}: bias={option} and lora_bias change the same biases, which megalora"
            " does not train together. Merge the adapter with PEFT (merge_and_unload)"
        )
    every = list(biases(shape))
    if option == "all":
        return every
    adapted: set[str] = set()
    for name in weights.info:
        factor = parse_factor(name)
        if factor is not None:
            adapted.add(factor[0])
    return [weight for weight in every if weight.module in adapted]


def _meant(
    weights: AdapterWeights, entries: Sequence[str], shape: ModelShape
) -> list[TrainedWeight]:
    """Weights that the entries mean by PEFT's rule, in the order of the model."""
    known = list(savable(shape))
    tied = shape.has_tied_head
    # Linears by the names that transformers' model has, which PEFT compares; of experts there are
    # none, but one parameter for all of a layer.
    others: list[str] = []
    modules = {weight.module for weight in known}
    for projection, layer in projection_places(shape):
        name = projection.loaded.format(layer=layer, expert=0)
        if not projection.is_expert and name not in modules:
            others.append(name)
    meant: set[str] = set()
    # As PEFT: from the end of the name, wherever that begins.
    for entry in entries:
        found = {weight.module for weight in known if weight.module.endswith(entry)}
        if tied and LM_HEAD.endswith(entry):
            found.add(EMBED_TOKENS)
        # Routers are linears too, and a tied head is the embedding.
        linears = [name for name in others if name.endswith(entry)]
        if tied:
            linears = [name for name in linears if name != LM_HEAD]
        if linears:
            raise ValueError(_not_trained(weights, entry, linears[0]))
        if not found and entry not in ONLY_IN_CLASSIFIERS:
            raise ValueError(_not_trained(weights, entry, "no module that megalora knows"))
        meant |= found
    return [weight for weight in known if weight.module in meant]


def _not_trained(weights: AdapterWeights, entry: str, what: str) -> str:
    return (
        f"{weights.where}: modules_to_save={shorten(entry)} trains whole what megalora does not"
        f" ({what}); it does so with embed_tokens, lm_head, norms and routers without a correction"
        " bias. Merge the adapter with PEFT (merge_and_unload), or train without it"
    )


def _one(weights: AdapterWeights, weight: TrainedWeight, option: str = "modules_to_save") -> str:
    """Name in the file of a weight or bias that must be there once, in its shape."""
    parse = parse_bias if weight.is_bias else parse_weight
    names = [name for name in weights.info if parse(name) == weight.module]
    part = "bias" if weight.is_bias else "weight"
    # PEFT warns of a missing one and goes on with the base's.
    if len(names) != 1:
        raise ValueError(
            f"{weights.where} has {len(names)} tensors for {weight.module}.{part}, which its config"
            f" saves ({option}): it was lost, or saving went wrong"
        )
    shape = weights.info[names[0]].shape
    if shape != weight.size:
        raise ValueError(
            f"{weights.path_of(names[0])}: {names[0]} is {shape}, but this base model needs"
            f" {weight.size}"
        )
    return names[0]


def _twin(
    weights: AdapterWeights, config: Mapping[str, Any], weight: TrainedWeight, embedding: Tensor
) -> str:
    """Name in the file of the head that is tied to a trained embedding."""
    if not config.get("ensure_weight_tying"):
        raise ValueError(
            f"{weights.where}: the base ties lm_head to embed_tokens, and this adapter has a copy"
            " of one of them (ensure_weight_tying is not set): they are two weights from then on,"
            " which this base has no place for. Merge the adapter with PEFT (merge_and_unload)"
        )
    name = _one(weights, replace(weight, module=LM_HEAD))
    if not torch.equal(weights.tensor(name), embedding):
        raise ValueError(
            f"{weights.path_of(name)}: {name} differs from the embedding, to which it is tied"
            " (ensure_weight_tying)"
        )
    return name


def _rows(weights: AdapterWeights, config: Mapping[str, Any], shape: ModelShape) -> Whole:
    """Trained rows of the embedding, in the ascending order of their tokens."""
    tokens = config.get("trainable_token_indices")
    names = [name for name in weights.info if parse_tokens(name) is not None]
    if not tokens and not names:
        return Whole()
    if isinstance(tokens, dict) and len(tokens) == 1:
        # By module, of which the embedding is what a list means.
        (module,) = tokens
        tokens = tokens[module] if EMBED_TOKENS.endswith(module) else tokens
    if not isinstance(tokens, list) or [parse_tokens(name) for name in names] != [EMBED_TOKENS]:
        raise ValueError(
            f"{weights.where}: trainable_token_indices={shorten(tokens)} with {len(names)} tensors"
            " of rows; megalora reads token ids of embed_tokens, and one tensor of their rows"
        )
    # ``type``, because true is an int too.
    fits = all(type(token) is int and 0 <= token < shape.vocab for token in tokens)
    if not fits or len(set(tokens)) < len(tokens):
        raise ValueError(
            f"{weights.where}: trainable_token_indices={shorten(tokens)} must be different tokens"
            f" of this base's {shape.vocab:,}"
        )
    rows = checked(weights, names[0], 2)
    if tuple(rows.shape) != (len(tokens), shape.hidden):
        raise ValueError(
            f"{weights.path_of(names[0])}: {names[0]} is {tuple(rows.shape)}, but these tokens and"
            f" this base model need {(len(tokens), shape.hidden)}"
        )
    # A head that is tied to the embedding has the same rows in PEFT, too.
    order = torch.tensor(tokens).argsort()
    return Whole(
        tokens=tuple(sorted(tokens)),
        tensors={tokens_name(EMBED_TOKENS): rows[order].contiguous()},
        taken=frozenset(names),
    )
