"""Compare shrink alone with float64 row by row: one factor or one for each projection, scales,
padding and the copied rows."""

import itertools
from typing import Any

import pytest
import torch
from megalora_kernels import Routing
from megalora_kernels.expert_factors import RankScale

from tests.kernels import interpreter
from tests.kernels.conftest import shrink
from tests.kernels.oracle import ULP, expert_of_rows, one_addition

COUNTS = [0, 5, 0, 70, 1]
TOKENS = 9
WIDTH = 24
M = sum(COUNTS)
E = len(COUNTS)
RANKS = {
    "one": (7,),
    "two": (3, 5),
    "second alone": (None, 5),
    "first alone": (3, None),
    "copy alone": (None,),
}
SCALE = RankScale(0.75, 1.5, 3)
"""The first three columns of S times 0.75, the others times 1.5."""


def operands(dtype: torch.dtype, ranks: tuple[int | None, ...], gathered: bool):
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    source = None
    num_rows_of_x = M
    if gathered:
        source = torch.randint(0, TOKENS, (M,), generator=g).int()
        num_rows_of_x = TOKENS
    x = normal(num_rows_of_x, WIDTH * len(ranks))
    factors: list[torch.Tensor | None] = []
    for rank in ranks:
        factors.append(None if rank is None else normal(E, rank, WIDTH))
    return x, tuple(factors), source


def expected(
    x: torch.Tensor,
    factors: tuple[Any, ...],
    source: torch.Tensor | None,
    scale: RankScale,
    rank: int,
):
    """S and the sum of its terms' sizes, in float64."""
    s = torch.zeros(M, rank, dtype=torch.float64)
    size = torch.zeros_like(s)
    for m, e in enumerate(expert_of_rows(COUNTS)):
        row = x[m if source is None else source[m]].double()
        # Ranks of all factors lie one behind the other in S.
        column = 0
        for i, a in enumerate(factors):
            if a is None:
                continue
            for r in range(a.shape[1]):
                factor = scale.first if column < scale.split else scale.second
                # Factor i reads its own WIDTH features of the row.
                terms = a[e, r].double() * row[i * WIDTH : (i + 1) * WIDTH] * factor
                s[m, column] = terms.sum()
                size[m, column] = terms.abs().sum()
                column += 1
    return s, size


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name, copies", itertools.product(RANKS, [True, False]))
# Half precision is rounded on the way out, float64 shows the arithmetic alone.
@pytest.mark.parametrize(
    "way, dtype", [("loop", torch.float64), ("triton", torch.float32), ("triton", torch.float16)]
)
def test_shrink(way, dtype, name, copies, backwards, monkeypatch):
    if backwards:
        interpreter.reverse_programs(monkeypatch)
    ranks = RANKS[name]
    # Rows are copied where they are gathered: permute_shrink needs both.
    gathered = copies
    rank = sum(r for r in ranks if r is not None)
    x, factors, source = operands(dtype, ranks, gathered)
    # Two columns more than the rank: padding, which the kernel must fill with zeros.
    s = x.new_empty(M, rank + 2) if rank else None
    rows = x.new_empty(M, x.shape[1]) if copies else None
    getattr(shrink, f"shrink_{way}")(
        x, factors, Routing(torch.tensor(COUNTS).cumsum(0).int(), M), s, source, rows, SCALE
    )
    if rows is not None:
        assert torch.equal(rows, x if source is None else x[source.long()])
    if s is not None:
        want, size = expected(x, factors, source, SCALE, rank)
        # Float32 accumulation over 2 WIDTH terms, and one rounding of S after scaling.
        bound = ULP[dtype] * want.abs() + 2 * WIDTH * one_addition(dtype) * size
        # 2^-25 is half the distance of float16's smallest numbers.
        assert ((s[:, :rank].double() - want).abs() <= 1.1 * bound + 2.0**-25).all()
        assert torch.count_nonzero(s[:, rank:]) == 0


def test_scales_that_are_powers_of_two_change_no_mantissa():
    """Scaling S in place of B then gives the very bits that a scaled B gave."""
    x, factors, _ = operands(torch.float16, (3, 5), False)
    plain = x.new_empty(M, 8)
    scaled = x.new_empty(M, 8)
    routing = Routing(torch.tensor(COUNTS).cumsum(0).int(), M)
    shrink.shrink_triton(x, factors, routing, plain)
    shrink.shrink_triton(x, factors, routing, scaled, scale=RankScale(2.0, 0.5, 3))
    assert torch.equal(scaled, plain * torch.tensor([2.0] * 3 + [0.5] * 5).half())
