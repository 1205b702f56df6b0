"""Count the bytes of weights that stay codes, and of the memory that they are decoded into."""

import math
from dataclasses import replace
from typing import NamedTuple

from megalora.config import ParallelConfig
from megalora.model.held import Held, coded
from megalora.planner.weights import Chunk, PlannedModel, stacked_rank


class HeldBytes(NamedTuple):
    """Bytes of a rank."""

    codes: int
    """Codes and scales."""
    plain: int
    """What the same weights would take in the dtype of decoded values."""
    scratch: int
    """Memory for decoded values, without room for adapters."""
    room: int
    """That room, where the kernels want it."""


def held_bytes(
    held: Held | None, model: PlannedModel, p: ParallelConfig, chunks: list[Chunk], e: int
) -> HeldBytes:
    """Count what the chunks of a rank hold as codes.

    Args:
        e: bytes of an element of decoded values.
    """
    if held is None:
        return HeldBytes(0, 0, 0, 0)
    codes = 0
    plain = 0
    # All layers share one buffer for gate_up, one for down and one for dense linears.
    largest: dict[str, int] = {}
    with_room: dict[str, int] = {}
    layers = {layer for chunk in chunks for layer in chunk.layers}
    for layer, module in held.modules:
        if layer not in layers:
            continue
        how, sizes = coded(held, model.shape, p, layer, module)
        codes += how.num_bytes(sizes, e)
        plain += math.prod(sizes) * e
        place = "dense"
        rank = 0
        if module.startswith("mlp.experts."):
            place = module
            rank = stacked_rank(model.modules_of(layer).get(module, []))
        largest[place] = max(largest.get(place, 0), math.prod(sizes))
        wide = replace(how, rank=rank).scratch_elements(sizes)
        with_room[place] = max(with_room.get(place, 0), wide)
    scratch = sum(largest.values()) * e
    return HeldBytes(codes, plain, scratch, sum(with_room.values()) * e - scratch)
