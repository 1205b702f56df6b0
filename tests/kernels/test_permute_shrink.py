"""Compare permute_shrink with rows copied and multiplied one by one in float64."""

import re
from typing import Any

import pytest
import torch
from megalora_kernels import Routing, permute_shrink

from tests.kernels.measure import kept_bytes, no_reads_on_the_host
from tests.kernels.oracle import IDLE, Experts, Tensors, assert_close, with_dtypes

BACKENDS = ("reference", "loop", "triton")


def upstream(case: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of rows and of s."""
    g = torch.Generator().manual_seed(9)
    dtype = case.dout.dtype
    num_rows = len(case.rows)
    # H = 24 features; 8 is the stacked rank of gate (3) and up (5)
    drows = torch.randn(num_rows, 24, generator=g, dtype=torch.float64)
    ds = torch.randn(num_rows, 8, generator=g, dtype=torch.float64)
    return drows.to(dtype), ds.to(dtype)


def row_by_row(case: Experts, drows: torch.Tensor, ds: torch.Tensor) -> Tensors:
    x = case.leaves["x"].detach().double()
    a = case.leaves["a1"].detach().double()
    drows = drows.double()
    ds = ds.double()
    rows = torch.stack([x[t] for _, t in case.rows])
    s = torch.stack([a[e] @ x[t] for e, t in case.rows])
    dx = torch.zeros_like(x)
    da = torch.zeros_like(a)
    for m, (e, t) in enumerate(case.rows):
        # The copied row and S = A x both lead back to the token.
        dx[t] += drows[m] + ds[m] @ a[e]
        da[e] += torch.outer(ds[m], x[t])
    return {"rows": rows, "s": s, "x": dx, "a1": da}


def run(case: Experts, backend: str | None, drows: torch.Tensor, ds: torch.Tensor) -> Tensors:
    x = case.leaves["x"]
    a = case.leaves["a1"]
    rows, s = permute_shrink(x, a, case.routing, backend=backend)
    dx, da = torch.autograd.grad((rows, s), (x, a), (drows, ds))
    return {"rows": rows.detach(), "s": s.detach(), "x": dx, "a1": da}


@pytest.mark.usefixtures("uninitialised_is_nan", "small_tiles")
@pytest.mark.parametrize("way", ["gathered", "received"])
@pytest.mark.parametrize("backend, dtype", with_dtypes(BACKENDS), ids=str)
def test_values_and_gradients(backend, dtype, way):
    case = IDLE[way](dtype=dtype, adapted=("gate", "up"))
    grads = upstream(case)
    actual = run(case, backend, *grads)
    assert_close(actual, row_by_row(case, *grads), dtype)
    assert torch.equal(actual["rows"].double(), row_by_row(case, *grads)["rows"])  # a copy


@pytest.mark.parametrize("backend", BACKENDS)
def test_either_result_may_go_unused_and_any_strides(backend, small_tiles):
    case = IDLE["gathered"]()
    drows, ds = upstream(case)
    # Every second element of a wider buffer, with nines between.
    beside_nines = torch.stack([case.leaves["x"].detach(), torch.full((7, 24), 9.0)], -1)
    spread = beside_nines[..., 0].requires_grad_()
    changed = Experts(**{**vars(case), "leaves": {**case.leaves, "x": spread}})
    # Only rows are used, only S, or both by ``.sum()``, whose gradient has stride zero.
    for grads in (
        (drows, 0 * ds),
        (0 * drows, ds),
        (torch.ones(()).expand(14, 24), torch.ones(()).expand(14, 8)),
    ):
        expected = row_by_row(case, *grads)
        rows, s = permute_shrink(spread, case.leaves["a1"], changed.routing, backend=backend)
        # A result whose gradient is all zeros is left out of the loss, so autograd gives None.
        outs = []
        upstreams = []
        for result, upstream_grad in zip((rows, s), grads, strict=True):
            if upstream_grad.any():
                outs.append(result)
                upstreams.append(upstream_grad)
        found = torch.autograd.grad(outs, (spread, case.leaves["a1"]), upstreams, allow_unused=True)
        for got, name in zip(found, ("x", "a1"), strict=True):
            got = torch.zeros_like(case.leaves[name]) if got is None else got
            assert_close({name: got}, {name: expected[name]}, torch.float32)


@pytest.mark.parametrize("backend", ["reference", "loop"])
def test_gradcheck(backend):
    case = IDLE["gathered"](dtype=torch.float64, H=3, inner=2)
    leaves = (case.leaves["x"], case.leaves["a1"])
    assert torch.autograd.gradcheck(
        lambda x, a: permute_shrink(x, a, case.routing, backend=backend), leaves
    )


@pytest.mark.parametrize("backend", ["loop", "triton"])
def test_x_as_given_is_all_that_is_kept(backend):
    case = IDLE["gathered"]()
    x = case.leaves["x"]
    a = case.leaves["a1"]
    r = case.routing
    given = (a, r.offsets_E, r.source_M, r.slots_TK)
    # 7 tokens of 24 features; neither the 14 rows nor S.
    assert kept_bytes(lambda: permute_shrink(x, a, r, backend=backend), given) == 7 * 24 * 4


def test_triton_reads_nothing_on_the_host(small_tiles):
    case = IDLE["gathered"]()
    grads = upstream(case)
    with no_reads_on_the_host():
        actual = run(case, "triton", *grads)
    assert_close(actual, row_by_row(case, *grads), torch.float32)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "features": (dict(x=torch.zeros(7, 23)),
                 "want x [T, K] and a [E, R, K] with E = 6; got (7, 23) and (6, 8, 24)"),
    "experts": (dict(a=torch.zeros(5, 8, 24)), "with E = 6; got (7, 24) and (5, 8, 24)"),
    "sorted already": (dict(routing=Routing(torch.zeros(6, dtype=torch.int32), 0)),
                       "routing has no source_M and slots_TK; rows are sorted already"),
    "dtype": (dict(a=torch.zeros(6, 8, 24).half()), "a is torch.float16 but x is torch.float32"),
    "device": (dict(a=torch.zeros(6, 8, 24, device="meta")), "a is on meta but x is on cpu"),
    "rank": (dict(a=torch.zeros(6, 129, 24), backend="triton"), "the stacked rank 129 exceeds 128"),
    "back end": (dict(backend="fast"), "permute_shrink: backend is 'fast', want one of"),
}  # fmt: skip


@pytest.mark.parametrize("changed, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named_with_their_values(changed, message):
    routing = IDLE["gathered"]().routing
    call = {
        **dict(x=torch.zeros(7, 24), a=torch.zeros(6, 8, 24), routing=routing, backend=None),
        **changed,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        permute_shrink(call["x"], call["a"], call["routing"], backend=call["backend"])
