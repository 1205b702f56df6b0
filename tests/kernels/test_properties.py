"""Compare expert_mlp with float64 arithmetic row by row, on shapes and routings that hypothesis
draws."""

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

# Rows of whole 16 bytes in float32, as grouped_mm wants them; 68 crosses a tile of 64.
SIZES = st.sampled_from([4, 8, 12, 20, 68])
# Any of gate, up and down, none and all among them; in their own order.
ADAPTED = st.sets(st.sampled_from(list(RANKS))).map(
    lambda names: tuple(sorted(names, key=list(RANKS).index))
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
    # Some 0 to 7 rows for each expert: below any tile, so that many experts share few rows.
    counts = st.lists(st.integers(0, 7), min_size=num_experts, max_size=num_experts)
    way = draw(st.sampled_from(["sorted", "gathered", "received"]))
    if way == "sorted":
        return sorted_rows(draw(counts), **how)
    if way == "received":
        # A row goes to one expert at least, and to none twice; a rank may send nothing.
        row = st.sets(st.integers(0, num_experts - 1), min_size=1).map(sorted)
        ranks = draw(st.lists(st.lists(row, max_size=6), min_size=1, max_size=3))
        return received(ranks, num_experts, **how)
    k = draw(st.integers(1, min(3, num_experts)))
    chosen = []
    for _ in range(draw(st.integers(0, 9))):
        # The first k of a permutation are k different experts; a token's come sorted.
        order = draw(st.permutations(range(num_experts)))
        chosen.append(sorted(order[:k]))
    return top_k(chosen, num_experts, k, **how)


@pytest.mark.parametrize("arm", ["loop", "grouped_mm", "joined", "triton"])
@given(case=experts(), recompute=st.booleans())
def test_any_shape_and_routing(arm, case, recompute):
    assert_close(case.run(backend=arm, recompute=recompute), row_by_row(case), torch.float32)
