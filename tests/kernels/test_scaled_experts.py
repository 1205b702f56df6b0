"""Compare experts whose rows are scaled, as DoRA's are, with float64 arithmetic row by row."""

from functools import cache

import pytest
import torch

from tests.kernels.oracle import (
    ARMS,
    IDLE,
    Experts,
    Tensors,
    assert_close,
    row_by_row,
    sorted_rows,
    top_k,
)

pytestmark = pytest.mark.usefixtures("uninitialised_is_nan")
BOTH = ("gain1", "gain2")
PARTS = (
    (("gate", "up", "down"), BOTH),
    (("gate", "up"), ("gain1",)),
    # One of two has a gain, or only one of gate and up an adapter.
    (("gate", "up", "down"), ("gain2",)),
    (("up", "down"), ("gain1",)),
    (("down",), ("gain2",)),
)
FUSED = ("loop", "grouped_mm", "joined", "triton")
# The interpreter takes up to a second for each of Triton's cases.
SLOW_TRITON = pytest.param("triton", marks=pytest.mark.slow)
IN_TURN = [*FUSED[:3], SLOW_TRITON]


@cache
def answer(
    way: str,
    adapted: tuple[str, ...] = PARTS[0][0],
    gains: tuple[str, ...] = BOTH,
    dtype: torch.dtype = torch.float32,
) -> tuple[Experts, Tensors]:
    p_dtype = torch.float32 if dtype.itemsize == 2 else dtype
    case = IDLE[way](adapted=adapted, gains=gains, dtype=dtype, p_dtype=p_dtype)
    return case, row_by_row(case)


CASES = []
for _way in ("sorted", "gathered"):
    for _arm in ARMS:
        for _parts in PARTS:
            is_slow = _arm == "triton" and (_way == "sorted" or _parts != PARTS[0])
            marks = pytest.mark.slow if is_slow else ()
            CASES.append(pytest.param(_arm, _way, *_parts, marks=marks))


@pytest.mark.parametrize("arm, way, adapted, gains", CASES)
def test_values_and_gradients_match_row_by_row(arm, way, adapted, gains, small_tiles):
    case, expected = answer(way, adapted, gains)
    actual = case.run(backend=arm)
    assert_close(actual, expected, torch.float32)
    idle = [0, 3, 5] if way == "gathered" else [0, 2, 5]
    for name in case.leaves.keys() - {"x", "p"}:
        assert torch.count_nonzero(actual[name][idle]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arm", ["reference", *IN_TURN])
def test_half_precision_with_gains_in_float32(arm, dtype, small_tiles):
    case, expected = answer("received", dtype=dtype)
    actual = case.run(backend=arm)
    assert_close(actual, expected, dtype)
    for name, t in actual.items():
        assert t.dtype == (torch.float32 if name in ("p", *BOTH) else dtype), name


@pytest.mark.parametrize("arm", ["reference", "loop"])
def test_float64(arm):
    case, expected = answer("received", dtype=torch.float64)
    assert_close(case.run(backend=arm), expected, torch.float64)


@pytest.mark.parametrize("arm", IN_TURN)
def test_recomputing_gate_and_up_changes_no_bit(arm, small_tiles):
    case, _ = answer("gathered")
    kept = case.run(backend=arm)
    recomputed = case.run(backend=arm, recompute=True)
    for name, t in kept.items():
        assert torch.equal(t, recomputed[name]), name


@pytest.mark.parametrize("arm", ["grouped_mm", "joined"])
def test_grouped_mm_between_triton_as_on_a_gpu(arm, grouped_mm_between_triton):
    case, expected = answer("gathered", dtype=torch.bfloat16)
    assert_close(case.run(backend=arm), expected, torch.bfloat16)


@pytest.mark.parametrize("arm", ARMS)
def test_no_rows_at_all(arm):
    for case in (sorted_rows([0, 0, 0], gains=BOTH), top_k([], 3, 2, gains=BOTH)):
        for name, t in case.run(backend=arm).items():
            assert torch.count_nonzero(t) == 0, name


@pytest.mark.slow
def test_experts_of_several_tiles_and_chunks(short_chunks):
    case = sorted_rows([0, 70, 3, 0, 33], H=72, inner=136, gains=BOTH)
    assert_close(case.run(backend="triton"), row_by_row(case), torch.float32)


@pytest.mark.parametrize("arm", ["loop", "grouped_mm", "triton"])
def test_gains_of_one_change_no_bit(arm, small_tiles):
    """A fresh DoRA is the base, to the bit."""
    plain, _ = answer("gathered", gains=())
    scaled, _ = answer("gathered")
    with torch.no_grad():
        ones = {name: torch.ones_like(t) for name, t in scaled.leaves.items() if name in BOTH}
        assert torch.equal(
            scaled.call({**plain.leaves, **ones}, backend=arm), plain.call(backend=arm)
        )


def test_an_input_that_is_not_trained():
    case, expected = answer("gathered")
    leaves = {name: t for name, t in case.leaves.items() if name not in ("x", "p")}
    out = case.call(
        {**case.leaves, "x": case.leaves["x"].detach(), "p": case.leaves["p"].detach()},
        backend="loop",
    )
    grads = dict(
        zip(leaves, torch.autograd.grad(out, list(leaves.values()), case.dout), strict=True)
    )
    assert_close(grads, {name: expected[name] for name in leaves}, torch.float32)


def test_gains_that_do_not_fit_are_refused():
    case, _ = answer("sorted")
    wrong = {**case.leaves, "gain2": case.leaves["gain2"][:, 1:]}
    with pytest.raises(ValueError, match=r"down: gain is \(6, 23\), want one number for each row"):
        case.call(wrong, backend="loop")
    with pytest.raises(ValueError, match="gains go with dropout 0, got 0.1"):
        case.call(backend="loop", dropout=0.1)
