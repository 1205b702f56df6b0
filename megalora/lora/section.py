"""The ``lora:`` section of a config that adapts exactly what an adapter made elsewhere does."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from megalora.config import LoRAConfig
from megalora.lora.modules import projection_places
from megalora.lora.select import resolve
from megalora.lora.spec import (
    FACTORS_BY_NAME,
    PLAIN,
    Adapted,
    has_biases,
    has_magnitudes,
    make_adapted,
)
from megalora.lora.whole import bias_option, saved_entries
from megalora.model.projections import Projection
from megalora.model.shape import ModelShape


def lora_section(adapted: list[Adapted], shape: ModelShape) -> dict[str, Any]:
    """Options of ``LoRAConfig``, defaults left out, that ``resolve`` turns into ``adapted``, ranks
    and scales included, and with what ``shape`` trains beside."""
    adapted_layers: dict[Projection, dict[int | None, Adapted]] = defaultdict(dict)
    ranks_and_alphas: list[tuple[int, float]] = []
    for a in adapted:
        adapted_layers[a.projection][a.layer] = a
        ranks_and_alphas.append((a.rank, _alpha(a)))
    all_layers: dict[Projection, set[int | None]] = defaultdict(set)
    for projection, layer in projection_places(shape):
        all_layers[projection].add(layer)
    # A dense MLP, experts and a shared expert each have a gate_proj: a name may mean several.
    uses_of_name = Counter(projection.name for projection in all_layers)
    # The commonest rank and alpha become the section's own; patterns hold what differs.
    rank, alpha = most_common(ranks_and_alphas)
    targets: list[str] = []
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for projection, own in adapted_layers.items():
        is_unique = uses_of_name[projection.name] == 1
        in_all_layers = own.keys() == all_layers[projection]
        targets.append(_key(projection, None if in_all_layers else list(own), is_unique))
        layers_of: dict[_Setting, list[int | None]] = defaultdict(list)
        for layer, a in own.items():
            layers_of[a.expert_ranks or (a.rank,), _alpha(a)].append(layer)
        for (ranks, own_alpha), layers in layers_of.items():
            # One setting in all adapted layers needs no layer numbers: the targets have them.
            named = None if len(layers_of) == 1 else layers
            for own_rank in sorted(set(ranks) - {rank}):
                experts = _experts_of(own_rank, ranks)
                rank_pattern[_key(projection, named, is_unique, experts)] = own_rank
            if own_alpha != alpha:
                alpha_pattern[_key(projection, named, is_unique)] = own_alpha
    section: dict[str, Any] = {"rank": rank, "alpha": alpha, "target_modules": targets}
    if rank_pattern:
        section["rank_pattern"] = rank_pattern
    if alpha_pattern:
        section["alpha_pattern"] = alpha_pattern
    section |= _switches(adapted, shape, adapted_layers, uses_of_name)
    resolved = resolve(LoRAConfig(**section), shape)
    assert not differing(settings(resolved), settings(adapted)), section
    return section


type _Setting = tuple[tuple[int, ...], float]
"""Ranks of the experts, or one for all, and alpha."""


def _experts_of(rank: int, ranks: tuple[int, ...]) -> list[int] | None:
    """Numbers of the experts with this rank; None where there is one rank for all."""
    if len(ranks) == 1:
        return None
    return [expert for expert, own in enumerate(ranks) if own == rank]


def _switches(
    adapted: list[Adapted],
    shape: ModelShape,
    adapted_layers: Mapping[Projection, Mapping[int | None, Adapted]],
    uses_of_name: Counter[str],
) -> dict[str, Any]:
    """The section's options beside targets, ranks and alphas."""
    found: dict[str, Any] = {}
    if any(a.shared for a in adapted):
        found["share_outer"] = True
    if has_magnitudes(adapted):
        found["use_dora"] = _use_dora(adapted_layers, uses_of_name)
    if has_biases(adapted):
        found["lora_bias"] = True
    if shape.saved:
        found["modules_to_save"] = saved_entries(shape)
    if shape.tokens:
        found["trainable_token_indices"] = list(shape.tokens)
    if shape.biases:
        found["bias"] = bias_option(shape, adapted)
    return found


def _use_dora(
    adapted_layers: Mapping[Projection, Mapping[int | None, Adapted]], uses_of_name: Counter[str]
) -> bool | list[str]:
    """``lora.use_dora`` of these projections: true where all have it."""
    entries: list[str] = []
    everywhere = True
    for projection, own in adapted_layers.items():
        layers = [layer for layer, a in own.items() if "M" in a.factors]
        # One projection without it, in one layer, and a list has to say which have it.
        everywhere = everywhere and len(layers) == len(own)
        if layers:
            # Layers that are not adapted may be named all the same.
            named = None if len(layers) == len(own) else layers
            entries.append(_key(projection, named, uses_of_name[projection.name] == 1))
    return everywhere or entries


def settings(adapted: list[Adapted]) -> list[list[Any]]:
    """``[HF name, layer, rank, scale]`` of each, as JSON can hold it, and behind them "A" or "B"
    where experts share that factor, the names of all factors where there are more than A and B.
    Where experts have ranks of their own, a list of them is the sixth entry."""
    rows: list[list[Any]] = []
    for a in adapted:
        row = [a.projection.hf, a.layer, a.rank, a.scale]
        # No fifth entry without either: the rows that earlier versions wrote.
        more = a.shared if a.factors == PLAIN else "".join(a.factors)
        if a.expert_ranks:
            rows.append([*row, more or "", list(a.expert_ranks)])
        else:
            rows.append([*row, more] if more else row)
    return rows


def adapted_of(rows: list[list[Any]], shape: ModelShape) -> list[Adapted]:
    """The inverse of ``settings``; raises ``ValueError`` for a linear that the model lacks."""
    known: dict[tuple[int | None, str], Projection] = {}
    for projection, layer in projection_places(shape):
        known[layer, projection.hf] = projection
    adapted = []
    for hf, layer, rank, scale, *more in rows:
        if (layer, hf) not in known:
            raise ValueError(f"this model has no {hf.format(layer=layer, expert='*')}")
        which = more[0] if more else ""
        # A sixth entry: ranks of the experts, where they differ.
        expert_ranks = tuple(more[1]) if len(more) == 2 else ()
        if expert_ranks and len(expert_ranks) != shape.num_experts:
            raise ValueError(
                f"this model has {shape.num_experts} experts in a layer, and there are"
                f" {len(expert_ranks)} ranks of {hf.format(layer=layer, expert='*')}"
            )
        factors = FACTORS_BY_NAME.get(which, PLAIN)
        # Alpha as LoRA without rsLoRA has it: scale = alpha / rank.
        adapted.append(
            make_adapted(
                known[layer, hf],
                layer,
                rank,
                scale * rank,
                scale,
                shape,
                factors,
                share_outer=bool(which) and factors == PLAIN,
                expert_ranks=expert_ranks,
            )
        )
    return adapted


def differing(ours: list[list[Any]], theirs: list[list[Any]]) -> list[str]:
    """HF modules that only one of two lists of ``settings`` has, or both with different ranks,
    scales, factors or ranks of experts, or shared by experts in one alone."""
    our_table = _by_module(ours)
    their_table = _by_module(theirs)
    apart = []
    # Sorted as text, because the head's layer is None.
    for hf, layer in sorted(our_table.keys() | their_table.keys(), key=str):
        a = our_table.get((hf, layer))
        b = their_table.get((hf, layer))
        # Scales went through a division by the rank and through JSON.
        if a is None or b is None or a[::2] != b[::2] or not math.isclose(a[1], b[1], rel_tol=1e-9):
            apart.append(hf.format(layer=layer, expert="*"))
    return apart


def _by_module(rows: list[list[Any]]) -> dict[tuple[str, int | None], tuple[int, float, list[Any]]]:
    """(HF name, layer) -> (rank, scale, entries behind them)"""
    found = {}
    for hf, layer, rank, scale, *more in rows:
        found[hf, layer] = (rank, scale, more)
    return found


def _key(
    projection: Projection,
    layers: list[int | None] | None,
    is_unique: bool,
    experts: list[int] | None = None,
) -> str:
    """An entry that means ``projection`` in ``layers`` (None: in all), of ``experts`` (None: of
    all): its name where that is ``is_unique``, else a regular expression on full HF module
    names."""
    if layers is None and experts is None and is_unique:
        return projection.name
    # Braces would be escaped too, so words stand for them meanwhile.
    escaped = re.escape(projection.hf.replace("{layer}", "LAYER").replace("{expert}", "EXPERT"))
    return escaped.replace("LAYER", _one_of(layers)).replace("EXPERT", _one_of(experts))


def _one_of(numbers: Sequence[int | None] | None) -> str:
    """An expression that matches any of the numbers; None for every number."""
    return r"\d+" if numbers is None else "(" + "|".join(map(str, numbers)) + ")"


def _alpha(a: Adapted) -> float:
    return without_noise(a.scale * a.rank)


def without_noise(alpha: float) -> float:
    """``scale * rank`` as it was before it was divided by the rank."""
    # 14 of a double's 16 digits: a division and a product each cost less than the last one.
    return float(f"{alpha:.14g}")


def most_common(values: list[Any]) -> Any:
    """The value that occurs most often; the first of several."""
    return max(dict.fromkeys(values), key=values.count)
