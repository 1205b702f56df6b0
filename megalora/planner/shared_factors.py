"""Count the copies of routed experts' factors, which are made for the kernels: of those that they
share, and of those that are put together with factors of the base weights or of earlier cycles."""

import math
from collections.abc import Iterable

from megalora.config import ParallelConfig
from megalora.lora.spec import Adapted
from megalora.planner.weights import PlannedModel


def copied_elements(model: PlannedModel, p: ParallelConfig, adapted: Iterable[Adapted]) -> int:
    """Elements of the copies that experts of a rank have of factors of one module."""
    total = 0
    for a in adapted:
        # A of gate and up, B of down: H wide.
        if a.shared:
            total += a.num_experts // p.ep * a.rank * model.shape.hidden
        # ``[A0 + dA; dA]`` and ``[dB, B0]``.
        if a.num_experts and "A0" in a.factors:
            for factor in a.factors:
                total += a.num_experts // p.ep * math.prod(a.shard_shape(factor, p.etp))
        # ``[A; A_1; ...; A_t]`` and ``[B, B_1, ..., B_t]``.
        if a.num_experts and a.kept:
            for factor in a.factors:
                size = math.prod(a.shard_shape(factor, p.etp))
                total += (1 + a.kept) * (a.num_experts // p.ep) * size
    return total
