"""Measure how far apart two sets of adapter tensors are."""

import math
from collections.abc import Mapping

from torch import Tensor


def projection(name: str) -> str:
    """A tensor's name without its expert: ``layers.0.mlp.experts.gate_proj.lora_A``."""
    before, _, after = name.partition(".experts.")
    return before + after.lstrip("0123456789")


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference; infinite where one is not a number."""
    difference = (ours.double() - theirs.double()).abs().max().item()
    # Comparisons with NaN are false, so ``max`` over tensors could lose it.
    return float("inf") if math.isnan(difference) else difference


def of_largest(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Largest difference, over the largest entry of the same projection and layer, all experts
    together."""
    assert ours.keys() == theirs.keys()
    # Not tensor by tensor: an expert with few tokens has gradients far smaller than the terms that
    # they are sums of, and rounding is relative to the terms.
    largest: dict[str, float] = {}
    for name, value in theirs.items():
        before = largest.get(projection(name), 0.0)
        largest[projection(name)] = max(before, value.abs().max().item())
    worst = 0.0
    for name, value in theirs.items():
        difference = distance(ours[name], value)
        scale = largest[projection(name)]
        if scale:
            worst = max(worst, difference / scale)
        elif difference:
            # Nothing of it should be there at all.
            worst = float("inf")
    return worst
