"""Compare lora_wgrad with float64 outer products, row by row."""

import re
from typing import Any

import pytest
import torch
from megalora_kernels import lora_wgrad

from tests.kernels.conftest import lora_wgrad as module
from tests.kernels.conftest import tiles
from tests.kernels.linear import COUNTS
from tests.kernels.oracle import ULP, expert_of_rows, one_addition, with_dtypes
from tests.kernels.passes import wgrad

BACKENDS = ("reference", "loop", "triton")


def operands(counts: list[int], rank: int, K: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """g, x, offsets and the gradient of the result."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    rows = sum(counts)
    g_MR = normal(rows, rank).requires_grad_()
    x_MK = normal(rows, K).requires_grad_()
    dout_ERK = normal(len(counts), rank, K)
    offsets_E = torch.tensor(counts).cumsum(0).int()
    return g_MR, x_MK, offsets_E, dout_ERK


def row_by_row(counts: list[int], *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """out, dg, dx in float64."""
    g, x, dout = [t.detach().double() for t in operands]
    out = torch.zeros_like(dout)
    dg = torch.zeros_like(g)
    dx = torch.zeros_like(x)
    for m, e in enumerate(expert_of_rows(counts)):
        out[e] += torch.outer(g[m], x[m])
        dg[m] = dout[e] @ x[m]
        dx[m] = g[m] @ dout[e]
    return out, dg, dx


def assert_within_rounding(
    actual: tuple[torch.Tensor, ...], counts: list[int], g: Any, x: Any, dout: Any
) -> None:
    """Sums of n products in float32 (float64), rounded once: u + n 2^-24 of the sum of absolute
    values."""
    dtype = x.dtype
    terms = max(*counts, *x.shape)
    allowed = ULP[dtype] + terms * one_addition(dtype)
    sizes = row_by_row(counts, g.abs(), x.abs(), dout.abs())
    for got, want, size in zip(actual, row_by_row(counts, g, x, dout), sizes, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        assert ((got.double() - want).abs() <= allowed * size).all()


@pytest.mark.usefixtures("uninitialised_is_nan", "small_tiles")
@pytest.mark.parametrize(
    "counts, rank, K", [(COUNTS, 3, 24), ([0, 70, 0, 3], 5, 136), ([0, 0], 7, 24)], ids=str
)
@pytest.mark.parametrize("backend, dtype", with_dtypes(BACKENDS), ids=str)
def test_values_and_gradients(backend, dtype, counts, rank, K, monkeypatch):
    # 70 rows: two chunks; K = 136: two blocks of 128 features
    monkeypatch.setattr(tiles, "CHUNK_ROWS", 64)
    g, x, offsets, dout = operands(counts, rank, K, dtype)
    out = lora_wgrad(g, x, offsets, backend=backend)
    assert_within_rounding((out, *torch.autograd.grad(out, (g, x), dout)), counts, g, x, dout)
    # No program writes an expert without rows: its zeros must come from somewhere all the same.
    for e, count in enumerate(counts):
        if count == 0:
            assert torch.count_nonzero(out[e]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_gathered_from_a_source(backend):
    """What expert_mlp uses: row m's x is x[source[m]]."""
    counts = [4, 0, 9]
    g, x, offsets, dout = operands(counts, 3, 24, torch.float32)
    # 13 rows of 5 tokens: some tokens serve several rows.
    source = torch.randint(0, 5, (13,), generator=torch.Generator().manual_seed(1)).int()
    given = (g, x[:5], module.Routing(offsets, 13), source)
    with torch.no_grad():
        out = module.lora_wgrad_ref(*given) if backend == "reference" else wgrad(backend, *given)
    want, _, _ = row_by_row(counts, g, x[source.long()], dout)
    # 9 products of size at most 10: 90 * 2^-24 = 5e-6
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)


def test_sums_of_chunks_are_kept_in_float32(monkeypatch):
    """1 + 2^-12 in one chunk and -1 in the next: float16 would round the first to 1."""
    monkeypatch.setattr(tiles, "CHUNK_ROWS", 64)
    g = torch.zeros(70, 1, dtype=torch.float16)
    g[0] = 1
    g[1] = 2.0**-12
    g[64] = -1
    out = lora_wgrad(
        g, torch.ones(70, 3).half(), torch.tensor([70], dtype=torch.int32), backend="triton"
    )
    assert torch.equal(out, torch.full((1, 1, 3), 2.0**-12).half())


@pytest.mark.parametrize("backend", ["reference", "loop"])
def test_gradcheck(backend):
    g, x, offsets, _ = operands([0, 2, 3, 0], 2, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda g, x: lora_wgrad(g, x, offsets, backend=backend), (g, x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    g, x, offsets, dout = operands(COUNTS, 3, 24, torch.float32)
    spread = []
    for t in (g, x):
        # Every second element of a buffer; who ignores the stride reads values that are off by 9.
        beside_others = torch.stack([t.detach(), t.detach() + 9], -1)
        spread.append(beside_others[..., 0].requires_grad_())
    out = lora_wgrad(*spread, offsets, backend=backend)
    actual = (out, *torch.autograd.grad(out, spread, dout.expand_as(out)))
    assert_within_rounding(actual, COUNTS, g, x, dout)


def test_an_argument_beats_the_environment(monkeypatch):
    # "grouped_mm" has no kernel for this step, and takes the loop.
    seen = []
    # Operand 3 is the output, which must hold something when the launcher returns.
    monkeypatch.setattr(
        module, "lora_wgrad_triton", lambda *of: seen.append("triton") or of[3].zero_()
    )
    monkeypatch.setattr(module, "lora_wgrad_loop", lambda *of: seen.append("loop") or of[3].zero_())
    g, x, offsets, _ = operands(COUNTS, 3, 24, torch.float32)
    monkeypatch.setenv("MEGALORA_BACKEND", "triton")
    for backend in (None, "loop", "grouped_mm"):
        lora_wgrad(g, x, offsets, backend=backend)
    assert seen == ["triton", "loop", "loop"]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "rows": (
        dict(g=torch.zeros(12, 3)),
        (
            "want g [M, R] and x [M, K] of one dtype; got torch.float32 (12, 3) and torch.float32"
            " (13, 24)"
        ),
    ),
    "dtype": (
        dict(g=torch.zeros(13, 3).half()),
        "got torch.float16 (13, 3) and torch.float32 (13, 24)",
    ),
    "dimensions": (dict(x=torch.zeros(13)), "want g [M, R] and x [M, K]"),
    "offsets": (dict(offsets=torch.zeros(6)), "offsets must be int32 [E]; got torch.float32 (6,)"),
    "end": (
        dict(offsets=torch.tensor([5, 12], dtype=torch.int32)),
        "end at M=13, the number of rows; got [5, 12]",
    ),
    "rank": (dict(g=torch.zeros(13, 129), backend="triton"), "the stacked rank 129 exceeds 128"),
    "back end": (dict(backend="fast"), "lora_wgrad: backend is 'fast', want one of"),
}


@pytest.mark.parametrize("changed, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named_with_their_values(changed, message):
    g, x, offsets, _ = operands(COUNTS, 3, 24, torch.float32)
    call = {**dict(g=g, x=x, offsets=offsets, backend=None), **changed}
    with pytest.raises(ValueError, match=re.escape(message)):
        lora_wgrad(call["g"], call["x"], call["offsets"], backend=call["backend"])
