"""megalora_kernels.expert_mlp: values and gradients of every back end against float64 arithmetic,
row by row."""

from functools import cache

import pytest
import torch
from megalora_kernels import ExpertFactors, expert_mlp

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
ADAPTED = (("gate", "up", "down"), ("gate", "up"), ("gate",), ("up",), ("down",), ())
FUSED = ("loop", "grouped_mm", "joined", "triton")


@cache
def answer(
    way: str, adapted: tuple[str, ...] = ADAPTED[0], dtype: torch.dtype = torch.float32
) -> tuple[Experts, Tensors]:
    p_dtype = torch.float32 if dtype.itemsize == 2 else dtype
    case = IDLE[way](adapted=adapted, dtype=dtype, p_dtype=p_dtype)
    return case, row_by_row(case)


@pytest.mark.parametrize("adapted", ADAPTED, ids="-".join)
@pytest.mark.parametrize("way", ["sorted", "gathered"])
@pytest.mark.parametrize("arm", ARMS)
def test_values_and_gradients_match_row_by_row(arm, way, adapted, small_tiles):
    case, expected = answer(way, adapted)
    actual = case.run(backend=arm)
    assert_close(actual, expected, torch.float32)
    for name in case.leaves.keys() - {"x", "p"}:
        assert torch.count_nonzero(actual[name][[0, 3, 5] if way == "gathered" else [0, 2, 5]]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arm", ARMS)
def test_half_precision_with_probabilities_in_float32(arm, dtype, small_tiles):
    case, expected = answer("received", dtype=dtype)
    actual = case.run(backend=arm)
    assert_close(actual, expected, dtype)
    assert actual["p"].dtype == torch.float32 and all(
        actual[n].dtype == dtype for n in actual.keys() - {"p"}
    )


@pytest.mark.parametrize("arm", ["reference", "loop"])
def test_float64(arm):
    case, expected = answer("received", dtype=torch.float64)
    assert_close(case.run(backend=arm), expected, torch.float64)


@pytest.mark.parametrize(
    "way, arm",
    [(way, arm) for way in IDLE for arm in FUSED if arm != "triton" or way == "gathered"],
)
def test_recomputing_gate_and_up_changes_no_bit(way, arm, small_tiles):  # fmt: skip
    case, _ = answer(way)
    kept = case.run(backend=arm)
    recomputed = case.run(backend=arm, recompute=True)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapted", ADAPTED[:3], ids="-".join)
@pytest.mark.parametrize("arm", ["grouped_mm", "joined"])
def test_grouped_mm_between_triton_as_on_a_gpu(arm, adapted, dtype, grouped_mm_between_triton):
    """Ranks 3 and 7 are padded: Triton writes rows beside S and zeros behind it."""
    case, expected = answer("gathered", adapted, dtype)
    assert_close(case.run(backend=arm), expected, dtype)


@pytest.mark.parametrize("arm", ARMS)
def test_no_rows_at_all(arm):
    for case in (sorted_rows([0, 0, 0]), top_k([], 3, 2)):
        actual = case.run(backend=arm)
        assert all(torch.count_nonzero(t) == 0 for t in actual.values())
        assert {n: t.shape for n, t in actual.items()} == {
            n: t.shape for n, t in row_by_row(case).items()
        }


@pytest.mark.parametrize("arm", ["loop", "joined", "triton"])
def test_one_expert_and_one_row_each(arm, small_tiles):
    for case in (sorted_rows([1]), top_k([[0], [0], [0]], 1, 1)):
        assert_close(case.run(backend=arm), row_by_row(case), torch.float32)


@pytest.mark.parametrize(
    "arm, dtype", [("triton", torch.float32), ("triton", torch.float16), ("loop", torch.float32)]
)
def test_experts_of_several_tiles_and_chunks(arm, dtype, short_chunks):
    """float32 tiles have 32 rows (float16 64), chunks 64 and 32: an expert of 70 rows has two or
    three of each."""
    case = sorted_rows([0, 70, 3, 0, 33], dtype=dtype, H=72, inner=136)
    assert_close(case.run(backend=arm), row_by_row(case), dtype)


@pytest.mark.parametrize("arm", ["triton", "joined"])
def test_gathered_experts_of_several_tiles_and_chunks(arm, short_chunks, grouped_mm_between_triton):
    chosen = [[t % 3, (t + 1 + t % 2) % 3] for t in range(49)]
    case = top_k([[min(pair), max(pair)] for pair in chosen], 3, 2)
    assert min(case.routing.offsets_E.diff(prepend=torch.zeros(1))) > 24
    assert_close(case.run(backend=arm), row_by_row(case), torch.float32)


@pytest.mark.parametrize("arm", ["grouped_mm", "joined"])
def test_no_rows_at_all_as_on_a_gpu(arm, grouped_mm_between_triton):
    for case in (sorted_rows([0, 0, 0]), top_k([], 3, 2)):
        assert all(torch.count_nonzero(t) == 0 for t in case.run(backend=arm).values())


# ---- strides -----------------------------------------------------------------------------------


def spread(t: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of twice as wide a buffer."""
    return torch.stack([t.detach(), torch.full_like(t, 99.0)], -1)[..., 0].requires_grad_()


def flat(t: torch.Tensor) -> torch.Tensor:
    """The same values, at an odd offset of one flat buffer, as in a flat parameter buffer."""
    return torch.cat([t.new_zeros(1), t.detach().reshape(-1)])[1:].view_as(t).requires_grad_()


@pytest.mark.parametrize("name", ["x", "p", "a1", "gate", "a2", "down", "dout"])
@pytest.mark.parametrize("arm", ARMS)
def test_any_strides(arm, name, small_tiles):
    case, expected = answer("gathered")
    change = {name: spread(case.dout if name == "dout" else case.leaves[name])}
    leaves = {**case.leaves, **{n: t for n, t in change.items() if n != "dout"}}
    changed = Experts(
        **{**vars(case), "leaves": leaves, "dout": change.get("dout", case.dout).detach()}
    )
    assert_close(changed.run(backend=arm), expected, torch.float32)


@pytest.mark.parametrize("arm", ["grouped_mm", "joined"])
def test_any_strides_as_on_a_gpu(arm, grouped_mm_between_triton):
    case, expected = answer("sorted")
    leaves = {
        name: flat(t) if name in ("a1", "gate", "down") else spread(t)
        for name, t in case.leaves.items()
        if name != "p"
    }
    changed = Experts(
        **{**vars(case), "leaves": {**case.leaves, **leaves}, "dout": spread(case.dout).detach()}
    )
    assert_close(changed.run(backend=arm), expected, torch.float32)


@pytest.mark.parametrize("arm", ARMS)
def test_factors_in_a_flat_buffer_and_a_transposed_weight(arm, small_tiles):
    case, expected = answer("sorted")
    leaves = {name: flat(t) for name, t in case.leaves.items()}
    w1 = case.w1.transpose(1, 2).contiguous().transpose(1, 2)
    changed = Experts(**{**vars(case), "leaves": leaves, "w1": w1})
    assert_close(changed.run(backend=arm), expected, torch.float32)


@pytest.mark.parametrize("arm", ARMS)
def test_sum_backward_whose_gradient_has_stride_zero(arm, small_tiles):
    case, _ = answer("sorted")
    ones = Experts(**{**vars(case), "dout": torch.ones(()).expand(case.dout.shape)})
    assert_close(ones.run(backend=arm), row_by_row(ones), torch.float32)


@pytest.mark.parametrize("arm", ["loop", "joined", "triton"])
def test_routing_tensors_that_are_columns_of_a_table(arm, small_tiles):
    """Reading the other column as well would stay inside every tensor: wrong values, no crash."""
    case, expected = answer("gathered")
    r = case.routing
    columns = (torch.stack([t, t], -1)[..., 0] for t in (r.offsets_E, r.source_M, r.slots_TK))
    names = ("offsets_E", "source_M", "slots_TK")
    changed = Experts(
        **{
            **vars(case),
            "routing": type(r)(num_rows=r.num_rows, **dict(zip(names, columns, strict=True))),
        }
    )
    assert_close(changed.run(backend=arm), expected, torch.float32)


# ---- finite differences ------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("way", IDLE)
@pytest.mark.parametrize("backend", ["reference", "loop"])
def test_gradcheck(backend, way, recompute):
    case = IDLE[way](dtype=torch.float64, H=3, inner=2)
    names = list(case.leaves)

    def call(*values: torch.Tensor) -> torch.Tensor:
        return case.call(
            dict(zip(names, values, strict=True)), backend=backend, recompute=recompute
        )

    # One random direction per operand: an error in any element shows with probability one.
    assert torch.autograd.gradcheck(call, tuple(case.leaves.values()), fast_mode=True)


def test_an_adapter_is_the_merged_weight():
    """W + s B A in the place of W, without adapters: what LoRA means."""
    case, expected = answer("received", dtype=torch.float64)
    v = case.leaves
    inner = case.w2.shape[2]
    w1 = case.w1.clone()
    w2 = case.w2 + 1.25 * v["down"] @ v["a2"]
    w1[:, :inner] += 0.75 * v["gate"] @ v["a1"][:, :3]
    w1[:, inner:] += 1.5 * v["up"] @ v["a1"][:, 3:]
    merged = expert_mlp(v["x"], w1.detach(), w2.detach(), v["p"], case.routing)
    torch.testing.assert_close(merged.detach(), expected["out"], rtol=1e-12, atol=1e-12)


def test_a_scale_multiplies_what_b_does():
    """Not to the bit: S is scaled and not B. But so where scaling moves nothing but exponents."""
    case, _ = answer("sorted", dtype=torch.float64)
    v = case.leaves
    by_scale = ExpertFactors(v["a2"], (v["down"],), (0.5,))
    by_b = ExpertFactors(v["a2"], (0.5 * v["down"],), (1.0,))
    outs = [
        expert_mlp(v["x"], case.w1, case.w2, v["p"], case.routing, down=down)
        for down in (by_scale, by_b)
    ]
    assert torch.equal(*outs)
    for g, h in zip(*(torch.autograd.grad(out, v["down"], case.dout) for out in outs), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-13, atol=0)
