"""List the ways to divide layers over pipeline stages and their chunks that the planner tries."""

from megalora.config import ParallelConfig
from megalora.config.parallel import split_layers

MOST_CHUNKS = 12
"""Chunks of a stage that are tried at most. They divide the bubble: beyond twelve, all further ones
together save less than a twelfth of it, and each sends every microbatch once more."""


def divisions(num_layers: int, pp: int) -> list[ParallelConfig]:
    """The ways to divide the layers over ``pp`` stages that are tried, or the one that is not
    possible, so that its reason is named.

    Parts are equal where their number divides the layers. Else embedding and head count as a layer
    each (``split_layers``): chunks of a stage are tried where that makes parts equal, whole stages
    always.
    """
    if pp == 1:
        return [ParallelConfig()]  # chunks take turns between stages: one has nothing to interleave
    if pp > num_layers:
        return [ParallelConfig(pp=pp)]
    found = []
    for vpp in range(1, min(num_layers // pp, MOST_CHUNKS) + 1):
        parts = pp * vpp
        if num_layers % parts == 0:
            found.append(ParallelConfig(pp=pp, vpp=vpp))
        # Unequal chunks are worth it only where embedding and head make them even.
        elif vpp == 1 or (num_layers + 2) % parts == 0:
            sizes = split_layers(num_layers, parts)
            found.append(ParallelConfig(pp=pp, vpp=vpp, stage_layers=sizes))
    return found
