"""The adapter of a fused weight: several projections, each with its own A and B.

Shape legend: E experts   N rows of the fused weight   K inputs   R sum of the ranks
r rank of one projection
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .checks import check_adapter

Factors = Sequence[torch.Tensor | None]
"""One factor for each projection, ``[E, r_i, N / len(factors)]``, any strides; None for a
projection without adapter.

Projection i owns its equal share of N columns, and its own of the R columns of S: ranks follow each
other there.
"""


class RankScale(NamedTuple):
    """Factors for the columns of S and dS, applied in float32 where these are written.

    LoRA's scaling is there and not in B: ``B (scale S)`` is ``(scale B) S``, ``dS = scale (dy B)``,
    and every gradient is one of a product with S or dS, so no scaled copy of a factor is made. S is
    rounded once, after scaling.
    """

    first: float
    """Of the columns before ``split``."""
    second: float
    """Of all others."""
    split: int


MAX_PROJECTIONS = 2
"""The kernels take one B (down) or two (gate and up)."""
UNSCALED = RankScale(1.0, 1.0, 0)


@dataclass(frozen=True, eq=False)
class ExpertFactors:
    """LoRA of one fused weight ``[E, N, K]`` whose rows are ``len(b)`` projections of equal height
    (gate and up; or down).

    Each projection has its own A and B: the A's are stacked, a B reads its own rows of the stack.
    """

    a: torch.Tensor
    """``[E, R, K]``, R the sum of the ranks."""
    b: tuple[torch.Tensor | None, ...]
    """``[E, N / len(b), r]`` each; None for a projection without adapter."""
    scale: tuple[float, ...]
    """alpha / r of each."""
    gain: torch.Tensor | None = None
    """``[E, N]``, float32 or x's dtype: what each row of the adapted weight is multiplied by
    (DoRA); None for 1."""

    def ranks(self) -> list[tuple[int, int, int]]:
        """(projection, first and last + 1 row of A) of those that have an adapter."""
        found = []
        start = 0
        for i, b in enumerate(self.b):
            # Only projections with an adapter take rows of the stacked A.
            if b is not None:
                found.append((i, start, start + b.shape[2]))
                start += b.shape[2]
        return found

    def blocks(self) -> tuple[torch.Tensor | None, ...]:
        """``[E, r, N / len(b)]`` each: the B's transposed, unscaled, as views."""
        return tuple(None if b is None else b.transpose(1, 2) for b in self.b)

    def rank_scale(self) -> RankScale:
        """The scale of every column of S."""
        scales = [self.scale[i] for i, _, _ in self.ranks()]
        # With one projection all columns come before the split, and both scales are its.
        _, _, split = self.ranks()[0]
        return RankScale(scales[0], scales[-1], split)

    def whole_b(self, num_rows: int) -> torch.Tensor:
        """``[E, N, R]``: the scaled B's, block by block, zero elsewhere; differentiable."""
        height = num_rows // len(self.b)
        blocks = []
        ranks = {i: (j, k) for i, j, k in self.ranks()}
        total = self.a.shape[1]
        # Down: nothing to put beside it.
        if len(self.b) == 1 and self.b[0] is not None:
            return self.b[0] * self.scale[0]
        for i, b in enumerate(self.b):
            if b is None:
                # Its rows of the weight get nothing from any rank.
                blocks.append(self.a.new_zeros(self.a.shape[0], height, total))
            else:
                # Zero columns before and behind: those are the other projection's ranks.
                blocks.append(F.pad(b * self.scale[i], (ranks[i][0], total - ranks[i][1])))
        return torch.cat(blocks, 1)

    def check(self, what: str, weight_ENK: torch.Tensor) -> None:
        """Raises ``ValueError`` unless A's rows and every B fit each other and the weight."""
        if len(self.b) > MAX_PROJECTIONS:
            raise ValueError(
                f"{what}: {len(self.b)} b's; a fused weight has at most {MAX_PROJECTIONS}"
                " projections here (gate and up)"
            )
        if len(self.b) != len(self.scale) or not self.b or weight_ENK.shape[1] % len(self.b):
            raise ValueError(
                f"{what}: {len(self.b)} b's with {len(self.scale)} scales for a weight of"
                f" {weight_ENK.shape[1]} rows; want one scale for each b, and b's of equal height"
            )
        for i, start, stop in self.ranks():
            check_adapter(
                what,
                weight_ENK[:, : weight_ENK.shape[1] // len(self.b)],
                self.a[:, start:stop],
                self.b[i],
            )
        if self.gain is not None and self.gain.shape != weight_ENK.shape[:2]:
            raise ValueError(
                f"{what}: gain is {tuple(self.gain.shape)}, want one number for each row of the"
                f" weight, {tuple(weight_ENK.shape[:2])}"
            )
        ranks = [stop - start for _, start, stop in self.ranks()]
        if not ranks or self.a.shape[1] != sum(ranks):
            raise ValueError(
                f"{what}: a has {self.a.shape[1]} rows, the ranks of its b's are {ranks}"
            )
