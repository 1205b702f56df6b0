"""Count DoRA's magnitudes on a rank, and what scaling by them keeps for backward."""

import math

from megalora.config import ParallelConfig
from megalora.lora.spec import Adapted, has_magnitudes
from megalora.planner.microbatch import STATISTIC


def magnitudes_on_rank(a: Adapted, p: ParallelConfig) -> int:
    """Magnitudes of one projection on a rank, of all its experts there."""
    # What is split over etp exists once per expert, and experts are shared out over ep.
    sizes = {"tp": p.tp, "etp": p.etp}
    experts = max(1, a.num_experts // p.ep)
    return experts * math.prod(a.shard_shape("M", sizes[a.group("M")]))


def dense_scaling(adapted: list[Adapted], rows: int, features: int, e: int) -> int:
    """What a dense linear with DoRA keeps: its output before it is scaled, rows x features, and
    what it is scaled by."""
    if not has_magnitudes(adapted):
        return 0
    # The gradient of a magnitude needs the output as it was.
    return rows * features * e + kept_for_scaling(adapted, features)


def kept_for_scaling(adapted: list[Adapted], features: int) -> int:
    """A float32 factor for each row of a fused weight, of ``features`` rows on the rank. Norms,
    which backward reads as well, are there without a microbatch (``state_bytes.py``)."""
    return features * STATISTIC if has_magnitudes(adapted) else 0
