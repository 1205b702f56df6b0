"""Run the kernels on tensors of more than 2^31 elements, the largest index of an int32. Needs a GPU
with 32 to 40 GiB of free memory:

    PYTHONPATH=kernels:. python -m pytest --noconftest -p no:cacheprovider \\
        tests/gpu/test_big_offsets_on_gpu.py
"""

from dataclasses import replace

import pytest
import torch

from tests.gpu.kernel_problem import Problem, assert_close, problem, sorted_rows
from tests.gpu.marks import NEEDS_CUDA

pytestmark = NEEDS_CUDA
GIB = 2**30


@pytest.fixture(autouse=True)
def no_backend_from_the_environment(monkeypatch):
    monkeypatch.delenv("MEGALORA_BACKEND", raising=False)


def need(gigabytes: float) -> None:
    # What torch keeps for reuse counts as taken otherwise.
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes * GIB:
        pytest.skip(f"needs {gigabytes:.0f} GiB of free GPU memory, {free / GIB:.0f} are")


def only(case: Problem, experts: slice, counts: list[int], rows: slice) -> Problem:
    """The same for some experts and the rows that go to them; rows are sorted."""
    leaves = {}
    for name, t in case.leaves.items():
        part = t[rows] if name in ("x", "p") else t[experts]
        leaves[name] = part.detach().clone().requires_grad_()
    w1 = case.w1[experts]
    w2 = case.w2[experts]
    return replace(
        case, routing=sorted_rows(counts), w1=w1, w2=w2, leaves=leaves, dout=case.dout[rows]
    )


@pytest.mark.parametrize("way", ["grouped_mm", "joined", "triton"])
def test_weights_of_more_than_int32_elements(way):
    """64 x 8192 x 4224 = 2.2e9: experts from the 62nd on lie beyond 2^31."""
    # Weights of 64 experts: 4.4 GB for w1 and half of that for w2; on the way, joined and float64
    # copies.
    need(32)
    ranks = {"gate": 4, "up": 4, "down": 8}
    # Rows only for the first and the last of the 64 experts: little to compute.
    case = problem(
        sorted_rows([40] + [0] * 62 + [73]), 113, torch.bfloat16, H=4224, inner=4096, ranks=ranks
    )
    assert case.w1.numel() > 2**31
    found = case.in_way(way)
    # The last expert and its 73 rows alone: float64 of all would not fit.
    last = slice(63, 64)
    for name, t in found.items():
        found[name] = t[40:] if name in ("out", "x", "p") else t[last]
    assert_close(found, only(case, last, [73], slice(40, None)).in_float64(), torch.bfloat16)


@pytest.mark.parametrize("way", ["grouped_mm", "joined", "triton"])
def test_rows_of_more_than_int32_elements(way):
    """[gate | up] of 2^18 + 64 rows of 8,192: the last rows lie beyond 2^31."""
    need(40)
    num_rows = 2**18 + 64
    ranks = {"gate": 8, "up": 8, "down": 8}
    case = problem(
        sorted_rows([1000, num_rows - 1000]),
        num_rows,
        torch.bfloat16,
        H=64,
        inner=4096,
        ranks=ranks,
    )
    found = case.in_way(way)
    last = slice(-64, None)
    want = only(case, slice(0, 2), [0, 64], last).in_float64()
    # Only what belongs to rows is compared; gradients of factors are sums over all rows.
    for name in ("out", "x", "p"):
        assert_close({name: found[name][last]}, {name: want[name]}, torch.bfloat16)
    for name, t in found.items():
        assert t.isfinite().all(), name
