"""Say which layers of a rank compute what again in backward: ``train.recompute``."""

import re
from dataclasses import dataclass
from typing import Literal

from megalora.config.checks import require

Level = Literal["off", "selective", "full"]
"""What a layer computes again; ``TrainConfig.recompute`` says what each means."""
LEVELS: tuple[Level, ...] = ("off", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class RecomputeLayers:
    """The first layers of every rank recomputed fully, the others less."""

    layers: int
    """Layers that a rank recomputes fully, counted from its first one on through all its model
    chunks."""
    rest: Literal["off", "selective"] = "off"
    """What the other layers recompute."""

    def __post_init__(self) -> None:
        require(
            self.layers >= 1,
            f"train.recompute.layers must be at least 1, got {self.layers}; write"
            f" train.recompute={self.rest} to recompute no layer fully",
        )

    def __str__(self) -> str:
        return f"full{self.layers}+{self.rest}"


Recompute = Level | RecomputeLayers


def level_of(recompute: Recompute, position: int) -> Level:
    """What a layer recomputes, by its position among the layers of its rank.

    Positions count through the chunks of an interleaved schedule in their order: the first chunk
    has the most microbatches in flight, so that a layer recomputed there frees the most memory.
    """
    if not isinstance(recompute, RecomputeLayers):
        return recompute
    return "full" if position < recompute.layers else recompute.rest


def recompute_from(text: str) -> Recompute:
    """Read what ``str`` of a ``Recompute`` writes: a level, or ``full12+off``.

    Raises:
        ValueError: it is neither.
    """
    for level in LEVELS:
        if text == level:
            return level
    found = re.fullmatch(r"full(\d{1,6})\+(off|selective)", text)
    require(
        found is not None,
        f"recompute must be one of {', '.join(LEVELS)}, or the first layers fully and the rest less"
        f" as in full12+selective, got {text!r}",
    )
    assert found is not None  # for the type checker
    rest = "off" if found[2] == "off" else "selective"
    return RecomputeLayers(layers=int(found[1]), rest=rest)
