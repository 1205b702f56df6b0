"""The ``lora:`` section of a config that adapts exactly what an adapter made elsewhere does."""

import math
import re
from collections import defaultdict
from typing import Any

from megalora.config import LoRAConfig
from megalora.lora.select import resolve
from megalora.lora.spec import Adapted, make_adapted
from megalora.model.families import layer_projections
from megalora.model.projections import HEAD, Projection
from megalora.model.shape import ModelShape


def lora_section(adapted: list[Adapted], shape: ModelShape) -> dict[str, Any]:
    """Options of ``LoRAConfig``, defaults left out, that ``resolve`` turns into ``adapted``, ranks
    and scales included."""
    layers_of: dict[Projection, dict[int | None, Adapted]] = defaultdict(dict)
    for a in adapted:
        layers_of[a.projection][a.layer] = a
    projections = {
        p for layer in range(shape.num_layers) for p in layer_projections(shape, layer)
    } | set(HEAD)
    rank, alpha = most_common([(a.rank, _alpha(a)) for a in adapted])
    targets: list[str] = []
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for projection, own in layers_of.items():
        alone = sum(p.name == projection.name for p in projections) == 1
        possible = {
            n for n in range(shape.num_layers) if projection in layer_projections(shape, n)
        } or {None}
        whole = own.keys() == possible
        targets.append(_key(projection, None if whole else list(own), alone))
        groups: dict[tuple[int, float], list[int | None]] = defaultdict(list)
        for layer, a in own.items():
            groups[a.rank, _alpha(a)].append(layer)
        for (r, s), layers in groups.items():
            key = _key(projection, None if len(groups) == 1 else layers, alone)
            if r != rank:
                rank_pattern[key] = r
            if s != alpha:
                alpha_pattern[key] = s
    section = {"rank": rank, "alpha": alpha, "target_modules": targets}
    section |= {"rank_pattern": rank_pattern} if rank_pattern else {}
    section |= {"alpha_pattern": alpha_pattern} if alpha_pattern else {}
    assert not differing(settings(resolve(LoRAConfig(**section), shape)), settings(adapted)), (
        section
    )
    return section


def settings(adapted: list[Adapted]) -> list[list[Any]]:
    """``[HF name, layer, rank, scale]`` of each, as JSON can hold it."""
    return [[a.projection.hf, a.layer, a.rank, a.scale] for a in adapted]


def adapted_of(rows: list[list[Any]], shape: ModelShape) -> list[Adapted]:
    """The inverse of ``settings``; raises ``ValueError`` for a linear that the model lacks."""
    known: dict[tuple[int | None, str], Projection] = {(None, p.hf): p for p in HEAD}
    for number in range(shape.num_layers):
        known |= {(number, p.hf): p for p in layer_projections(shape, number)}
    adapted = []
    for hf, layer, rank, scale in rows:
        if (layer, hf) not in known:
            raise ValueError(f"this model has no {hf.format(layer=layer, expert='*')}")
        adapted.append(make_adapted(known[layer, hf], layer, rank, scale * rank, scale, shape))
    return adapted


def differing(ours: list[list[Any]], theirs: list[list[Any]]) -> list[str]:
    """HF modules that only one of two lists of ``settings`` has, or both with another rank or
    scale."""
    tables = [
        {(hf, layer): (rank, scale) for hf, layer, rank, scale in rows} for rows in (ours, theirs)
    ]
    apart = []
    for hf, layer in sorted(tables[0].keys() | tables[1].keys(), key=str):
        a, b = (table.get((hf, layer)) for table in tables)
        if a is None or b is None or a[0] != b[0] or not math.isclose(a[1], b[1], rel_tol=1e-9):
            apart.append(hf.format(layer=layer, expert="*"))
    return apart


def _key(projection: Projection, layers: list[int | None] | None, alone: bool) -> str:
    """A name where one says it, else a regular expression on full HF module names."""
    if layers is None and alone:
        return projection.name
    number = r"\d+" if layers is None else "(" + "|".join(str(n) for n in layers) + ")"
    escaped = re.escape(projection.hf.replace("{layer}", "LAYER").replace("{expert}", "EXPERT"))
    return escaped.replace("LAYER", number).replace("EXPERT", r"\d+")


def _alpha(a: Adapted) -> float:
    return without_noise(a.scale * a.rank)


def without_noise(alpha: float) -> float:
    """``scale * rank`` as it was before it was divided by the rank."""
    return float(f"{alpha:.14g}")


def most_common(values: list[Any]) -> Any:
    """The first of those that occur most often."""
    return max(dict.fromkeys(values), key=values.count)
