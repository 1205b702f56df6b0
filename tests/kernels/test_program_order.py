"""Check that results have the same bits whenever and in whatever order programs run: nothing is
written by two of them or added by atomics.

The interpreter runs programs one after the other, so a race between two of them looks like the
right answer; running them from the last to the first tells (``test_interpreter.py`` has a kernel
where it does).
"""

from collections.abc import Callable

import pytest
import torch
from megalora_kernels import lora_wgrad, permute_shrink

from tests.kernels import interpreter
from tests.kernels.conftest import combine
from tests.kernels.linear import make, run
from tests.kernels.oracle import IDLE, Experts, sorted_rows, top_k

# Chunks have 32 rows under ``short_chunks``: experts have three, one or two of them, or no row.
COUNTS = [0, 70, 3, 0, 33]
OFFSETS = torch.tensor(COUNTS).cumsum(0).int()
Call = Callable[[], tuple[torch.Tensor, ...]]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def linear() -> tuple[torch.Tensor, ...]:
    return run("triton", *make(COUNTS, 5, k=72, n=136))


def experts() -> tuple[torch.Tensor, ...]:
    return tuple(sorted_rows([0, 40, 3, 0, 33], H=72, inner=136).run(backend="triton").values())


def one_expert_for_all() -> Experts:
    """40 tokens: all go to expert 3, which has two chunks, and to one of the others in turn."""
    chosen = [[t % 3, 3] for t in range(40)]
    return top_k(chosen, 4, 2)


def gathered() -> tuple[torch.Tensor, ...]:
    return tuple(one_expert_for_all().run(backend="triton").values())


def between_grouped_mm() -> tuple[torch.Tensor, ...]:
    return tuple(one_expert_for_all().run(backend="joined").values())


def wgrad() -> tuple[torch.Tensor, ...]:
    return (lora_wgrad(normal(106, 7), normal(106, 136), OFFSETS, backend="triton"),)


def shrunk() -> tuple[torch.Tensor, ...]:
    case = IDLE["gathered"]()
    x = case.leaves["x"]
    a = case.leaves["a1"]
    rows, s = permute_shrink(x, a, case.routing, backend="triton")
    return rows, s, *torch.autograd.grad((rows, s), (x, a), (normal(*rows.shape), normal(*s.shape)))


def combined() -> tuple[torch.Tensor, ...]:
    slots = torch.randperm(34, generator=torch.Generator().manual_seed(0)).int().view(17, 2)
    return (combine.combine_triton(normal(34, 1100), slots),)  # two blocks of columns


@pytest.mark.parametrize(
    "call",
    [linear, experts, gathered, between_grouped_mm, wgrad, shrunk, combined],
    ids=lambda f: f.__name__,
)
def test_neither_another_run_nor_the_reversed_order_changes_a_bit(
    call: Call, short_chunks, grouped_mm_between_triton, uninitialised_is_nan, monkeypatch
):
    first = call()
    again = call()
    interpreter.reverse_programs(monkeypatch)
    backwards = call()
    for a, b, c in zip(first, again, backwards, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
        # NaN is what nobody wrote; zeros would be equal in every order.
        assert a.isfinite().all() and torch.count_nonzero(a) > 0


@pytest.mark.parametrize("backend", ["loop", "grouped_mm", "joined"])
def test_back_ends_in_torch_give_the_same_bits_twice(backend):
    case = IDLE["received"]()
    first = case.run(backend=backend)
    again = case.run(backend=backend)
    for name, t in first.items():
        assert torch.equal(t, again[name]), name


def test_an_experts_gradient_does_not_depend_on_the_rows_of_others(short_chunks):
    """Chunks never cross experts: expert 1's dA has the same bits whoever comes before it."""
    g = normal(100, 7)
    x = normal(100, 40)
    # The 70 rows from 30 on are three chunks in both calls, of which none begins before row 30.
    alone = lora_wgrad(g[30:], x[30:], torch.tensor([0, 70], dtype=torch.int32), backend="triton")
    behind = lora_wgrad(g, x, torch.tensor([30, 100], dtype=torch.int32), backend="triton")
    assert torch.equal(alone[1], behind[1])
