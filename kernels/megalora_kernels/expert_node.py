"""What the autograd nodes of experts share: their tensors by name, and the gradient of B.

Shape legend: M routed rows   N rows of a weight   R rank of its adapter
"""

from dataclasses import dataclass

import torch

from .augmented_weight import AugmentedWeight
from .engine import Rows, Weight, make_engine
from .expert_factors import UNSCALED, ExpertFactors, Factors, RankScale
from .routing import Routing


@dataclass(frozen=True)
class Static:
    """What the node needs besides tensors that autograd tracks."""

    backend: str
    recompute: bool
    num_rows: int
    joined: tuple[AugmentedWeight | None, AugmentedWeight | None]
    scales: tuple[tuple[float, ...], tuple[float, ...]]
    blocks: tuple[int, int]
    """Number of projections of gate_up and of down that tensors follow for."""


class Operands:
    """The node's tensors by name, from the flat list autograd passes: forward's and backward's way
    to the same view."""

    def __init__(self, static: Static, tensors: tuple[torch.Tensor | None, ...]) -> None:
        x, p, offsets, source, slots, w1, w2, a1, a2, *b = tensors
        assert p is not None and offsets is not None
        self.x = x
        self.p = p
        self.routing = Routing(offsets, static.num_rows, source, slots)
        n = static.blocks[0]
        given = zip((w1, w2), static.joined, strict=True)
        # A joined weight is not among the saved tensors.
        self.weight1, self.weight2 = (Weight(joined or w) for w, joined in given)  # pyright: ignore[reportArgumentType]
        self.adapter1 = None if a1 is None else ExpertFactors(a1, tuple(b[:n]), static.scales[0])
        self.adapter2 = None if a2 is None else ExpertFactors(a2, tuple(b[n:]), static.scales[1])
        self.engine = make_engine(static.backend, self.routing)

        self.a1, self.blocks1, self.scale1 = _factors(self.adapter1)
        self.a2, self.blocks2, self.scale2 = _factors(self.adapter2)

    def gradient_shapes(
        self, before_swiglu: bool, wants_a1: bool, wants_b2: bool
    ) -> list[tuple[int, int] | None]:
        """(rows, columns) of the gradients that are computed, in the order of a1, a2 and the
        B's."""

        def shape_of(t: torch.Tensor | None, computed: bool) -> tuple[int, int] | None:
            return (t.shape[1], t.shape[2]) if t is not None and computed else None

        b1, b2 = (
            () if adapter is None else adapter.b for adapter in (self.adapter1, self.adapter2)
        )
        factors = [shape_of(self.a1, wants_a1), shape_of(self.a2, before_swiglu)]
        return [
            *factors,
            *(shape_of(b, before_swiglu) for b in b1),
            *(shape_of(b, wants_b2) for b in b2),
        ]

    def gate_up(self) -> tuple[torch.Tensor, Rows]:
        assert self.x is not None
        factors = None if self.a1 is None else (self.a1,)
        rows = self.engine.shrink(
            self.x, factors, self.weight1, self.routing.source_M, scale=self.scale1
        )
        return self.engine.linear(rows, self.weight1, self.blocks1), rows


def _factors(
    adapter: ExpertFactors | None,
) -> tuple[torch.Tensor | None, Factors | None, RankScale]:
    """A, the B's as a product with S or a shrink takes them, and the scale of S's columns."""
    return (
        (None, None, UNSCALED)
        if adapter is None
        else (adapter.a, adapter.blocks(), adapter.rank_scale())
    )


def gradients_of_b(
    o: Operands,
    adapter: ExpertFactors,
    s_MR: torch.Tensor,
    dy: torch.Tensor,
    places: list[torch.Tensor | None],
    source_M: torch.Tensor | None,
) -> None:
    """dB of each projection from S and the gradient of the weight's output, whose columns are as
    many equal blocks as there are projections."""
    blocks = dy.chunk(len(places), 1)
    for i, start, stop in adapter.ranks():
        place = places[i]
        assert place is not None
        o.engine.wgrad(s_MR[:, start:stop], blocks[i], place.transpose(1, 2), source_M)
