"""Make operands of one grouped product with LoRA, compute it in float64 row by row, and judge the
Triton kernel's result."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from megalora_kernels import AugmentedWeight, Routing
from megalora_kernels.variants import Variant

from tests.kernels.conftest import gemm_kernel
from tests.kernels.oracle import ULP, expert_of_rows

COUNTS = [7, 0, 33, 16, 1, 0]
"""Fewer rows than a tile, none, two tiles and a row, exactly a tile, one row, none."""
# Multiples of the small tiles (16 for K, 32 for N), as TMA needs them.
K = 48
N = 128
TOKENS = 40
SMALL = Variant(16, 32, 16, num_warps=4, num_stages=2)
BY_TMA = replace(SMALL, weight="tma", rows="tma")
Operands = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Sizes and form of a product."""

    ranks: tuple[int | None, ...] = (3, 5)
    op: str = "forward"
    gathered: bool = True
    joined: bool = False
    dtype: torch.dtype = torch.float32
    k: int = K
    n: int = N

    def operands(self) -> Operands:
        g = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(self.dtype)

        E = len(COUNTS)
        M = sum(COUNTS)
        # Each block of B fills its share of the columns: gate's the first half, up's the second.
        width = self.n // max(1, len(self.ranks))
        # Some of the 40 tokens serve several rows, others none.
        source = None
        if self.gathered:
            source = torch.randint(0, TOKENS, (M,), generator=g, dtype=torch.int32)
        b: list[torch.Tensor | None] = []
        stacked_rank = 0
        for rank in self.ranks:
            if rank is None:
                b.append(None)
                continue
            stacked_rank += rank
            block = normal(E, rank, width)
            if self.op == "forward":
                # the same values in memory as [E, N, r], as B is kept
                block = block.transpose(1, 2).contiguous().transpose(1, 2)
            b.append(block)
        return {
            "x": normal(TOKENS if self.gathered else M, self.k),
            "w_EKN": self.weight(normal(E, self.k, self.n)),
            "routing": Routing(torch.tensor(COUNTS).cumsum(0).int(), M),
            "s_MR": normal(M, stacked_rank) if stacked_rank else None,
            "b": tuple(b) if stacked_rank else None,
            "source_M": source,
        }

    def weight(self, w_EKN: torch.Tensor) -> torch.Tensor:
        """The same values stored [E, N, K] or [E, K, N], perhaps within the wider buffer of a
        ``AugmentedWeight``."""
        stored = w_EKN.transpose(1, 2).contiguous() if self.op == "forward" else w_EKN
        if self.joined:
            joined = AugmentedWeight(stored, 5)
            # what lies behind a weight's rows and columns must not be read
            joined.buffer[:, joined.N :] = torch.nan
            joined.buffer[:, :, joined.K :] = torch.nan
            stored = joined.weight
        return stored.transpose(1, 2) if self.op == "forward" else stored


def row_by_row(o: Operands) -> torch.Tensor:
    """The product in float64: one row at a time, without slicing by offsets."""
    M = o["routing"].num_rows
    N = o["w_EKN"].shape[2]
    y = torch.zeros(M, N, dtype=torch.float64)
    for m, e in enumerate(expert_of_rows(COUNTS)):
        token = m if o["source_M"] is None else int(o["source_M"][m])
        y[m] = o["x"][token].double() @ o["w_EKN"][e].double()
        column = 0
        rank = 0
        for block in o["b"] or ():
            # S has no columns for a block that is None, but the output has.
            width = N // len(o["b"])
            if block is not None:
                s = o["s_MR"][m, rank : rank + block.shape[1]].double()
                y[m, column : column + width] += s @ block[e].double()
                rank += block.shape[1]
            column += width
    return y


def assert_right(case: Case, variant: Variant | None) -> torch.Tensor:
    """|error| <= (u + n 2^-24) times the same sum over absolute values: one rounding, n terms added
    in float32."""
    o = case.operands()
    y = gemm_kernel.grouped_gemm_triton(**o, variant=variant)
    expected = row_by_row(o)
    # Terms may cancel in a result; their rounding errors do not.
    absolute = dict(o)
    for name in ("x", "w_EKN", "s_MR"):
        if o[name] is not None:
            absolute[name] = o[name].abs()
    if o["b"] is not None:
        absolute["b"] = [block if block is None else block.abs() for block in o["b"]]
    # n: K terms of the base and at most 32 of the adapter (ranks 16 and 16).
    allowed = 1.1 * (ULP[case.dtype] + (case.k + 32) * 2.0**-24) * row_by_row(absolute)
    assert y.dtype == case.dtype and y.isfinite().all()
    assert ((y.double() - expected).abs() <= allowed).all()
    return y
