"""Check offsets beyond 2^31 elements, as E K N of a large model has them. Operands are few values,
far apart in memory that is hardly touched."""

import pytest
import torch
from megalora_kernels import (
    Routing,
    join_blocks_triton,
    read_logits_triton,
    softmax_gradient_triton,
)
from triton.runtime.interpreter import GridExecutor

from tests.kernels.conftest import combine, gemm_kernel, shrink, swiglu
from tests.kernels.linear import make
from tests.kernels.passes import swiglu_backward, wgrad

FAR = 2**30
"""Elements between neighbours: the third lies at 2^31, one more than int32 holds."""


@pytest.fixture(autouse=True)
def nothing_is_copied_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter writes results back to the device's memory; here that is the same memory, 4
    GB of it."""
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)


@pytest.fixture(scope="module")
def vast() -> torch.Tensor:
    """8.6 GB of addresses; a page is memory only once it is written. Operands start in the middle,
    so that an offset which wraps round to -2^31 reads zeros and does not crash."""
    return torch.empty(4 * FAR + 4096, dtype=torch.float16)


def far(t: torch.Tensor, vast: torch.Tensor) -> torch.Tensor:
    """The same values with 2^30 elements from one to the next along the first dimension."""
    return vast.as_strided(t.shape, (FAR, *t.stride()[1:]), 2 * FAR).copy_(t)


COUNTS = [2, 0, 1]


@pytest.mark.parametrize("name", ["x", "w", "a", "b", "g", "y"])
def test_third_expert_or_row_lies_beyond_int32(vast, name, small_tiles):
    # Three rows for three experts: the third of either lies beyond 2^31.
    x, w, offsets, a, b, dy = [t.detach() for t in make(COUNTS, 3, torch.float16)]
    routing = Routing(offsets, 3)

    def results(operand: torch.Tensor) -> list[torch.Tensor]:
        o = {"x": x, "w": w, "a": a, "b": b, "g": dy, "y": dy, name: operand}
        s = x.new_empty(3, 3)
        # Every kernel that reads the operand: each computes its offsets for itself.
        if name in ("x", "a"):
            shrink.shrink_triton(o["x"], (o["a"],), routing, s)
            return [
                s,
                gemm_kernel.grouped_gemm_triton(o["x"], w.transpose(1, 2), routing),
                wgrad("triton", s, o["x"], routing),
            ]
        if name in ("w", "b"):
            s = x[:, :3].contiguous()
            b_ERN = o["b"].transpose(1, 2)
            return [
                gemm_kernel.grouped_gemm_triton(x, o["w"].transpose(1, 2), routing, s, (b_ERN,))
            ]
        if name == "g":
            return [wgrad("triton", o["g"], x, routing)]
        return [combine.combine_triton(o["y"], torch.tensor([[2, 0], [1, 2]], dtype=torch.int32))]

    near = {"x": x, "w": w, "a": a, "b": b, "g": dy, "y": dy}[name]
    for got, want in zip(results(far(near, vast)), results(near), strict=True):
        assert torch.equal(got, want) and got.isfinite().all()


@pytest.mark.parametrize("name", ["y", "a", "dh", "s", "ds"])
def test_swiglu(vast, name):
    """gate and up, A of down, the gradient of h, S of gate and up, dS of down."""
    g = torch.Generator().manual_seed(0)
    shapes = {"y": (3, 80), "a": (3, 7, 40), "dh": (3, 40), "s": (3, 5), "ds": (3, 7)}
    o = {}
    for key, shape in shapes.items():
        o[key] = torch.randn(*shape, generator=g).half()
    # One row for the first expert and two for the third.
    routing = Routing(torch.tensor([1, 1, 3], dtype=torch.int32), 3)
    p = torch.rand(3, generator=g)

    def results(o: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        # 3 rows; 40 features of h, 7 ranks of down, [gate | up] of 80
        h = torch.zeros(3, 40, dtype=torch.float16)
        s2 = torch.zeros(3, 7, dtype=torch.float16)
        dy = torch.zeros(3, 80, dtype=torch.float16)
        swiglu.swiglu_triton(o["y"], p, o["a"], routing, h, s2)
        found = swiglu_backward("triton", o["dh"], o["y"], p, routing, dy, o["s"], o["ds"])
        return [h, s2, dy, found.dp_M, found.da_EQI, found.db_EJR]

    for got, want in zip(results({**o, name: far(o[name], vast)}), results(o), strict=True):
        assert torch.equal(got, want) and got.isfinite().all()


def test_logits(vast):
    """The third row of what a loss reads and overwrites."""
    g = torch.Generator().manual_seed(0)
    near = torch.randn(3, 80, generator=g).half()
    targets = torch.tensor([3, 0, 79])

    def results(logits: torch.Tensor) -> list[torch.Tensor]:
        rows = join_blocks_triton(read_logits_triton(logits, targets, 0, True), 80)
        softmax_gradient_triton(logits, targets, 0, rows[3], rows[4])
        return [rows, logits]

    for got, want in zip(results(far(near, vast)), results(near), strict=True):
        assert torch.equal(got, want) and got.isfinite().all()
