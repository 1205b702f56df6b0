"""Select the weights that a ``lora`` section trains whole, and the tokens whose rows it trains."""

import difflib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from megalora.config import LoRAConfig
from megalora.hf.patterns import end_pattern
from megalora.hf.tensor_names import EMBED_TOKENS, SCORE, within_layer
from megalora.lora.spec import Adapted, in_parts
from megalora.lora.trained_weight import biases, savable, trained_weights
from megalora.model.projections import HEAD
from megalora.model.shape import ModelShape
from megalora.wording import first_few

LM_HEAD = HEAD[0].hf


def with_trained(lora: LoRAConfig, shape: ModelShape) -> ModelShape:
    """The model's sizes with what ``lora`` trains beside adapters.

    Raises:
        ValueError: an entry matches nothing that can be trained whole, a token is not in the
            vocabulary, or the embedding is named by both options.
    """
    saved = _saved(lora.modules_to_save, shape)
    tokens = tuple(sorted(lora.trainable_token_indices))
    if tokens and tokens[-1] >= shape.vocab:
        raise ValueError(
            f"lora.trainable_token_indices: {tokens[-1]} is no token of this model's"
            f" {shape.vocab:,}; resize and save the base first, if it is a new one"
        )
    if tokens and EMBED_TOKENS in saved:
        raise ValueError(
            "lora.trainable_token_indices: lora.modules_to_save trains all rows of embed_tokens"
            " already: leave one of them out"
        )
    return replace(shape, saved=saved, tokens=tokens)


def with_biases(lora: LoRAConfig, shape: ModelShape, adapted: Sequence[Adapted]) -> ModelShape:
    """The model's sizes with the biases that ``lora.bias`` trains beside these adapters.

    Raises:
        ValueError: there are none, or some linears alone have DoRA, which makes two folders.
    """
    if lora.bias == "none":
        return shape
    trained = tuple(weight.module for weight in biases(shape))
    why = "this base has no biases"
    if lora.bias == "lora_only":
        trained = tuple(module for module in trained if module in _adapted_modules(adapted))
        why = "none of the adapted linears has a bias in this base"
    if not trained:
        raise ValueError(f"lora.bias={lora.bias}: {why}; leave it out")
    return replace(shape, biases=trained)


def bias_option(shape: ModelShape, adapted: Sequence[Adapted]) -> str:
    """``bias``, ours or PEFT's, of a model whose ``shape`` says which biases are trained.

    Raises:
        ValueError: neither all are trained, nor those of the adapted linears.
    """
    if not shape.biases:
        return "none"
    every = [weight.module for weight in biases(shape)]
    own = [module for module in every if module in _adapted_modules(adapted)]
    if sorted(shape.biases) == sorted(own):
        return "lora_only"
    if sorted(shape.biases) == sorted(every):
        return "all"
    other = sorted(set(shape.biases) ^ set(own))
    raise ValueError(
        "bias=lora_only trains the biases of adapted linears, and only one of adapter and trained"
        f" bias is left of {first_few(other)}. Leave nothing out, or merge the adapter"
    )


def _adapted_modules(adapted: Sequence[Adapted]) -> set[str]:
    """HF modules of the adapted linears, without those of experts, which have no biases."""
    return {a.hf_module() for a in adapted if not a.num_experts}


def check_apart(adapted: Sequence[Adapted], shape: ModelShape) -> None:
    """Raise ``ValueError`` where adapters and what is trained of the base cannot be together."""
    if trouble := trouble_beside(adapted, shape):
        raise ValueError(f"lora: {trouble}")


def trouble_beside(adapted: Sequence[Adapted], shape: ModelShape) -> str:
    """Why adapters and what is trained of the base cannot be together; nothing where they can.

    A weight cannot be adapted and trained whole at once. PEFT takes a router's adapter for one of a
    parameter, beside which it saves no router in any layer; and it loads trained rows of an
    embedding into one adapter, not beside a second one, which DoRA on some linears needs.
    """
    both: list[str] = []
    for a in adapted:
        names = {a.hf_module(0), a.projection.loaded.format(layer=a.layer, expert=0)}
        if names & set(shape.saved):
            both.append(a.hf_module(0))
        # A head that is adapted and tied to a trained embedding would be two weights in one.
        if (
            a.layer is None
            and shape.has_tied_head
            and (shape.tokens or EMBED_TOKENS in shape.saved)
        ):
            return (
                "the base ties lm_head to the embedding, which is trained (modules_to_save,"
                " trainable_token_indices), so that lm_head cannot have an adapter of its own"
            )
    if both:
        return (
            f"{first_few(both)} would be adapted and trained whole (modules_to_save): leave it out"
            " of one of them"
        )
    routers = {weight.module for weight in savable(shape) if weight.is_router}
    if routers & set(shape.saved) and any(a.projection.kind == "router" for a in adapted):
        return (
            "routers are trained whole in some layers (modules_to_save) and adapted in others,"
            " which PEFT does not load: choose one of the two"
        )
    if shape.tokens and in_parts(list(adapted)):
        return (
            "DoRA on some linears alone makes two folders, which PEFT does not load together beside"
            " trained rows (trainable_token_indices): have DoRA on all of them or on none"
        )
    if shape.biases and in_parts(list(adapted)):
        return (
            "DoRA on some linears alone makes two folders, and PEFT loads one adapter with trained"
            " biases (bias): have DoRA on all of them or on none"
        )
    return ""


def saved_entries(shape: ModelShape) -> list[str]:
    """``modules_to_save``, ours or PEFT's, of a model whose ``shape`` says what is trained: a name
    without its layer where all layers are trained that have it."""
    layers_with: dict[str, int] = defaultdict(int)
    for weight in savable(shape):
        layers_with[within_layer(weight.module)] += 1
    trained: dict[str, list[str]] = defaultdict(list)
    for weight in trained_weights(shape):
        if not weight.tokens and not weight.is_bias:
            trained[within_layer(weight.module)].append(weight.module)
    entries: list[str] = []
    for name, modules in trained.items():
        # The score head is none of the base's weights.
        everywhere = name == SCORE or len(modules) == layers_with[name]
        entries += [name] if everywhere else modules
    return entries


def _saved(entries: Sequence[str], shape: ModelShape) -> tuple[str, ...]:
    """HF modules that the entries mean, in the order of the model's layers."""
    weights = list(savable(shape))
    known = [weight.module for weight in weights]
    # One weight under two names, of which the embedding's stands for both.
    tied = shape.has_tied_head
    meant: set[str] = set()
    for entry in entries:
        pattern = end_pattern("lora.modules_to_save", entry)
        found: set[str] = set()
        for weight in weights:
            # Mixtral is published with other names than transformers gives its modules.
            if pattern.match(weight.module) or pattern.match(weight.published):
                found.add(weight.module)
        if tied and pattern.match(LM_HEAD):
            found.add(EMBED_TOKENS)
        # From a dot on: PEFT's "norm" also means input_layernorm and q_norm.
        if not found:
            raise ValueError(_matches_nothing(entry, known))
        meant |= found
    return tuple(module for module in known if module in meant)


def _matches_nothing(entry: str, known: Sequence[str]) -> str:
    """The message for an entry that means no weight that can be trained whole."""
    names = list(dict.fromkeys(module.rsplit(".", 1)[-1] for module in known))
    close = difflib.get_close_matches(entry, names, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return (
        f"lora.modules_to_save: {entry!r} matches nothing that can be trained whole{hint} Of this"
        f" model these can: {', '.join(names)}"
    )
