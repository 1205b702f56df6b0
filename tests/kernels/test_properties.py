"""expert_mlp on shapes and routings that hypothesis draws, against float64 arithmetic row by
row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.oracle import (
    RANKS,
    Experts,
    assert_close,
    received,
    row_by_row,
    sorted_rows,
    top_k,
)

SIZES = st.sampled_from(
    [4, 8, 12, 20, 68]
)  # rows of 16 bytes in float32, as grouped_mm wants them; 68 crosses a tile of 64
ADAPTED = st.sets(st.sampled_from(list(RANKS))).map(
    lambda names: tuple(name for name in RANKS if name in names)
)


@st.composite
def experts(draw: st.DrawFn) -> Experts:
    num_experts = draw(st.integers(1, 5))
    how = {
        "H": draw(SIZES),
        "inner": draw(SIZES),
        "adapted": draw(ADAPTED),
        "seed": draw(st.integers(0, 99)),
    }
    counts = st.lists(st.integers(0, 7), min_size=num_experts, max_size=num_experts)
    way = draw(st.sampled_from(["sorted", "gathered", "received"]))
    if way == "sorted":
        return sorted_rows(draw(counts), **how)
    if way == "received":
        return received(draw(st.lists(counts, min_size=1, max_size=3)), **how)
    k = draw(st.integers(1, min(3, num_experts)))
    chosen = [
        sorted(draw(st.permutations(range(num_experts)))[:k])
        for _ in range(draw(st.integers(0, 9)))
    ]
    return top_k(chosen, num_experts, k, **how)


@pytest.mark.parametrize("arm", ["loop", "grouped_mm", "joined", "triton"])
@given(case=experts(), recompute=st.booleans())
def test_any_shape_and_routing(arm, case, recompute):
    assert_close(case.run(backend=arm, recompute=recompute), row_by_row(case), torch.float32)
