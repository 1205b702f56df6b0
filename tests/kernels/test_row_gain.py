"""Check the rows of experts times a number for each output, and the sums that are its gradient."""

import pytest
import torch
from megalora_kernels import Routing
from megalora_kernels.row_gain import (
    gain_gradient_loop,
    gain_gradient_triton,
    gain_rows_loop,
    gain_rows_ref,
    gain_rows_triton,
)

pytestmark = pytest.mark.usefixtures("uninitialised_is_nan")
PRODUCTS = {"loop": gain_rows_loop, "triton": gain_rows_triton}
SUMS = {"loop": gain_gradient_loop, "triton": gain_gradient_triton}
# Experts without rows first, in the middle and last; one of several tiles of 16 rows.
COUNTS = [0, 5, 0, 37, 1, 0]
M = sum(COUNTS)
N = 300  # two blocks of columns, the last of them ragged


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, Routing]:
    g = torch.Generator().manual_seed(0)
    u = torch.randn(M, N, generator=g).to(dtype)
    gain = 0.5 + torch.rand(len(COUNTS), N, generator=g)
    return u, gain, Routing(torch.tensor(COUNTS).cumsum(0).int(), M)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", PRODUCTS)
def test_products_are_rounded_once(way: str, dtype: torch.dtype, gathered: bool) -> None:
    """In bfloat16 gains keep what only float32 can hold: 1.003 is 1 there."""
    u, gain, routing = operands(dtype)
    source = torch.arange(M).flip(0).int() if gathered else None
    out = torch.empty_like(u)
    PRODUCTS[way](u, gain, routing, out, source)
    rows = u.flip(0) if gathered else u
    of_rows = gain.repeat_interleave(torch.tensor(COUNTS), 0)
    assert torch.equal(out, (rows.float() * of_rows).to(dtype))
    assert torch.equal(out, gain_rows_ref(u, gain, routing, source))
    if not gathered:
        # In place as well.
        PRODUCTS[way](u, gain, routing, u)
        assert torch.equal(u, out)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", SUMS)
def test_sums_over_the_rows_of_each_expert(way: str, dtype: torch.dtype, gathered: bool) -> None:
    u, gain, routing = operands(dtype)
    dy = torch.randn(M, N, generator=torch.Generator().manual_seed(1)).to(dtype)
    source = torch.arange(M).flip(0).int() if gathered else None
    out = torch.empty_like(gain)
    SUMS[way](dy, u, routing, out, source)
    rows = dy.flip(0) if gathered else dy
    product = (rows.double() * u.double()).split(COUNTS)
    wanted = torch.stack([part.sum(0) for part in product])
    # 37 products of order 1, each rounded at 6e-8 and added so.
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    assert not out[0].any() and not out[2].any() and not out[5].any()


@pytest.mark.parametrize("way", SUMS)
def test_no_rows(way: str) -> None:
    gain = torch.ones(3, N)
    routing = Routing(torch.zeros(3).int(), 0)
    empty = torch.empty(0, N)
    PRODUCTS[way](empty, gain, routing, empty)
    out = torch.empty_like(gain)
    SUMS[way](empty, empty, routing, out)
    assert not out.any()
