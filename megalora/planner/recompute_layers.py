"""Find how many layers of a rank must be recomputed fully for a layout to fit."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

from megalora.config import RecomputeLayers
from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import MemoryPlan, fullest_within
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload


def between_levels(
    model: PlannedModel,
    work: Workload,
    peaks: Mapping[ParallelLayout, int],
    limit_bytes: float,
    is_worth_it: Callable[[ParallelLayout], bool] = lambda _: True,
) -> Iterator[tuple[ParallelLayout, MemoryPlan]]:
    """Layouts that recompute the first layers of a rank fully, as few as fit: one for each that
    fits at ``full`` and each lower level at which it does not.

    Args:
        peaks: the fullest rank's bytes in the layouts that were tried, each at some levels.
        limit_bytes: what a rank may need.
        is_worth_it: asked of the lower level, as fast as which no number of layers is.
    """
    for layout, peak_bytes in peaks.items():
        # Where even full recomputation is too much, nothing between the levels fits either.
        if layout.recompute != "full" or peak_bytes > limit_bytes:
            continue
        for rest in ("off", "selective"):
            # A level that was not to be tried is none to mix with.
            lower = replace(layout, recompute=rest)
            if peaks.get(lower, 0) > limit_bytes and is_worth_it(lower):
                found = _fewest(model, work, layout, rest, limit_bytes)
                if found is not None:
                    yield found


def _fewest(
    model: PlannedModel,
    work: Workload,
    layout: ParallelLayout,
    rest: Literal["off", "selective"],
    limit_bytes: float,
) -> tuple[ParallelLayout, MemoryPlan] | None:
    """The layout with the fewest layers that fit; None where only all layers of a rank do, which is
    ``full``.

    A layer more never needs more memory, so the number is found by halving.
    """
    found = None
    too_few = 0
    enough = layout.parallel.largest_stage(model.shape.num_layers)
    while enough - too_few > 1:
        layers = (too_few + enough) // 2
        tried = replace(layout, recompute=RecomputeLayers(layers=layers, rest=rest))
        # None as soon as one stage is too full, where most tries end.
        memory = fullest_within(model, tried, work, limit_bytes)
        if memory is None:
            too_few = layers
        else:
            # It fits; perhaps fewer layers do.
            enough = layers
            found = (tried, memory)
    return found
