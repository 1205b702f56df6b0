"""Compare the kernels on a CUDA device with the same function in float64 there. Needs only torch,
triton and pytest:

    PYTHONPATH=kernels:. python -m pytest --noconftest -p no:cacheprovider \\
        tests/gpu/test_kernels_on_gpu.py
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from megalora_kernels import (
    Arrivals,
    AugmentedWeight,
    dense_lora,
    expert_mlp,
    grouped_lora,
    lora_wgrad,
    permute_shrink,
    regroup_values,
    route_to_ranks,
    route_values,
)

from tests.gpu.kernel_problem import (
    ALLOWED,
    DEVICE,
    PROBLEMS,
    WAYS,
    Tensors,
    assert_close,
    assert_equal,
    assert_idle_are_zero,
    even,
    odd,
    problem,
    sorted_rows,
    top_k,
)
from tests.gpu.marks import NEEDS_CUDA

pytestmark = NEEDS_CUDA


@pytest.fixture(autouse=True)
def no_backend_from_the_environment(monkeypatch):
    monkeypatch.delenv("MEGALORA_BACKEND", raising=False)


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("shape", PROBLEMS)
def test_experts_agree_with_float64(shape, dtype):
    case = PROBLEMS[shape](dtype)
    want = case.in_float64()
    # None: what a user gets who names no back end.
    for way in (*WAYS, None):
        found = case.in_way(way)
        assert_close(found, want, dtype)
        assert_idle_are_zero(found, case.routing)


def test_the_base_alone_and_rows_that_come_sorted():
    # Tiles have 64 or 128 rows: 65 and 130 need one more for one or two rows.
    case = problem(sorted_rows([130, 0, 63, 65]), 258, torch.bfloat16, H=136, inner=64, ranks={})
    want = case.in_float64()
    for way in WAYS:
        assert_close(case.in_way(way), want, torch.bfloat16)


# Ragged everywhere, with idle experts and an odd rank; then whole tiles and many rows.
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize(
    ("counts", "rank", "N", "K"), [([65, 0, 129, 1, 0], 3, 200, 136), ([900, 1100], 16, 128, 256)]
)
def test_linear_agrees_with_float64(counts, rank, N, K, dtype):
    g = torch.Generator(DEVICE).manual_seed(0)
    E = len(counts)
    M = sum(counts)

    def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=DEVICE).mul_(size).to(dtype)

    without_x_lora = {
        "x": normal(M, K),
        "a": normal(E, rank, K, size=K**-0.5),
        "b": normal(E, N, rank, size=rank**-0.5),
    }
    # What A reads may differ from what the base reads, as under dropout.
    leaves = {**without_x_lora, "x_lora": normal(M, K)}
    w = normal(E, N, K, size=K**-0.5)
    dy = normal(M, N)
    routing = sorted_rows(counts)

    def results(backend: str | None, weight: Any, operands: Tensors, dout: torch.Tensor) -> Tensors:
        v = {name: t.detach().requires_grad_() for name, t in operands.items()}
        y = grouped_lora(
            v["x"], weight, routing.offsets_E, v["a"], v["b"], x_lora_MK=v.get("x_lora"),
            backend=backend
        )  # fmt: skip
        grads = torch.autograd.grad(y, list(v.values()), dout)
        return {"out": y.detach(), **dict(zip(v, grads, strict=True))}

    for operands in (leaves, without_x_lora):
        wide = {name: t.double() for name, t in operands.items()}
        want = results("reference", w.double(), wide, dy.double())
        for way in WAYS:
            weight = AugmentedWeight(w, rank) if way == "joined" else w
            backend = "grouped_mm" if way == "joined" else way
            found = results(backend, weight, operands, dy)
            assert_close(found, want, dtype)
            assert_idle_are_zero(found, routing)


@pytest.mark.parametrize("way", [*WAYS, None])
def test_no_rows_at_all(way):
    # A rank to which nobody sends a token; CUDA refuses a grid of zero programs.
    case = problem(
        sorted_rows([0, 0, 0]),
        0,
        torch.bfloat16,
        H=64,
        inner=32,
        ranks={"gate": 3, "up": 3, "down": 5},
    )
    found = case.in_way(way)
    assert (
        found["out"].shape == (0, 64) and found["x"].shape == (0, 64) and found["p"].shape == (0,)
    )
    assert_idle_are_zero(found, case.routing)


@pytest.mark.parametrize("way", WAYS)
def test_strides_that_are_not_dense(way):
    """x transposed, factors as slices of larger tensors, and the gradient of a sum, which has
    stride 0."""
    case = odd(torch.bfloat16)
    leaves = {}
    for name, t in case.leaves.items():
        t = t.detach()
        if name == "x":
            t = t.t().contiguous().t()
        elif name != "p":
            # The first half of each row of a tensor twice as wide.
            t = torch.cat([t, t], -1)[..., : t.shape[-1]]
        leaves[name] = t.detach().requires_grad_()
    ones = torch.ones(1, 1, device=DEVICE, dtype=torch.bfloat16).expand(case.dout.shape)
    strided = replace(case, leaves=leaves, dout=ones)
    assert not strided.leaves["x"].is_contiguous() and not strided.leaves["a1"].is_contiguous()
    assert_close(strided.in_way(way), strided.in_float64(), torch.bfloat16)


def test_a_rank_that_does_not_fit_triton():
    # Gate and up stacked are 144, down is 136; the kernels take 128.
    ranks = {"gate": 72, "up": 72, "down": 136}
    case = problem(top_k(300, 4, 2), 300, torch.bfloat16, H=128, inner=64, ranks=ranks)
    with pytest.raises(ValueError, match="exceeds 128"):
        case.in_way("triton")
    assert_close(case.in_way(None), case.in_float64(), torch.bfloat16)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", PROBLEMS)
def test_the_same_bits_on_every_run(shape, way):
    case = PROBLEMS[shape](torch.bfloat16)
    one = case.in_way(way)
    # Atomic additions would come in another order from run to run.
    for _ in range(3):
        assert_equal(case.in_way(way), one)


@pytest.mark.parametrize("way", WAYS)
def test_recomputed_gradients_are_the_kept_ones(way):
    case = odd(torch.bfloat16)
    kept = case.in_way(way)
    assert_equal(case.in_way(way, recompute=True), kept)
    # With dropout the masks, too, must be drawn again as they were.
    dropped = []
    for how in ({}, {"recompute": True}):
        torch.manual_seed(1)
        dropped.append(case.in_way(way, dropout=0.5, **how))
    assert_equal(*dropped)
    # Else nothing was dropped, and the comparison above shows nothing.
    assert not torch.equal(dropped[0]["out"], kept["out"])


@pytest.mark.parametrize("way", ["grouped_mm", "joined", "triton", None])
def test_nothing_waits_for_the_device(way):
    """From the router's choice to the gradients, with the kernels compiled before."""
    case = even(torch.bfloat16)
    counts = torch.tensor([[700, 200, 300], [100, 0, 1000]], device=DEVICE)
    chosen_TE = torch.zeros(2300, 3, dtype=torch.bool, device=DEVICE)
    chosen_TE[:, :2] = True
    probs_TE = torch.rand(2300, 3, device=DEVICE, requires_grad=True)

    def everything() -> None:
        routing, probs_M = route_values(chosen_TE, probs_TE, 2)
        probs_M.sum().backward()
        replace(case, routing=routing).in_way(way)
        route_to_ranks(chosen_TE, probs_TE, 2, 3)
        arrived, _ = regroup_values(Arrivals.single(counts, 2300), probs_M.detach()[:2300])
        x = case.leaves["x"]
        p = case.leaves["p"][:2300]
        w1 = AugmentedWeight(case.w1, case.rank1()) if way == "joined" else case.w1
        w2 = AugmentedWeight(case.w2, 16) if way == "joined" else case.w2
        backend = "grouped_mm" if way == "joined" else way
        expert_mlp(x, w1, w2, p, arrived, **case.adapters(), backend=backend).backward(case.dout)

    # The first call compiles kernels, which waits. From then on torch raises at any wait.
    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("way", ["joined", "triton"])
def test_what_is_kept_for_backward(way):
    """[gate | up], S of gate_up and of down: nothing as wide as H for each row."""
    case = even(torch.bfloat16)
    w1 = case.w1
    w2 = case.w2
    backend = way
    if way == "joined":
        w1 = AugmentedWeight(w1, 32)
        w2 = AugmentedWeight(w2, 16)
        backend = "grouped_mm"

    v = case.leaves
    kept = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = expert_mlp(v["x"], w1, w2, v["p"], case.routing, **case.adapters(), backend=backend)
    # Inputs and the routing are in memory anyway.
    routed = (case.routing.offsets_E, case.routing.source_M, case.routing.slots_TK)
    for t in (*v.values(), case.w1, case.w2, *routed):
        kept.pop(t.untyped_storage().data_ptr(), None)
    # Per row: [gate | up] of 2 x 128, S of gate and up of 32 ranks, S of down of 16.
    assert sum(kept.values()) == case.routing.num_rows * (2 * 128 + 32 + 16) * out.element_size()


def test_steps_that_stand_alone():
    """``permute_shrink``, ``lora_wgrad`` and ``dense_lora``."""
    case = odd(torch.bfloat16)
    dtype = torch.bfloat16
    x = case.leaves["x"].detach()
    a = case.leaves["a1"].detach()

    def permuted(x: torch.Tensor, a: torch.Tensor, backend: str | None) -> Tensors:
        x = x.clone().requires_grad_()
        a = a.clone().requires_grad_()
        rows, s = permute_shrink(x, a, case.routing, backend=backend)
        dx, da = torch.autograd.grad([rows, s], [x, a], [rows.detach(), s.detach()])
        return {"rows": rows.detach(), "s": s.detach(), "dx": dx, "da": da}

    want = permuted(x.double(), a.double(), "reference")
    assert_close(permuted(x, a, None), want, dtype)
    # The next step gets exact operands, rounded once: errors of one step do not add to another's.
    s = want["s"].to(dtype)
    rows = want["rows"].to(dtype)
    ends = case.routing.offsets_E
    exact = {"out": lora_wgrad(s.double(), rows.double(), ends, backend="reference")}
    for backend in ("triton", "loop"):
        assert_close({"out": lora_wgrad(s, rows, ends, backend=backend)}, exact, dtype)
    # One expert as a dense linear: w1 [2 inner, H] and a B of as many rows, for 3 + 5 ranks.
    w = case.w1[0]
    b = torch.cat([case.leaves["gate"][0], case.leaves["up"][0]], 1).detach().repeat(2, 1)
    out = dense_lora(x, w, a[0], b)
    want_out = dense_lora(x.double(), w.double(), a[0].double(), b.double())
    assert_close({"out": out}, {"out": want_out}, dtype)
