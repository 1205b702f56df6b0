"""Compare values and gradients of grouped_lora, by every back end, with float64 arithmetic row by
row."""

import pytest
import torch
from megalora_kernels import AugmentedWeight, each_expert, grouped_lora
from torch.utils.checkpoint import checkpoint

from tests.kernels.conftest import CHOOSE_VARIANT, gemm_kernel
from tests.kernels.linear import COUNTS, K, N, assert_within_rounding, call, make, row_by_row, run
from tests.kernels.oracle import ARMS, with_dtypes

pytestmark = pytest.mark.usefixtures("uninitialised_is_nan", "small_tiles")
HALF = (torch.bfloat16, torch.float16)
FUSED = ("loop", "grouped_mm", "joined", "triton")


@pytest.mark.parametrize(
    "counts, rank, k, n",
    [
        (COUNTS, 8, K, N),
        ([4, 1, 18], 3, 32, 64),  # whole tiles of K and N (16 and 32), two of rows
        ([9], 5, K, N),
        ([0, 0], 16, K, N),  # a rank that received no rows
    ],
    ids=str,
)
@pytest.mark.parametrize("arm, dtype", with_dtypes(ARMS), ids=str)
def test_values_and_gradients_match_row_by_row(arm, dtype, counts, rank, k, n, monkeypatch):
    # N = 40 and K = 24: several pieces and a ragged last one
    monkeypatch.setattr(each_expert, "DELTA_COLUMNS", 16)
    x, w, offsets, a, b, dy = make(counts, rank, dtype, k, n)
    actual = run(arm, x, w, offsets, a, b, dy)
    assert_within_rounding(actual, counts, x, w, a, b, dy)
    for e, count in enumerate(counts):
        if count == 0:
            assert torch.count_nonzero(actual[2][e]) == 0 and torch.count_nonzero(actual[3][e]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arm", ["grouped_mm", "joined"])
def test_grouped_mm_between_triton_as_on_a_gpu(grouped_mm_between_triton, arm, dtype):
    """A rank of 5 is padded to 8: Triton writes the zeros."""
    x, w, offsets, a, b, dy = make(rank=5, dtype=dtype)
    assert_within_rounding(run(arm, x, w, offsets, a, b, dy), COUNTS, x, w, a, b, dy)


def test_tiles_as_large_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(gemm_kernel, "choose_variant", CHOOSE_VARIANT)
    counts = [0, 70, 3, 33]  # float32 tiles have 32 rows and 64 columns, the shrink's 64 features
    x, w, offsets, a, b, dy = make(counts, 5, k=72, n=136)
    assert_within_rounding(run("triton", x, w, offsets, a, b, dy), counts, x, w, a, b, dy)


@pytest.mark.parametrize("arm", ["reference", "loop"])
def test_gradcheck(arm):
    # Small: every element is moved both ways.
    x, w, offsets, a, b, _ = make([0, 2, 0, 3, 0], rank=2, dtype=torch.float64, k=4, n=5)
    assert torch.autograd.gradcheck(
        lambda x, a, b: grouped_lora(x, w, offsets, a, b, backend=arm), (x, a, b)
    )


def test_loop_and_grouped_mm_agree_to_the_last_bits():
    x, w, offsets, a, b, dy = make()
    assert torch.equal(call("loop", x, w, offsets), call("grouped_mm", x, w, offsets))
    loop = run("loop", x, w, offsets, a, b, dy)
    grouped = run("grouped_mm", x, w, offsets, a, b, dy)
    sizes = row_by_row(COUNTS, *[t.abs() for t in (x, w, a, b, dy)])
    # they round the delta once more or less
    for p, q, size in zip(loop, grouped, sizes, strict=True):
        assert ((p - q).abs() <= 2 * 2.0**-24 * size).all()


@pytest.mark.parametrize("arm", ARMS)
def test_base_only(arm):
    x, w, offsets, a, b, dy = make()
    y = call(arm, x, w, offsets)
    (dx,) = torch.autograd.grad(y, x, dy)
    zeros = torch.zeros_like(a), torch.zeros_like(b)
    assert_within_rounding((y, dx, *zeros), COUNTS, x, w, *zeros, dy)
    assert not call(arm, x.detach(), w, offsets).requires_grad


@pytest.mark.parametrize(
    "layout", ["columns of a wider buffer", "transposed", "one row expanded", "off by one element"]
)
@pytest.mark.parametrize("arm", [*ARMS, "grouped_mm on a GPU", "joined on a GPU"])
def test_any_strides_of_x_and_dy(arm, layout, request):
    if arm.endswith(" on a GPU"):
        request.getfixturevalue("grouped_mm_between_triton")
        arm = arm.removesuffix(" on a GPU")
    _, w, offsets, a, b, dy = make()
    if layout == "columns of a wider buffer":
        x = torch.randn(13, K + 3)[:, 2 : K + 2]
        dy = torch.randn(13, N + 5)[:, :N]
    elif layout == "transposed":
        x = torch.randn(K, 13).T
        dy = torch.randn(N, 13).T
    elif layout == "one row expanded":
        x = torch.randn(1, K).expand(13, K)
        dy = torch.randn(13, 1).expand(13, N)
    else:
        # Four bytes past a multiple of 16: torch's grouped GEMM refuses it, TMA cannot read it.
        x = torch.randn(13 * K + 1)[1:].view(13, K)
        dy = torch.randn(13 * N + 1)[1:].view(13, N)
    x = x.detach().requires_grad_()
    assert_within_rounding(run(arm, x, w, offsets, a, b, dy), COUNTS, x, w, a, b, dy)


@pytest.mark.parametrize("arm", ARMS)
def test_sum_backward_whose_gradient_has_stride_zero(arm):
    x, w, offsets, a, b, _ = make()
    y = call(arm, x, w, offsets, a, b)
    y.sum().backward()
    assert_within_rounding((y, x.grad, a.grad, b.grad), COUNTS, x, w, a, b, torch.ones(13, N))


@pytest.mark.parametrize("arm", ["reference", "loop", "grouped_mm", "triton"])
def test_transposed_weight_and_adapters_that_are_views(arm):
    x, w, offsets, a, b, dy = make()
    w_view = w.transpose(1, 2).contiguous().transpose(1, 2)
    # as in a flat parameter buffer
    a_flat = torch.cat([torch.zeros(1), a.detach().flatten()])[1:].view_as(a)
    b_view = b.detach().transpose(1, 2).contiguous().transpose(1, 2)
    actual = run(arm, x, w_view, offsets, a_flat.requires_grad_(), b_view.requires_grad_(), dy)
    assert_within_rounding(actual, COUNTS, x, w, a, b, dy)


@pytest.mark.parametrize("arm", ARMS)
def test_offsets_that_are_a_column_of_a_table(arm):
    x, w, offsets, a, b, dy = make()
    # reading the other column as well stays inside x: no crash
    column = torch.stack([offsets, offsets], 1)[:, 0]
    assert column.stride() == (2,)
    assert_within_rounding(run(arm, x, w, column, a, b, dy), COUNTS, x, w, a, b, dy)


@pytest.mark.parametrize("wanted", ["x", "a", "b", "ab"])
@pytest.mark.parametrize("arm", ARMS)
def test_only_the_gradients_that_are_wanted(arm, wanted):
    x, w, offsets, a, b, dy = make()
    expected = dict(zip("xab", row_by_row(COUNTS, x, w, a, b, dy)[1:], strict=True))
    tensors = {}
    for name, t in zip("xab", (x, a, b), strict=True):
        tensors[name] = t.detach().requires_grad_(name in wanted)
    call(arm, tensors["x"], w, offsets, tensors["a"], tensors["b"]).backward(dy)
    for name, t in tensors.items():
        # values are of order 10, sums of at most 48 terms: 48 * 10 * 2^-24 = 3e-5
        if name in wanted:
            torch.testing.assert_close(t.grad.double(), expected[name], rtol=0, atol=3e-5)
        else:
            assert t.grad is None
    assert w.grad is None


@pytest.mark.parametrize("arm", FUSED)
def test_under_checkpoint(arm):
    x, w, offsets, a, b, dy = make()
    y = checkpoint(lambda *t: call(arm, *t), x, w, offsets, a, b, use_reentrant=False)
    y.backward(dy)
    for got, want in zip(
        (y, x.grad, a.grad, b.grad), run(arm, x, w, offsets, a, b, dy), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("arm", FUSED)
def test_offsets_overwritten_before_backward_are_noticed(arm):
    x, w, offsets, a, b, dy = make()
    y = call(arm, x, w, offsets, a, b)
    offsets[1] = 4
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


@pytest.mark.parametrize("rank", [8, 3])
@pytest.mark.parametrize("arm", ARMS)
def test_a_may_read_another_input_than_the_base(arm, rank):
    """Dropout: y = W x + B A z. Against the two halves, each row by row, with the other half
    switched off."""
    x, weight, offsets, a, b, dy = make(rank=rank)
    # Half of the elements dropped, the others doubled.
    kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    z = (x.detach() * kept * 2).requires_grad_()
    y = call(arm, x, weight, offsets, a, b, x_lora_MK=z)
    dx, dz, da, db = torch.autograd.grad(y, (x, z, a, b), dy)
    base_y, base_dx, _, _ = row_by_row(
        COUNTS, x, weight, torch.zeros_like(a), torch.zeros_like(b), dy
    )
    delta_y, delta_dz, delta_da, delta_db = row_by_row(
        COUNTS, z, torch.zeros_like(weight), a, b, dy
    )
    for got, want in (
        (y, base_y + delta_y),
        (dx, base_dx),
        (dz, delta_dz),
        (da, delta_da),
        (db, delta_db),
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


# ---- joined weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("room", [8, 20])
def test_a_smaller_adapter_after_a_larger_one_in_the_same_joined_weight(room):
    """What the larger one left in the room must not act: its columns meet zeros in S."""
    x, w, offsets, a, b, dy = make(rank=3)
    joined = AugmentedWeight(w, room)
    _, _, _, big_a, big_b, _ = make(rank=8)
    # Forward writes B and backward A into the room.
    torch.autograd.grad(
        grouped_lora(x, joined, offsets, big_a, big_b, backend="grouped_mm").sum(), (x, big_a)
    )
    y = grouped_lora(x, joined, offsets, a, b, backend="grouped_mm")
    actual = y, *torch.autograd.grad(y, (x, a, b), dy)
    assert_within_rounding(actual, COUNTS, x, w, a, b, dy)
    assert torch.equal(joined.weight, w)


def test_two_adapters_in_one_joined_weight_before_either_goes_backward():
    """Pipelines run several forwards first; each backward writes its own adapter's A into the room
    again."""
    x, w, offsets, a, b, dy = make()
    other_a = (2 * a).detach().requires_grad_()
    other_b = (-b).detach().requires_grad_()
    joined = AugmentedWeight(w, 8)
    pairs = ((a, b), (other_a, other_b))
    outs = [grouped_lora(x, joined, offsets, *pair, backend="grouped_mm") for pair in pairs]
    for y, pair in zip(outs, pairs, strict=True):
        assert_within_rounding(
            (y, *torch.autograd.grad(y, (x, *pair), dy)), COUNTS, x, w, *pair, dy
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank, room", [(3, 16), (16, 16), (17, 32)])
def test_room_comes_in_steps_of_16(dtype, rank, room):
    # B stands behind the K columns and A behind the N rows; in steps of 16, so that rows remain
    # whole multiples of 16 bytes.
    joined = AugmentedWeight(torch.ones(2, N, K, dtype=dtype), rank)
    assert joined.room == room and joined.buffer.shape == (2, N + room, K + room)
    assert joined.buffer.sum() == 2 * N * K and joined.weight.shape == (2, N, K)
