"""Check what the other tests trust: the improved interpreter computes as a GPU does, and its
reversed order finds races."""

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels import interpreter


@triton.jit
def _product(a_ptr, b_ptr, wide_ptr, narrow_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    k = tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    c = tl.dot(a, b, input_precision="ieee")
    tl.store(wide_ptr + m[:, None] * N + n[None, :], c)
    tl.store(narrow_ptr + m[:, None] * N + n[None, :], c.to(narrow_ptr.dtype.element_ty))


@triton.jit
def _order(counter_ptr, out_ptr, Y: tl.constexpr, Z: tl.constexpr):
    """Each program takes the next number and writes it at its own place."""
    me = (tl.program_id(0) * Y + tl.program_id(1)) * Z + tl.program_id(2)
    tl.store(out_ptr + me, tl.atomic_add(counter_ptr, 1))


@triton.jit
def _race(rows_ptr, out_ptr):
    """Programs 2 i and 2 i + 1 write the same place: a race."""
    pid = tl.program_id(0)
    tl.store(out_ptr + pid // 2, tl.load(rows_ptr + pid))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_exact(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(16, 64, generator=g).to(dtype)
    b = torch.randn(64, 32, generator=g).to(dtype)
    wide = torch.empty(16, 32)
    narrow = torch.empty(16, 32, dtype=dtype)
    _product[(1,)](a, b, wide, narrow, M=16, N=32, K=64)
    # 64 additions in float32; the products of 11-bit numbers are exact in it.
    exact = a.double() @ b.double()
    size = a.double().abs() @ b.double().abs()
    assert ((wide - exact).abs() <= 64 * 2.0**-24 * size).all()
    assert torch.equal(narrow, wide.to(dtype))  # to nearest, ties to even, as torch rounds


def test_programs_run_first_to_last() -> None:
    out = torch.full((2 * 3 * 4,), -1, dtype=torch.int32)
    _order[(2, 3, 4)](torch.zeros(1, dtype=torch.int32), out, Y=3, Z=4)
    assert out.tolist() == list(range(24))


def test_and_last_to_first_when_reversed(reversed_programs: None) -> None:
    out = torch.full((2 * 3 * 4,), -1, dtype=torch.int32)
    _order[(2, 3, 4)](torch.zeros(1, dtype=torch.int32), out, Y=3, Z=4)
    assert out.tolist() == list(reversed(range(24)))


def test_a_race_shows_in_the_reversed_order_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.arange(6.0)
    first, second, backwards = torch.empty(3, 3)
    _race[(6,)](rows, first)
    _race[(6,)](rows, second)
    assert torch.equal(first, second)  # so running it twice proves nothing
    interpreter.reverse_programs(monkeypatch)
    _race[(6,)](rows, backwards)
    # Of programs 2 i and 2 i + 1 the one that runs last wins.
    assert first.tolist() == [1, 3, 5] and backwards.tolist() == [0, 2, 4]
