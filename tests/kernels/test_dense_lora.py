"""Compare dense_lora and add_low_rank with the formulas of their gradients, in float64."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megalora_kernels import add_low_rank, dense_lora
from megalora_kernels.dense_lora import dense_lora_ref

from tests.kernels.measure import Recorder, kept_bytes
from tests.kernels.oracle import ULP, Tensors, assert_close

B = 2
S = 5
K = 24
N = 40
R = 3


def operands(
    dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (B, S)
) -> tuple[torch.Tensor, ...]:
    """x, w, a, b, dy."""
    g = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=g, dtype=torch.float64).to(dtype)

    x = normal(*shape, K)
    w = normal(N, K)
    a = normal(R, K)
    b = normal(N, R)
    dy = normal(*shape, N)
    return x.requires_grad_(), w, a.requires_grad_(), b.requires_grad_(), dy


def formulas(x: Any, w: Any, a: Any, b: Any, dy: Any) -> Tensors:
    """y and the gradients of x, a and b, in float64, by way of the merged weight W + B A."""
    x, w, a, b, dy = [t.detach().double() for t in (x, w, a, b, dy)]
    merged = w + b @ a
    # all dimensions in front are one batch for the gradients of a and b
    flat_x = x.reshape(-1, K)
    flat_dy = dy.reshape(-1, N)
    dw = flat_dy.T @ flat_x  # of the merged weight
    return {"y": x @ merged.T, "x": dy @ merged, "a": b.T @ dw, "b": dw @ a.T}


def run(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dy: torch.Tensor,
    *,
    function: Callable[..., torch.Tensor] = dense_lora,
) -> Tensors:
    """y and the gradients of x, a and b."""
    y = function(x, w, a, b)
    return {"y": y.detach(), **dict(zip("xab", torch.autograd.grad(y, (x, a, b), dy), strict=True))}


@pytest.mark.usefixtures("uninitialised_is_nan")
# A batch of sequences, tokens alone, a single token without any dimension in front, and no token.
@pytest.mark.parametrize("shape", [(B, S), (7,), (), (0,)], ids=str)
@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_values_and_gradients(dtype, shape):
    given = operands(dtype, shape)
    assert_close(run(*given), formulas(*given), dtype)


def test_the_reference_is_the_same_function():
    given = operands(torch.float64)
    found = run(*given, function=dense_lora_ref)
    assert_close(found, formulas(*given), torch.float64)


def test_any_strides():
    x, w, a, b, dy = operands()
    views = []
    for t in (x, w, a, b):
        # Column after column in memory; the weight stays frozen.
        view = t.detach().transpose(0, 1).contiguous().transpose(0, 1)
        views.append(view.requires_grad_(t is not w))
    # A gradient of stride zero, as sum() gives it.
    ones = torch.ones(()).expand(dy.shape)
    assert_close(run(*views, ones), formulas(x, w, a, b, ones), torch.float32)


def test_gradcheck():
    x, w, a, b, _ = operands(torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, a, b: dense_lora(x, w, a, b), (x, a, b), fast_mode=True
    )


@pytest.mark.parametrize("wanted", ["x", "a", "b", "xa", "ab"])
def test_only_the_gradients_that_are_wanted_and_only_what_they_need_kept(wanted):
    x, w, a, b, dy = operands()
    everything = run(x, w, a, b, dy)
    t = {}
    for name, leaf in zip("xab", (x, a, b), strict=True):
        t[name] = leaf.detach().requires_grad_(name in wanted)
    # dA needs x [B, S, K], dB needs A x [B, S, R], dx needs the weights alone.
    kept = kept_bytes(lambda: dense_lora(t["x"], w, t["a"], t["b"]), (w, t["a"], t["b"]))
    assert kept == 4 * B * S * (K * ("a" in wanted) + R * ("b" in wanted))
    dense_lora(t["x"], w, t["a"], t["b"]).backward(dy)
    for name, leaf in t.items():
        assert torch.equal(leaf.grad, everything[name]) if name in wanted else leaf.grad is None


def test_no_temporary_as_wide_as_the_output():
    x, w, a, b, dy = operands()
    with Recorder(x, w, a, b) as forward:
        y = dense_lora(x, w, a, b)
    # K < N: the output alone, four bytes an element, and in backward dx alone.
    assert forward.at_least(B * S * K) == [B * S * N * 4]
    with Recorder(x, w, a, b, dy) as backward:
        torch.autograd.grad(y, (x, a, b), dy)
    assert backward.at_least(B * S * K) == [B * S * K * 4]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "features": (
        dict(x=torch.zeros(7, 23)),
        (
            "want x [..., K], weight [N, K], a [R, K], b [N, R]; got (7, 23), (40, 24), (3, 24),"
            " (40, 3)"
        ),
    ),
    "a": (dict(a=torch.zeros(R, 25)), "(3, 25), (40, 3)"),
    "b": (dict(b=torch.zeros(N, 4)), "(3, 24), (40, 4)"),
    "dtype": (
        dict(a=torch.zeros(R, K).half()),
        "a is torch.float16 on cpu but x is torch.float32 on cpu",
    ),
    "device": (
        dict(weight=torch.zeros(N, K, device="meta")),
        "weight is torch.float32 on meta but x is",
    ),
    "trainable": (
        dict(weight=torch.zeros(N, K, requires_grad=True)),
        "weight is frozen, but weight.requires_grad is True",
    ),
}


@pytest.mark.parametrize("changed, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named_with_their_values(changed, message):
    x, weight, a, b, _ = operands()
    with pytest.raises(ValueError, match=re.escape(message)):
        dense_lora(*{**dict(x=x, weight=weight, a=a, b=b), **changed}.values())


# ---- the part behind h alone -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_add_low_rank(dtype):
    def composed(
        x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        return add_low_rank(F.linear(x, w), F.linear(x, a), b)

    given = operands(dtype)
    assert_close(run(*given, function=composed), formulas(*given), dtype)


def test_add_low_rank_writes_into_the_base():
    x, w, a, b, _ = operands()
    base = F.linear(x.detach(), w)
    before = base.clone()
    address = base.data_ptr()
    y = add_low_rank(base, F.linear(x, a), b)
    assert y.data_ptr() == address and y.requires_grad and not torch.equal(base, before)


def test_add_low_rank_gradcheck_twice():
    """Its backward is made of differentiable steps."""
    # ``base * 1`` below: it writes into base, and a leaf may not be written to.
    _, _, _, b, dy = operands(torch.float64)
    h = torch.randn(B, S, R, dtype=torch.float64).requires_grad_()
    base = torch.randn_like(dy).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda base, h, b: add_low_rank(base * 1, h, b), (base, h, b), fast_mode=True
    )
    assert torch.autograd.gradgradcheck(
        lambda base, h, b: add_low_rank(base * 1, h, b), (base, h, b), fast_mode=True
    )
