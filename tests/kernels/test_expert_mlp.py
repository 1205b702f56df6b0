"""Compare values and gradients of expert_mlp, by every back end, with float64 arithmetic row by
row."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from megalora_kernels import ExpertFactors, Routing, expert_mlp

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


# The answer takes as long as the call that is compared with it, and several arms need the same one.
@cache
def answer(
    way: str, adapted: tuple[str, ...] = ADAPTED[0], dtype: torch.dtype = torch.float32
) -> tuple[Experts, Tensors]:
    # Routers give probabilities in float32 whatever the dtype of the activations.
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
    # Experts without rows get gradients of exact zeros, not what the memory held before.
    idle = [0, 3, 5] if way == "gathered" else [0, 2, 5]
    for name in case.leaves.keys() - {"x", "p"}:
        assert torch.count_nonzero(actual[name][idle]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arm", ARMS)
def test_half_precision_with_probabilities_in_float32(arm, dtype, small_tiles):
    case, expected = answer("received", dtype=dtype)
    actual = case.run(backend=arm)
    assert_close(actual, expected, dtype)
    for name, t in actual.items():
        assert t.dtype == (torch.float32 if name == "p" else dtype), name


@pytest.mark.parametrize("arm", ["reference", "loop"])
def test_float64(arm):
    case, expected = answer("received", dtype=torch.float64)
    assert_close(case.run(backend=arm), expected, torch.float64)


RECOMPUTED = []
for way in IDLE:
    for arm in FUSED:
        # The interpreter takes half a second for each of Triton's cases.
        if arm != "triton" or way == "gathered":
            RECOMPUTED.append((way, arm))


@pytest.mark.parametrize("way, arm", RECOMPUTED)
def test_recomputing_gate_and_up_changes_no_bit(way, arm, small_tiles):
    case, _ = answer(way)
    kept = case.run(backend=arm)
    recomputed = case.run(backend=arm, recompute=True)
    for name, t in kept.items():
        assert torch.equal(t, recomputed[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapted", ADAPTED[:3], ids="-".join)
@pytest.mark.parametrize("arm", ["grouped_mm", "joined"])
def test_grouped_mm_between_triton_as_on_a_gpu(arm, adapted, dtype, grouped_mm_between_triton):
    """Ranks 3 and 7 are padded: Triton writes rows beside S and zeros behind it."""
    case, expected = answer("gathered", adapted, dtype)
    assert_close(case.run(backend=arm), expected, dtype)


@pytest.mark.parametrize("arm", ARMS)
def test_no_rows_at_all(arm):
    # An expert-parallel rank may get nothing, and a microbatch may be padding alone.
    for case in (sorted_rows([0, 0, 0]), top_k([], 3, 2)):
        actual = case.run(backend=arm)
        expected = row_by_row(case)
        assert actual.keys() == expected.keys()
        for name, t in actual.items():
            assert torch.count_nonzero(t) == 0
            assert t.shape == expected[name].shape, name


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
    # Two different experts of three: the token's number, and the one or two behind it.
    chosen = []
    for t in range(49):
        chosen.append(sorted([t % 3, (t + 1 + t % 2) % 3]))
    case = top_k(chosen, 3, 2)
    # 98 rows over three experts, so that each has several tiles.
    assert min(case.routing.offsets_E.diff(prepend=torch.zeros(1))) > 24
    assert_close(case.run(backend=arm), row_by_row(case), torch.float32)


@pytest.mark.parametrize("arm", ["grouped_mm", "joined"])
def test_no_rows_at_all_as_on_a_gpu(arm, grouped_mm_between_triton):
    for case in (sorted_rows([0, 0, 0]), top_k([], 3, 2)):
        for name, t in case.run(backend=arm).items():
            assert torch.count_nonzero(t) == 0, name


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
    if name == "dout":
        changed = replace(case, dout=spread(case.dout).detach())
    else:
        changed = replace(case, leaves={**case.leaves, name: spread(case.leaves[name])})
    assert_close(changed.run(backend=arm), expected, torch.float32)


@pytest.mark.parametrize("arm", ["grouped_mm", "joined"])
def test_any_strides_as_on_a_gpu(arm, grouped_mm_between_triton):
    case, expected = answer("sorted")
    leaves = {}
    for name, t in case.leaves.items():
        if name == "p":
            leaves[name] = t
        elif name in ("a1", "gate", "down"):
            # Off by one element: TMA and grouped_mm both want addresses of whole 16 bytes.
            leaves[name] = flat(t)
        else:
            leaves[name] = spread(t)
    changed = replace(case, leaves=leaves, dout=spread(case.dout).detach())
    assert_close(changed.run(backend=arm), expected, torch.float32)


@pytest.mark.parametrize("arm", ARMS)
def test_factors_in_a_flat_buffer_and_a_transposed_weight(arm, small_tiles):
    # Megatron keeps all parameters of a rank in one buffer, one behind the other.
    case, expected = answer("sorted")
    leaves = {name: flat(t) for name, t in case.leaves.items()}
    w1 = case.w1.transpose(1, 2).contiguous().transpose(1, 2)
    changed = replace(case, leaves=leaves, w1=w1)
    assert_close(changed.run(backend=arm), expected, torch.float32)


@pytest.mark.parametrize("arm", ARMS)
def test_sum_backward_whose_gradient_has_stride_zero(arm, small_tiles):
    # ``out.sum().backward()`` gives one number expanded; a kernel that took it for dense would read
    # beyond it.
    case, _ = answer("sorted")
    ones = replace(case, dout=torch.ones(()).expand(case.dout.shape))
    assert_close(ones.run(backend=arm), row_by_row(ones), torch.float32)


@pytest.mark.parametrize("arm", ["loop", "joined", "triton"])
def test_routing_tensors_that_are_columns_of_a_table(arm, small_tiles):
    """Reading the other column as well would stay inside every tensor: wrong values, no crash."""
    case, expected = answer("gathered")
    columns = {}
    for name in ("offsets_E", "source_M", "slots_TK"):
        t = getattr(case.routing, name)
        columns[name] = torch.stack([t, t], -1)[..., 0]
    changed = replace(case, routing=Routing(num_rows=case.routing.num_rows, **columns))
    assert_close(changed.run(backend=arm), expected, torch.float32)


# ---- finite differences ------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("way", IDLE)
@pytest.mark.parametrize("backend", ["reference", "loop"])
def test_gradcheck(backend, way, recompute):
    # As small as can be: finite differences call forward again and again.
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
    # w1 is [gate | up]; a1 has gate's 3 ranks first, then up's 5.
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
    outs = []
    grads = []
    for down in (by_scale, by_b):
        out = expert_mlp(v["x"], case.w1, case.w2, v["p"], case.routing, down=down)
        outs.append(out)
        grads += torch.autograd.grad(out, v["down"], case.dout)
    assert torch.equal(*outs)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-13, atol=0)
