"""Check the two passes of SwiGLU alone: computed in float32 whatever the dtype, rounded once."""

import pytest
import torch
from megalora_kernels import Routing

from tests.kernels import interpreter
from tests.kernels.conftest import swiglu as module
from tests.kernels.conftest import swiglu_backward as backward_module
from tests.kernels.oracle import ULP, one_addition, with_dtypes
from tests.kernels.passes import swiglu_backward

# 40: a whole block of 32 rows and a ragged one
COUNTS = [0, 9, 0, 40]
Q = 3
R = 5
WIDTHS = (129, 128)
"""Blocks of 32, 64 and 128 columns: whole ones and one more column, or whole ones only, read
without masks."""
M = sum(COUNTS)
WAYS = ("loop", "triton")
TINY = dict.fromkeys(ULP, 0.0) | {torch.float16: 2.0**-25}
"""Half the distance of the smallest numbers: float16 reaches them."""
CASES = with_dtypes(WAYS)


def operands(dtype: torch.dtype, inner: int = WIDTHS[0]) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "y": (M, 2 * inner),
        "a": (4, Q, inner),
        "dh": (M, inner),
        "s": (M, R),
        "ds": (M, Q),
    }
    found = {}
    for name, shape in shapes.items():
        found[name] = torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    # Probabilities stay in float32 whatever the dtype, as routers give them.
    found["p"] = torch.rand(M, generator=g)
    return found


def wide(dtype: torch.dtype) -> float:
    """Ten operations in float32 (float64), exp among them."""
    return 10 * one_addition(dtype)


def routing() -> Routing:
    return Routing(torch.tensor(COUNTS).cumsum(0).int(), M)


# S of down may have more columns than the rank: torch's grouped GEMM wants it padded to 8.
@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("inner, padded", [(WIDTHS[0], Q), (WIDTHS[1], 8)])
@pytest.mark.parametrize("way, dtype", CASES, ids=str)
def test_forward_is_rounded_once(way, dtype, inner, padded):
    o = operands(dtype, inner)
    h = o["y"].new_empty(M, inner)
    s = o["y"].new_empty(M, padded)
    getattr(module, f"swiglu_{way}")(o["y"], o["p"], o["a"], routing(), h, s)
    gate, up = o["y"].double().chunk(2, 1)
    want = gate * torch.sigmoid(gate) * up * o["p"].double()[:, None]
    # Errors of float32 are relative to the factors, which sigmoid may make far larger than h.
    size = gate.abs() * up.abs() * o["p"][:, None]
    assert (
        (h.double() - want).abs() <= ULP[dtype] * want.abs() + TINY[dtype] + wide(dtype) * size
    ).all()
    # S is computed from h as stored, after its rounding: A of each row's expert, [M, Q, I].
    a = o["a"].double().repeat_interleave(torch.tensor(COUNTS), 0)
    exact = (a @ h.double()[:, :, None])[..., 0]
    most = (a.abs() @ h.double().abs()[:, :, None])[..., 0]
    assert (
        (s[:, :Q].double() - exact).abs()
        <= ULP[dtype] * exact.abs() + TINY[dtype] + inner * wide(dtype) / 10 * most
    ).all()
    assert torch.count_nonzero(s[:, Q:]) == 0


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("inner", WIDTHS)
@pytest.mark.parametrize("way, dtype", CASES, ids=str)
def test_backward_is_rounded_once(way, dtype, inner, short_chunks):
    o = operands(dtype, inner)
    dy = o["y"].new_empty(M, 2 * inner)
    found = swiglu_backward(way, o["dh"], o["y"], o["p"], routing(), dy, o["s"], o["ds"])
    gate, up = o["y"].double().chunk(2, 1)
    dh = o["dh"].double()
    p = o["p"].double()[:, None]
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    # d silu(g) / dg = sigmoid(g) (1 + g (1 - sigmoid(g)))
    want = torch.cat([dh * p * up * sigmoid * (1 + gate * (1 - sigmoid)), dh * p * silu], 1)
    size = torch.cat([dh.abs() * p * up.abs() * (1 + gate.abs()), dh.abs() * p * gate.abs()], 1)
    assert (
        (dy.double() - want).abs() <= ULP[dtype] * want.abs() + TINY[dtype] + wide(dtype) * size
    ).all()
    dp = (dh * silu * up).sum(1)
    most = (dh * gate * up).abs().sum(1)
    # dp is float32 in every dtype, as p is.
    p_ulp = 2.0**-24
    assert (
        (found.dp_M.double() - dp).abs() <= p_ulp * dp.abs() + inner * wide(dtype) / 10 * most
    ).all()
    for grad in (found.da_EQI, found.db_EJR):
        assert grad.dtype == dtype
        # Experts 0 and 2 have no rows.
        assert torch.count_nonzero(grad[[0, 2]]) == 0


@pytest.mark.usefixtures("uninitialised_is_nan", "short_chunks")
@pytest.mark.parametrize("order", ["first to last", "last to first"])
@pytest.mark.parametrize("inner", WIDTHS)
@pytest.mark.parametrize(
    "with_r, with_q", [(True, True), (True, False), (False, True), (False, False)]
)
def test_kernels_equal_autograd_in_float64(inner, with_r, with_q, order, monkeypatch):
    """h and S, and every gradient, with either adapter and without. The gradients of B and A are
    those of the products that the adapters add: y + S bᵀ before, h aᵀ behind."""
    if order == "last to first":
        interpreter.reverse_programs(monkeypatch)
    o = operands(torch.float32, inner)
    new = {"dtype": torch.float64, "requires_grad": True}
    y = o["y"].double().requires_grad_()
    p = o["p"].double().requires_grad_()
    # Zeros: the products add nothing, but their gradients are those of the adapters.
    b = torch.zeros(4, 2 * inner, R, **new)
    a = torch.zeros(4, Q, inner, **new)
    expert = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))
    h = module.swiglu_ref(y + (b[expert] @ o["s"].double()[:, :, None])[..., 0], p)
    s_down = (a[expert] @ h[:, :, None])[..., 0]
    want = torch.autograd.grad((h, s_down), (y, p, a, b), (o["dh"].double(), o["ds"].double()))

    h_found = torch.empty(M, inner)
    s_found = torch.empty(M, Q)
    module.swiglu_triton(
        o["y"], o["p"], o["a"] if with_q else None, routing(), h_found, s_found if with_q else None
    )
    assert_near(h_found, h)
    if with_q:
        assert_near(s_found, (o["a"].double()[expert] @ h[:, :, None])[..., 0])
    dy = torch.empty(M, 2 * inner)
    found = swiglu_backward(
        "triton",
        o["dh"],
        o["y"],
        o["p"],
        routing(),
        dy,
        o["s"] if with_r else None,
        o["ds"] if with_q else None,
    )
    assert_near(dy, want[0])
    assert_near(found.dp_M, want[1])
    # A kernel without an adapter must not give its gradient, not even zeros.
    for got, expected, wanted in ((found.da_EQI, want[2], with_q), (found.db_EJR, want[3], with_r)):
        assert (got is not None) == wanted
        if wanted:
            assert_near(got, expected)


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("rows", [1, 10, 1000], ids="blocks of {} rows".format)
def test_the_loop_s_gradients_however_experts_are_taken_together(rows, monkeypatch):
    """In blocks of experts that hold so many rows or end with the first to reach them; against
    autograd in float64."""
    inner = WIDTHS[0]
    monkeypatch.setattr(backward_module, "LOOP_ELEMENTS", rows * inner)
    o = operands(torch.float64)
    o["p"] = o["p"].double()
    y = o["y"].clone().requires_grad_()
    p = o["p"].clone().requires_grad_()
    h = module.swiglu_ref(y, p)
    dy_want, dp_want = torch.autograd.grad(h, (y, p), o["dh"])
    dy = torch.empty(M, 2 * inner, dtype=torch.float64)
    dh = o["dh"].clone()
    found = swiglu_backward("loop", dh, o["y"], o["p"], routing(), dy, o["s"], o["ds"])
    assert torch.equal(dh, o["dh"]), "an operand is left as it was"
    torch.testing.assert_close(dy, dy_want)
    torch.testing.assert_close(found.dp_M, dp_want)
    assert found.da_EQI is not None and found.db_EJR is not None
    for e, i, j in routing().spans():
        # dA = dS^T h and dB = dY^T S over the rows i to j of expert e
        torch.testing.assert_close(found.da_EQI[e], o["ds"][i:j].T @ h[i:j].detach())
        torch.testing.assert_close(found.db_EJR[e], dy_want[i:j].T @ o["s"][i:j])


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    """In the 2-norm: 129 additions and ten operations in float32."""
    assert (got.double() - want).norm() <= 139 * 2.0**-24 * want.norm()


def test_sums_of_chunks_are_kept_in_float32(short_chunks):
    """1 + 2^-12 in one chunk and -1 in the next: float16 would round the first to 1. silu(32) is
    32, so h is 1 everywhere."""
    y = torch.tensor([32.0, 1 / 32]).expand(40, 2).contiguous().half()
    signal = torch.zeros(40, 1, dtype=torch.float16)
    signal[0] = 1
    signal[1] = 2.0**-12
    signal[32] = -1
    routing = Routing(torch.tensor([40], dtype=torch.int32), 40)
    dy = torch.empty(40, 2).half()
    dh = torch.full((40, 1), 1 / 32).half()  # makes dup = dh silu(gate) = 1
    found = swiglu_backward("triton", dh, y, torch.ones(40), routing, dy, signal, signal)
    assert found.da_EQI.item() == 2.0**-12 and found.db_EJR[0, 1].item() == 2.0**-12


# of 200: to inf, and 1 / (1 + inf) is right
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_gates_neither_overflow_nor_lose_the_other_factor():
    """silu(g) is g from 20 on and 0 below -100; sigmoid must not become inf / inf on the way."""
    gates = torch.tensor([[200.0], [20.0], [-200.0], [0.0]])
    y = torch.cat([gates, torch.full((4, 1), 2.0)], 1)
    p = torch.full((4,), 0.5)
    ends = torch.tensor([4]).int()
    for way in WAYS:
        h = torch.empty(4, 1)
        dy = torch.empty(4, 2)
        getattr(module, f"swiglu_{way}")(y, p, None, Routing(ends, 4), h, None)
        found = swiglu_backward(way, torch.ones(4, 1), y, p, Routing(ends, 4), dy, None, None)
        # h = silu(g) x 2 x 0.5 = silu(g). d gate = 2 x 0.5 x silu'(g), which is 1, 1, 0 and 1/2;
        # d up = 0.5 silu(g); dp = 2 silu(g).
        torch.testing.assert_close(h[:, 0], torch.tensor([200.0, 20.0, 0.0, 0.0]))
        torch.testing.assert_close(
            dy,
            torch.tensor([[1.0, 100.0], [1.0, 10.0], [0.0, 0.0], [0.5, 0.0]]),
            rtol=1e-6,
            atol=1e-6,
        )
        torch.testing.assert_close(found.dp_M, torch.tensor([400.0, 40.0, 0.0, 0.0]))
