"""Count the copies of factors that routed experts share, which are made for the kernels."""

from collections.abc import Iterable

from megalora.config import ParallelConfig
from megalora.lora.spec import Adapted
from megalora.planner.weights import PlannedModel


def copied_elements(model: PlannedModel, p: ParallelConfig, adapted: Iterable[Adapted]) -> int:
    """Elements of the copies that experts of a rank have of what they share in one module."""
    total = 0
    for a in adapted:
        # A of gate and up, B of down: H wide.
        if a.shared:
            total += a.num_experts // p.ep * a.rank * model.shape.hidden
    return total
