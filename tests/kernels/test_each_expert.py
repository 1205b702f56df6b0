"""Check products expert by expert: torch's grouped GEMM in one call and the loop give the same, and
wrong offsets are refused."""

import pytest
import torch
from megalora_kernels import Routing, each_expert
from megalora_kernels.each_expert import add_product, multiply, multiply_rows

from tests.kernels.oracle import expert_of_rows

COUNTS = [5, 0, 12, 1, 0, 7]
K = 24
N = 40
R = 8
LIMIT = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Relative in the 2-norm: some roundings of the dtype."""


def routing(counts: list[int]) -> Routing:
    return Routing(torch.tensor(counts).cumsum(0).int(), sum(counts))


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64
    ).to(dtype)


def row_products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x [M, K] times the weight [E, K, N] of each row's expert, in float64."""
    y = torch.zeros(len(x), w.shape[2], dtype=torch.float64)
    for m, e in enumerate(expert_of_rows(COUNTS)):
        y[m] = x[m].double() @ w[e].double()
    return y


def near(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got.double() - want).norm() <= LIMIT[got.dtype] * want.norm())


@pytest.fixture(params=["few rows", "many rows"])
def how(request, monkeypatch) -> list[torch.dtype]:
    """The way taken, then the dtype of the operands of each product that came in one call."""
    # With few rows per expert one call is faster than a loop; a limit of one row makes all many.
    if request.param == "many rows":
        monkeypatch.setattr(each_expert, "FEW_ROWS", 1)
    real = each_expert.grouped_mm
    taken = []

    def counted(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        taken.append(a.dtype)
        return real(a, b, offs=offs)

    monkeypatch.setattr(each_expert, "grouped_mm", counted)
    taken.append(request.param)
    return taken


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("dtype", list(LIMIT), ids=str)
def test_products_equal_those_of_float64(dtype, how):
    where = routing(COUNTS)
    x = random(25, K, dtype=dtype)
    s = random(25, R, dtype=dtype)
    w = random(6, N, K, dtype=dtype).transpose(1, 2)
    b = random(6, R, N, dtype=dtype)
    want = row_products(x, w)
    y = multiply(x, w, where)
    assert near(y, want) and y.dtype == dtype
    # An output within a wider buffer, whose other columns must keep their values.
    room = torch.full((25, N + 8), 7.0, dtype=dtype)
    assert multiply(x, w, where, out=room[:, :N]).data_ptr() == room.data_ptr()
    assert torch.equal(room[:, :N], y) and (room[:, N:] == 7).all()
    add_product(room[:, :N], s, b, where)
    assert near(room[:, :N], want + row_products(s, b))
    found = torch.empty(6, R, K, dtype=dtype)
    multiply_rows(s, x, where, found)
    outer = torch.zeros(6, R, K, dtype=torch.float64)
    for e, i, j in where.spans():
        outer[e] = s[i:j].double().T @ x[i:j].double()
    assert near(found, outer)
    # Experts 1 and 4 have no rows.
    assert torch.count_nonzero(found[[1, 4]]) == 0
    # Four calls above; torch's grouped GEMM takes no float64.
    in_one_call = how[0] == "few rows" and dtype != torch.float64
    assert how[1:] == [dtype] * (4 if in_one_call else 0)


@pytest.mark.parametrize("how", ["few rows"], indirect=True)
def test_operands_that_it_cannot_read_are_not_given_to_it(how):
    where = routing(COUNTS)
    # Rows of 27 floats are 108 bytes, no multiple of 16; of 28 floats 112.
    w = random(6, K, N, dtype=torch.float32)
    wide = random(25, K + 3, dtype=torch.float32)
    # rows of whole 16 bytes that begin between them
    beside = random(25, K + 4, dtype=torch.float32)[:, 1 : K + 1]
    for x in (wide[:, :K], random(25, 2 * K, dtype=torch.float32)[:, ::2], beside):
        assert near(multiply(x, w, where), row_products(x, w))
    assert near(multiply(wide[:, 3:], w, where), row_products(wide[:, 3:], w))
    odd = random(6, K, 5, dtype=torch.float32)
    assert multiply(random(25, K, dtype=torch.float32), odd, where).shape == (25, 5)
    assert how == ["few rows"]


@pytest.mark.parametrize("counts", [[0, 0], [3, -1]])
def test_no_rows_and_offsets_that_are_wrong(counts):
    w = random(2, K, N, dtype=torch.float32)
    if min(counts) == 0:
        assert multiply(torch.empty(0, K), w, routing(counts)).shape == (0, N)
        sums = torch.full((2, R, K), 7.0)
        multiply_rows(torch.empty(0, R), torch.empty(0, K), routing(counts), sums)
        assert torch.count_nonzero(sums) == 0
    else:
        with pytest.raises(ValueError, match="offsets must never decrease"):
            multiply(torch.empty(2, K), w, routing(counts))
