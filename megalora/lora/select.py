"""Select the linears that a ``lora`` section adapts, with their rank and scale."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from megalora.config import LoRAConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megalora.hf.patterns import Pattern, end_pattern
from megalora.hf.tensor_names import within_layer
from megalora.lora.factor_checks import check_bias, check_expert_ranks, check_init, check_kept
from megalora.lora.modules import projection_places
from megalora.lora.ranks import ranks_and_alpha
from megalora.lora.spec import (
    PLAIN,
    WITH_BIAS,
    WITH_MAGNITUDE,
    WITH_START,
    Adapted,
    FactorName,
    has_dora,
    lora_scale,
    make_adapted,
)
from megalora.lora.whole import check_apart, with_biases, with_trained
from megalora.model.account import open_folder
from megalora.model.families import FAMILIES
from megalora.model.held import held_in, kept_cycles
from megalora.model.shape import ModelShape

ALIASES = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""Megatron's names of fused linears, and vLLM's -> HF names of what they hold."""

ALL_LINEAR_EXCEPT = ("lm_head", "gate")
"""Names that "all-linear" leaves out: as in PEFT the output layer; unlike in PEFT 0.21 the router
too, because vLLM and SGLang do not honour it."""


def plan(
    lora: LoRAConfig,
    parallel: ParallelConfig,
    folder: Path,
    train: TrainConfig | None = None,
    num_scores: int = 0,
    model: ModelConfig | None = None,
) -> tuple[ModelShape, list[Adapted]]:
    """The model's sizes and its adapted projections, from the base's config.json and the headers of
    its weights. Raises ``ValueError`` before any weights are read.

    Args:
        num_scores: numbers of a score head that stands in place of lm_head; 0 for a language model.
        model: how the base is held; needed with ``train.relora``.
    """
    base = open_folder(folder)
    shape = replace(base.shape, num_scores=num_scores)
    if train is not None and model is not None:
        cycles = kept_cycles(train, held_in(model, base), base.scheme)
        shape = replace(shape, kept_cycles=cycles)
    shape = with_trained(lora, shape)
    if train is None:
        shape.check_layout(parallel)
    else:
        shape.check_layout(parallel, train.recompute)
        shape.check_balance(train.router_aux_loss_coef)
    adapted = resolve(lora, shape)
    shape = with_biases(lora, shape, adapted)
    check_apart(adapted, shape)
    if train is not None and train.relora is not None:
        _check_mergeable(adapted, shape)
    return shape, adapted


def plan_of(config: RunConfig, folder: Path) -> tuple[ModelShape, list[Adapted]]:
    """``plan`` of a run's config, whose base is in ``folder``."""
    return plan(
        config.lora,
        config.parallel,
        folder,
        config.train,
        config.objective.num_scores,
        config.model,
    )


def _check_mergeable(adapted: list[Adapted], shape: ModelShape) -> None:
    """Raise ``ValueError`` for an adapter that ``train.relora`` cannot merge into the base."""
    if shape.tied_embeddings and any(a.layer is None for a in adapted):
        raise ValueError(
            "train.relora: this model ties lm_head to the embedding, which merging an adapter of"
            " the head would change. Leave lm_head out of lora.target_modules"
        )


def resolve(lora: LoRAConfig, shape: ModelShape) -> list[Adapted]:
    """Every adapted projection of the model, in layer order; raises ``ValueError`` for anything
    that matches nothing, and for a score head that transformers' classes of the family lack."""
    _check_head(shape)
    layers = _selected_layers(lora.layers, shape.num_layers)
    everything = lora.target_modules == "all-linear"
    targets = _Option("target_modules", [] if everything else lora.target_modules)
    exclusions = _Option("exclude_modules", lora.exclude_modules)
    ranks = _Option("rank_pattern", lora.rank_pattern)
    alphas = _Option("alpha_pattern", lora.alpha_pattern)
    doras = _Option("use_dora", [] if isinstance(lora.use_dora, bool) else lora.use_dora)
    adapted = []
    for projection, layer in projection_places(shape):
        # Patterns only look at names; rank and alpha follow from what they find.
        base = make_adapted(projection, layer, 0, 0.0, 0.0, shape)
        # Every option is asked about every projection, so that ``_check_used`` knows which entries
        # match nothing in the model.
        is_target = targets.first(base) is not None
        if everything:
            is_target = projection.name not in ALL_LINEAR_EXCEPT
        is_excluded = exclusions.first(base) is not None
        rank_keys = ranks.first_of_each(base)
        alpha_key = alphas.first(base)
        has_magnitude = lora.use_dora is True or doras.first(base) is not None
        # The head is in no layer, so ``layers`` does not speak of it.
        in_layers = layer is None or layer in layers
        if not is_target or is_excluded or not in_layers:
            continue
        each, alpha = ranks_and_alpha(lora, projection, rank_keys, shape)
        rank = max(each)
        if alpha_key is not None:
            alpha = float(lora.alpha_pattern[alpha_key])
        own = (rank, alpha, lora_scale(alpha, rank, lora.use_rslora))
        adapted.append(
            make_adapted(
                projection, layer, *own, shape, _factors_of(lora, has_magnitude),
                share_outer=lora.share_outer,
                expert_ranks=tuple(each) if len(set(each)) > 1 else (),
            )
        )  # fmt: skip
    for option in (targets, exclusions, ranks, alphas, doras):
        _check_used(option, shape)
    _check_factors(lora, adapted, shape, doras)
    _check_left(lora, adapted)
    return adapted


def _check_head(shape: ModelShape) -> None:
    """Raise ``ValueError`` for a score head on a family without classifiers."""
    family = FAMILIES[shape.model_type]
    if shape.num_scores and not family.has_classifier:
        raise ValueError(
            f"transformers has no {family.classifier}, so that nothing could load a score head of"
            f" {shape.model_type} (objective.name)"
        )


def _check_left(lora: LoRAConfig, adapted: list[Adapted]) -> None:
    """Raise ``ValueError`` where nothing is adapted, or no routed expert although they are to
    share factors."""
    if not adapted:
        raise ValueError(
            "lora: nothing is left to adapt after target_modules, exclude_modules and layers; widen"
            " one of them"
        )
    if lora.share_outer and not any(a.shared for a in adapted):
        raise ValueError(
            "lora.share_outer=true is for routed experts, and none is adapted: add gate_proj,"
            " up_proj or down_proj to lora.target_modules, or leave lora.share_outer out"
        )


def _check_dora(adapted: list[Adapted], named: "_Option") -> None:
    """Raise ``ValueError`` for linears that get no magnitude, and for entries none of whose linears
    is adapted."""
    with_magnitude = [a for a in adapted if "M" in a.factors]
    for entry in named.entries:
        if not any(entry.means(a) for a in with_magnitude):
            raise ValueError(
                f"lora.use_dora: {entry.text!r} is not adapted; add it to lora.target_modules, or"
                " leave it out of lora.use_dora"
            )
    without: list[str] = []
    for a in with_magnitude:
        if not has_dora(a.projection):
            without.append(within_layer(a.projection.hf))
        # The kernels take a gain for each expert's rows, and one A or B would lie below all.
        if a.shared:
            raise ValueError(
                f"lora.share_outer: {a.name} of routed experts has DoRA, whose rows need an A and a"
                " B of their own. Leave the experts out of lora.use_dora, or share_outer out"
            )
    if without:
        names = ", ".join(dict.fromkeys(without))
        raise ValueError(
            f"lora.use_dora: {names} cannot have DoRA here (the router and lm_head have none in"
            " megalora). Name the linears that shall have it, such as"
            ' lora.use_dora=["q_proj", "k_proj", "v_proj", "o_proj"]'
        )


def _factors_of(lora: LoRAConfig, has_magnitude: bool) -> tuple[FactorName, ...]:
    """Factors of a linear that ``lora`` adapts."""
    if has_magnitude:
        return WITH_MAGNITUDE
    if lora.lora_bias:
        return WITH_BIAS
    return PLAIN if lora.init == "lora" else WITH_START


def _check_factors(
    lora: LoRAConfig, adapted: list[Adapted], shape: ModelShape, doras: "_Option"
) -> None:
    check_expert_ranks(lora, adapted)
    if lora.use_dora:
        _check_dora(adapted, doras)
    if lora.init != "lora":
        check_init(lora, adapted)
    if lora.lora_bias:
        check_bias(adapted, shape)
    if shape.kept_cycles:
        check_kept(lora, adapted)


@dataclass(frozen=True)
class _Entry:
    """One entry of a list of targets, or one key of a pattern."""

    option: str
    text: str
    pattern: Pattern
    names: tuple[str, ...]
    """Names that the entry stands for; none where it is an expression."""

    def means(self, adapted: Adapted) -> bool:
        """Whether the entry means this projection, by PEFT's rule for patterns; a plain name may
        also be what other families call it (gate_proj for Mixtral's w1)."""
        hits = self.hits(adapted)
        if any(hits) and not all(hits):
            first = adapted.hf_module(hits.index(True))
            raise ValueError(
                f"{self.option}: {self.text!r} matches {sum(hits)} of the {len(hits)} experts in"
                f" layer {adapted.layer} ({first}, ...); experts of one layer share one setting,"
                " so match all or none."
            )
        return any(hits)

    def hits(self, adapted: Adapted) -> list[bool]:
        """Whether the entry means each of the projection's experts; one item for all of them, or a
        dense linear, where it is a plain name."""
        if adapted.projection.role in self.names:
            return [True]
        # A plain name cannot tell experts apart, so one expert stands for all of them: 128 times
        # fewer matches.
        modules = [adapted.hf_module(0)] if self.names else adapted.hf_modules()
        return [bool(self.pattern.match(module)) for module in modules]


class _Option:
    """The entries of one option of the ``lora`` section, and which of them meant something."""

    def __init__(self, name: str, value: str | Iterable[str]) -> None:
        """``value``: one entry, a list of them, or a pattern's keys."""
        self.name = f"lora.{name}"
        texts = [value] if isinstance(value, str) else value
        self.entries = [self._entry(text) for text in texts]
        self.used: set[str] = set()

    def _entry(self, text: str) -> _Entry:
        names = ALIASES.get(text, (text,))
        pattern = end_pattern(self.name, text, "|".join(names))
        # Dots, stars and brackets make an expression.
        if not all(map(str.isidentifier, names)):
            names = ()
        return _Entry(self.name, text, pattern, names)

    def first(self, adapted: Adapted) -> str | None:
        """The first entry that means this projection, as in PEFT; None where none does."""
        first: str | None = None
        # All are asked, because each that means something counts as used.
        for entry in self.entries:
            if entry.means(adapted):
                self.used.add(entry.text)
                if first is None:
                    first = entry.text
        return first

    def first_of_each(self, adapted: Adapted) -> list[str | None]:
        """The first entry that means each of the projection's experts, None where none does; one
        item for all of them where no entry tells them apart, and for a dense linear."""
        found: list[str | None] = [None]
        for entry in self.entries:
            hits = entry.hits(adapted)
            if not any(hits):
                continue
            self.used.add(entry.text)
            if len(set(hits)) == 1:
                hits = [True] * len(found)
            elif len(found) == 1:
                found = found * len(hits)
            for at, is_meant in enumerate(hits):
                if is_meant and found[at] is None:
                    found[at] = entry.text
        return found


def _check_used(option: _Option, shape: ModelShape) -> None:
    """Raise ``ValueError`` for an entry that matches nothing: most likely it is misspelt."""
    names = sorted({projection.name for projection, _ in projection_places(shape)})
    for entry in option.entries:
        if entry.text not in option.used:
            close = difflib.get_close_matches(entry.text, [*names, *ALIASES], n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise ValueError(
                f"{option.name}: {entry.text!r} matches nothing in this model{hint} Adaptable:"
                f" {', '.join(names)}"
            )


def _selected_layers(layers: list[int] | str | None, num_layers: int) -> set[int]:
    """Numbers of the layers that ``lora.layers`` names: a list, or text such as "0-3, 8-"; None
    means all."""
    if layers is None:
        return set(range(num_layers))
    parts = layers.split(",") if isinstance(layers, str) else map(str, layers)
    selected: set[int] = set()
    for part in parts:
        match = re.fullmatch(r"\s*(\d+)\s*(-\s*(\d*))?\s*", part)
        if not match:
            raise ValueError(
                f"lora.layers: {part!r} is neither a layer nor a range such as 0-3 or 8-"
            )
        first = int(match[1])
        last = first
        # "8-" goes to the last layer.
        if match[2] is not None:
            last = int(match[3]) if match[3] else num_layers - 1
        if last >= num_layers or first > last:
            raise ValueError(
                f"lora.layers: {part.strip()} is outside this model's layers 0-{num_layers - 1}"
            )
        selected.update(range(first, last + 1))
    return selected
