"""Check that combine makes each token's output the sum of its rows."""

import pytest
import torch
from megalora_kernels import combine

from tests.kernels.conftest import combine as module
from tests.kernels.oracle import ULP, one_addition, with_dtypes

WAYS = {"reference": module.combine_ref, "triton": module.combine_triton, "public": combine}


def operands(
    dtype: torch.dtype, tokens: int = 9, k: int = 3, width: int = 21
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.randn(tokens * k, width, generator=g, dtype=torch.float64).to(dtype)
    return y, torch.randperm(tokens * k, generator=g).int().view(tokens, k)


def slot_by_slot(y: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(len(slots), y.shape[1], dtype=torch.float64)
    for t, rows in enumerate(slots.tolist()):
        for m in rows:
            out[t] += y[m].double()
    return out


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("width", [21, 1100])  # one block of columns, and two with a ragged one
@pytest.mark.parametrize("way, dtype", with_dtypes(WAYS), ids=str)
def test_sum_of_each_tokens_rows(way, dtype, width):
    y, slots = operands(dtype, width=width)
    out = WAYS[way](y, slots)
    want = slot_by_slot(y, slots)
    size = slot_by_slot(y.abs(), slots)
    # Three terms are added in float32 (float64) and rounded once.
    allowed = ULP[dtype] * want.abs() + 3 * one_addition(dtype) * size
    assert out.dtype == dtype and ((out.double() - want).abs() <= allowed).all()


@pytest.mark.parametrize("way", WAYS)
def test_slots_are_added_in_order_and_in_float32(way):
    """2048 + 1 + 1 is 2050 in float32 and 2048 in float16, whose neighbours are 2 apart."""
    y = torch.tensor([[1.0], [2048.0], [1.0]], dtype=torch.float16)
    assert WAYS[way](y, torch.tensor([[1, 0, 2]], dtype=torch.int32)).item() == 2050
    # Floats above 2^24 are 2 apart: adding the 1 before the large terms cancel loses it.
    big = torch.tensor([[2.0**24], [1.0], [-(2.0**24)]])
    # (2^24 + 1) - 2^24 with ties to even
    assert WAYS[way](big, torch.tensor([[0, 1, 2]], dtype=torch.int32)).item() == 0
    assert WAYS[way](big, torch.tensor([[0, 2, 1]], dtype=torch.int32)).item() == 1


@pytest.mark.parametrize("way", WAYS)
def test_one_slot_is_a_gather_and_a_row_may_serve_twice(way):
    y, _ = operands(torch.float32)
    # k = 1: as after an all-to-all, where every row is a token of its own.
    rows = torch.tensor([4, 0, 4], dtype=torch.int32)
    assert torch.equal(WAYS[way](y, rows[:, None]), y[rows.long()])


@pytest.mark.parametrize("way", WAYS)
def test_empty_slots_add_nothing(way):
    """Received rows go to fewer experts than some other row does."""
    y, _ = operands(torch.float32)
    # Row 0 is no number: a sum that reads it for an empty slot is none either.
    y[0] = torch.nan
    slots = torch.tensor([[3, 7, -1], [2, -1, -1], [5, 1, 4]], dtype=torch.int32)
    want = torch.stack([y[3] + y[7], y[2], y[5] + y[1] + y[4]])
    assert torch.equal(WAYS[way](y, slots), want)


@pytest.mark.parametrize("way", WAYS)
def test_strides_and_nothing(way):
    y, slots = operands(torch.float32)
    # The first columns of a wider tensor, and columns next to each other in memory.
    columns = torch.cat([y, y + 9], 1)[:, : y.shape[1]]
    transposed = y.T.contiguous().T
    want = WAYS[way](y, slots)
    assert torch.equal(WAYS[way](columns, slots), want) and torch.equal(
        WAYS[way](transposed, slots), want
    )
    assert WAYS[way](y, slots[:0]).shape == (0, 21)
