"""The adapter of a fused weight: several projections, each with its own A and B.

Shape legend: E experts   N rows of the fused weight   K inputs   R sum of the ranks   r rank of one projection
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .checks import check_adapter


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA of one fused weight ``[E, N, K]`` whose rows are ``len(b)`` projections of equal height (gate and up; or down).

    Each projection has its own A and B: the A's are stacked, a B reads its own rows of the stack.
    """

    a: torch.Tensor
    """``[E, R, K]``, R the sum of the ranks."""
    b: tuple[torch.Tensor | None, ...]
    """``[E, N / len(b), r]`` each; None for a projection without adapter."""
    scale: tuple[float, ...]
    """alpha / r of each."""

    def ranks(self) -> list[tuple[int, int, int]]:
        """(projection, first and last + 1 row of A) of those that have an adapter."""
        found, start = [], 0
        for i, b in enumerate(self.b):
            if b is not None:
                found.append((i, start, start + b.shape[2]))
                start += b.shape[2]
        return found

    def whole_b(self, num_rows: int) -> torch.Tensor:
        """``[E, N, R]``: the scaled B's, block by block, zero elsewhere; differentiable."""
        height, blocks, ranks = num_rows // len(self.b), [], {i: (j, k) for i, j, k in self.ranks()}
        total = self.a.shape[1]
        if len(self.b) == 1 and self.b[0] is not None:
            return self.b[0] if self.scale[0] == 1 else self.b[0] * self.scale[0]
        for i, b in enumerate(self.b):
            if b is None:
                blocks.append(self.a.new_zeros(self.a.shape[0], height, total))
            else:
                blocks.append(F.pad(b * self.scale[i], (ranks[i][0], total - ranks[i][1])))
        return torch.cat(blocks, 1)

    def b_gradients(self, db_ENR: torch.Tensor) -> list[torch.Tensor | None]:
        """The gradient of each B from that of ``whole_b``."""
        grads: list[torch.Tensor | None] = [None] * len(self.b)
        height = db_ENR.shape[1] // len(self.b)
        for i, j, k in self.ranks():
            grads[i] = db_ENR[:, i * height : (i + 1) * height, j:k] * self.scale[i]
        return grads

    def check(self, what: str, weight_ENK: torch.Tensor) -> None:
        """Raises ``ValueError`` unless A's rows and every B fit each other and the weight."""
        if len(self.b) != len(self.scale) or not self.b or weight_ENK.shape[1] % len(self.b):
            raise ValueError(
                f"{what}: {len(self.b)} b's with {len(self.scale)} scales for a weight of {weight_ENK.shape[1]} rows; "
                f"want one scale for each b, and b's of equal height"
            )
        for i, start, stop in self.ranks():
            check_adapter(what, weight_ENK[:, : weight_ENK.shape[1] // len(self.b)], self.a[:, start:stop], self.b[i])
        ranks = [stop - start for _, start, stop in self.ranks()]
        if not ranks or self.a.shape[1] != sum(ranks):
            raise ValueError(f"{what}: a has {self.a.shape[1]} rows, the ranks of its b's are {ranks}")
