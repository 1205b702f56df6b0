"""megalora_kernels.grouped_lora against float64 arithmetic written out row by row, and what it allocates and keeps."""

import importlib
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megalora_kernels import grouped_lora
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

# The package re-exports the function under the module's name, so plain attribute access finds the function.
module = importlib.import_module("megalora_kernels.grouped_lora")

K, N = 24, 40
COUNTS = [0, 5, 0, 7, 1, 0]  # an expert without rows first, in the middle and last
LOW = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
CASES = [
    *[(backend, dtype) for backend in ("reference", "loop") for dtype in LOW],
    *[("grouped_mm", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)],
]


@pytest.fixture(autouse=True)
def no_backend_from_the_environment(monkeypatch):
    monkeypatch.delenv("MEGALORA_GROUPED_LORA", raising=False)


@pytest.fixture(autouse=True)
def grouped_mm_as_strict_as_on_a_gpu(monkeypatch):
    """On a GPU torch refuses operands that do not start on 16 bytes; on CPU it takes them."""
    real = module._grouped_mm

    def strict(p, q, offs):
        assert p.is_meta or (p.data_ptr() % 16 == 0 and q.data_ptr() % 16 == 0)
        return real(p, q, offs=offs)

    monkeypatch.setattr(module, "_grouped_mm", strict)


def make(counts=COUNTS, rank=8, dtype=torch.float32, k=K, n=N):
    """x, weight, offsets, a, b, dy; a and b are leaves that want gradients, and so is x."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    rows, experts = sum(counts), len(counts)
    offsets = torch.tensor(counts).cumsum(0).int()
    x, a, b = normal(rows, k), normal(experts, rank, k) / 4, normal(experts, n, rank) / 2
    return (
        x.requires_grad_(),
        normal(experts, n, k) / 4,
        offsets,
        a.requires_grad_(),
        b.requires_grad_(),
        normal(rows, n),
    )


def row_by_row(counts, x, w, a, b, dy):
    """y, dx, da, db in float64: one row at a time, the chain rule by hand, no autograd and no slicing by offset."""
    x, w, a, b, dy = (t.detach().double() for t in (x, w, a, b, dy))
    y, dx, da, db = torch.zeros_like(dy), torch.zeros_like(x), torch.zeros_like(a), torch.zeros_like(b)
    for m, e in enumerate([e for e, count in enumerate(counts) for _ in range(count)]):
        s, ds = a[e] @ x[m], dy[m] @ b[e]
        y[m] = w[e] @ x[m] + b[e] @ s
        dx[m] = dy[m] @ w[e] + ds @ a[e]
        da[e] += torch.outer(ds, x[m])
        db[e] += torch.outer(dy[m], s)
    return y, dx, da, db


def run(backend, x, w, offsets, a, b, dy):
    y = grouped_lora(x, w, offsets, a, b, backend=backend)
    return y, *torch.autograd.grad(y, (x, a, b), dy)


def assert_within_rounding(actual, counts, x, w, a, b, dy):
    """|error| <= (4 u + n 2^-24) * (the same expression over absolute values), elementwise.

    4: S or dS, the base, the delta and their sum are each rounded once to the dtype (u = half an ulp of 1).
    n 2^-24: float32 accumulation over n terms (2^-53 for float64). 1.1 covers the products of the two.
    """
    dtype, terms = x.dtype, max(x.shape[0], x.shape[1], dy.shape[1]) + a.shape[1]
    expected = row_by_row(counts, x, w, a, b, dy)
    magnitude = row_by_row(counts, *(t.abs() for t in (x, w, a, b, dy)))
    accumulation = terms * (2.0**-53 if dtype == torch.float64 else 2.0**-24)
    for name, got, want, size in zip(("y", "dx", "da", "db"), actual, expected, magnitude, strict=True):
        assert got.dtype == dtype and got.shape == want.shape, name
        excess = (got.double() - want).abs() - 1.1 * (4 * LOW[dtype] + accumulation) * size
        assert excess.numel() == 0 or excess.max() <= 0, f"{name} exceeds the bound by {excess.max():.3g}"


class Recorder(TorchDispatchMode):
    """Every new storage an operation returns (as a byte count), and every storage an operation reads."""

    def __init__(self):
        super().__init__()
        self.alive, self.allocated, self.read = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self.read |= {s.data_ptr() for s in inputs}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.read:
                self.alive.append(t)  # keeps the address from being given out twice
                self.allocated[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return out

    def at_least(self, num_elements, itemsize=4):
        return [size for size in self.allocated.values() if size >= num_elements * itemsize]


# ---- values and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("counts, rank", [(COUNTS, 8), ([4, 1, 6], 3), ([9], 5), ([0, 0], 16)], ids=str)
@pytest.mark.parametrize("backend, dtype", CASES, ids=str)
def test_values_and_gradients_match_row_by_row(backend, dtype, counts, rank, monkeypatch):
    monkeypatch.setattr(module, "DELTA_COLUMNS", 16)  # N = 40 and K = 24: several chunks and a ragged last one
    x, w, offsets, a, b, dy = make(counts, rank, dtype)
    actual = run(backend, x, w, offsets, a, b, dy)
    assert_within_rounding(actual, counts, x, w, a, b, dy)
    for e, count in enumerate(counts):
        if count == 0:
            assert torch.count_nonzero(actual[2][e]) == 0 and torch.count_nonzero(actual[3][e]) == 0


@pytest.mark.parametrize("backend", ["reference", "loop"])
def test_gradcheck(backend):
    x, w, offsets, a, b, _ = make([0, 2, 0, 3, 0], rank=2, dtype=torch.float64, k=4, n=5)
    assert torch.autograd.gradcheck(lambda x, a, b: grouped_lora(x, w, offsets, a, b, backend=backend), (x, a, b))


def test_loop_and_grouped_mm_agree_to_the_last_bits():
    x, w, offsets, a, b, dy = make()
    assert torch.equal(grouped_lora(x, w, offsets, backend="loop"), grouped_lora(x, w, offsets, backend="grouped_mm"))
    loop, grouped = run("loop", x, w, offsets, a, b, dy), run("grouped_mm", x, w, offsets, a, b, dy)
    sizes = row_by_row(COUNTS, *(t.abs() for t in (x, w, a, b, dy)))
    for p, q, size in zip(loop, grouped, sizes, strict=True):  # they round the delta once more or less
        assert ((p - q).abs() <= 2 * 2.0**-24 * size).all()


@pytest.mark.parametrize("backend", ["reference", "loop", "grouped_mm"])
def test_base_only(backend):
    x, w, offsets, a, b, dy = make()
    y = grouped_lora(x, w, offsets, backend=backend)
    (dx,) = torch.autograd.grad(y, x, dy)
    zero_a, zero_b = torch.zeros_like(a), torch.zeros_like(b)
    expected_y, expected_dx, _, _ = row_by_row(COUNTS, x, w, zero_a, zero_b, dy)
    torch.testing.assert_close(y.double(), expected_y, rtol=0, atol=1e-5)
    torch.testing.assert_close(dx.double(), expected_dx, rtol=0, atol=1e-5)
    assert not grouped_lora(x.detach(), w, offsets, backend=backend).requires_grad


@pytest.mark.parametrize(
    "layout", ["columns of a wider buffer", "transposed", "one row expanded", "off by one element"]
)
@pytest.mark.parametrize("backend", ["reference", "loop", "grouped_mm"])
def test_any_strides_of_x_and_dy(backend, layout):
    _, w, offsets, a, b, dy = make()
    if layout == "columns of a wider buffer":
        x, dy = torch.randn(13, K + 3)[:, 2 : K + 2], torch.randn(13, N + 5)[:, :N]
    elif layout == "transposed":
        x, dy = torch.randn(K, 13).T, torch.randn(N, 13).T
    elif layout == "one row expanded":
        x, dy = torch.randn(1, K).expand(13, K), torch.randn(13, 1).expand(13, N)
    else:
        x, dy = torch.randn(13 * K + 1)[1:].view(13, K), torch.randn(13 * N + 1)[1:].view(13, N)
    x = x.detach().requires_grad_()
    assert_within_rounding(run(backend, x, w, offsets, a, b, dy), COUNTS, x, w, a, b, dy)


@pytest.mark.parametrize("backend", ["reference", "loop", "grouped_mm"])
def test_sum_backward_whose_gradient_has_stride_zero(backend):
    x, w, offsets, a, b, _ = make()
    y = grouped_lora(x, w, offsets, a, b, backend=backend)
    y.sum().backward()
    assert_within_rounding((y, x.grad, a.grad, b.grad), COUNTS, x, w, a, b, torch.ones(13, N))


@pytest.mark.parametrize("backend", ["reference", "loop", "grouped_mm"])
def test_transposed_weight_and_adapters_that_are_views(backend):
    x, w, offsets, a, b, dy = make()
    w_view = w.transpose(1, 2).contiguous().transpose(1, 2)
    a_flat = torch.cat([torch.zeros(1), a.detach().flatten()])[1:].view_as(a)  # as in a flat parameter buffer
    b_view = b.detach().transpose(1, 2).contiguous().transpose(1, 2)
    actual = run(backend, x, w_view, offsets, a_flat.requires_grad_(), b_view.requires_grad_(), dy)
    assert_within_rounding(actual, COUNTS, x, w, a, b, dy)


@pytest.mark.parametrize("wanted", ["x", "a", "b", "ab"])
@pytest.mark.parametrize("backend", ["reference", "loop", "grouped_mm"])
def test_only_the_gradients_that_are_wanted(backend, wanted):
    x, w, offsets, a, b, dy = make()
    expected = dict(zip("xab", row_by_row(COUNTS, x, w, a, b, dy)[1:], strict=True))
    tensors = {name: t.detach().requires_grad_(name in wanted) for name, t in zip("xab", (x, a, b), strict=True)}
    grouped_lora(tensors["x"], w, offsets, tensors["a"], tensors["b"], backend=backend).backward(dy)
    for name, t in tensors.items():
        if name in wanted:
            torch.testing.assert_close(t.grad.double(), expected[name], rtol=0, atol=1e-4)
        else:
            assert t.grad is None
    assert w.grad is None


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_under_checkpoint(backend):
    x, w, offsets, a, b, dy = make()
    y = checkpoint(lambda *t: grouped_lora(*t, backend=backend), x, w, offsets, a, b, use_reentrant=False)
    y.backward(dy)
    for got, want in zip((y, x.grad, a.grad, b.grad), run(backend, x, w, offsets, a, b, dy), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_offsets_overwritten_before_backward_are_noticed(backend):
    x, w, offsets, a, b, dy = make()
    y = grouped_lora(x, w, offsets, a, b, backend=backend)
    offsets[1] = 4
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_experts_without_rows_get_zeros_even_where_grouped_mm_leaves_garbage(monkeypatch):
    """B200 returns garbage for them (pytorch#172439); NaN here, so multiplying by zero would not do."""
    real = module._grouped_mm

    def like_b200(p, q, offs):
        out = real(p, q, offs=offs)
        if q.dim() == 2:
            out[torch.tensor(COUNTS) == 0] = float("nan")
        return out

    monkeypatch.setattr(module, "_grouped_mm", like_b200)
    x, w, offsets, a, b, dy = make()
    assert_within_rounding(run("grouped_mm", x, w, offsets, a, b, dy), COUNTS, x, w, a, b, dy)


# ---- what is allocated, kept and read ----------------------------------------------------------

# One expert has all rows, so a temporary per expert counts too; K and N are wider than one chunk of 256 columns.
WIDE: dict[str, Any] = dict(counts=[0, 40, 0], rank=4, k=280, n=328)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_no_full_width_temporary(backend):
    """Output-wide tensors: y in forward, dx in backward, and nothing else that large."""
    x, w, offsets, a, b, dy = make(**WIDE)
    with Recorder() as forward:
        y = grouped_lora(x, w, offsets, a, b, backend=backend)
    assert forward.at_least(40 * 280) == [40 * 328 * 4]
    with Recorder() as backward:
        torch.autograd.grad(y, (x, a, b), dy)
    assert backward.at_least(40 * 280) == [40 * 280 * 4]


def test_the_recorder_sees_the_temporaries_of_the_reference():
    """Otherwise the test above proves nothing."""
    x, w, offsets, a, b, _ = make(**WIDE)
    with Recorder() as forward:
        grouped_lora(x, w, offsets, a, b, backend="reference")
    assert len(forward.at_least(40 * 328)) > 1


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_no_buffer_the_size_of_the_weight_and_no_weight_gradient(backend):
    x, w, offsets, a, b, dy = make(**WIDE)
    with Recorder() as recorder:
        grouped_lora(x, w, offsets, a, b, backend=backend).backward(dy)
    assert w.grad is None and recorder.at_least(w.numel()) == []


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_backward_leaves_the_weight_alone_when_x_is_frozen(backend):
    x, w, offsets, a, b, dy = make()
    for x_wants_grad in (False, True):
        y = grouped_lora(x.detach().requires_grad_(x_wants_grad), w, offsets, a, b, backend=backend)
        with Recorder() as recorder:
            y.backward(dy)
        assert (w.untyped_storage().data_ptr() in recorder.read) == x_wants_grad


@pytest.mark.parametrize(
    "wanted, kept", [("xab", 13 * K + 13 * 8), ("x", 0), ("a", 13 * K), ("b", 13 * 8)], ids=["xab", "x", "a", "b"]
)
@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_backward_keeps_x_and_the_rank_wide_s_and_no_more(backend, wanted, kept):
    x, w, offsets, a, b, _ = make()
    x, a, b = (t.detach().requires_grad_(name in wanted) for name, t in zip("xab", (x, a, b), strict=True))
    parameters = {t.data_ptr() for t in (w, a, b, offsets)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grouped_lora(x, w, offsets, a, b, backend=backend)
    activations = [t for t in saved if t.data_ptr() not in parameters]
    assert sum(t.untyped_storage().nbytes() for t in activations) == kept * 4


def test_grouped_mm_never_reads_a_value_on_the_host():
    """Meta tensors have no values, so anything that would wait for a device raises here."""
    x, w, offsets, a, b, dy = (t.detach().to("meta") for t in make(dtype=torch.bfloat16, rank=3))
    x, a, b = x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    y, *grads = run("grouped_mm", x, w, offsets, a, b, dy)
    assert [t.shape for t in (y, *grads)] == [dy.shape, x.shape, a.shape, b.shape]
    with pytest.raises((RuntimeError, NotImplementedError)):
        grouped_lora(x, w, offsets, a, b, backend="loop")


# ---- choice of back end ------------------------------------------------------------------------


def chosen(monkeypatch, *args, **kwargs):
    """The back end that a call takes, found by watching which of the three it enters."""
    seen = []
    monkeypatch.setattr(module, "grouped_lora_ref", lambda *_: seen.append("reference"))
    monkeypatch.setattr(module._GroupedLoRA, "apply", lambda *a: seen.append(a[-1].__name__))
    grouped_lora(*args, **kwargs)
    return seen


def test_cpu_takes_the_loop_and_an_argument_beats_the_environment(monkeypatch):
    x, w, offsets, a, b, _ = make()
    assert chosen(monkeypatch, x, w, offsets, a, b) == ["_Loop"]
    monkeypatch.setenv("MEGALORA_GROUPED_LORA", "grouped_mm")
    assert chosen(monkeypatch, x, w, offsets, a, b) == ["_GroupedMM"]
    assert chosen(monkeypatch, x, w, offsets, a, b, backend="reference") == ["reference"]
    monkeypatch.setenv("MEGALORA_GROUPED_LORA", "")
    assert chosen(monkeypatch, x, w, offsets, a, b) == ["_Loop"]


@pytest.mark.parametrize(
    "dtype, k, n, expected",
    [
        (torch.bfloat16, 24, 40, "_GroupedMM"),
        (torch.float16, 24, 40, "_GroupedMM"),
        (torch.float32, 20, 12, "_GroupedMM"),
        (torch.bfloat16, 20, 40, "_Loop"),  # rows of 40 bytes
        (torch.bfloat16, 24, 12, "_Loop"),  # rows of 24 bytes
        (torch.float64, 24, 40, "_Loop"),
    ],
)
def test_cuda_takes_grouped_mm_where_it_can(monkeypatch, dtype, k, n, expected):
    # tests/conftest.py makes "cuda" mean the CPU through a torch function mode; here a fake GPU is wanted.
    with torch._C.DisableTorchFunction(), FakeTensorMode():
        x, w = (torch.empty(*shape, dtype=dtype, device="cuda") for shape in ((13, k), (6, n, k)))
        offsets = torch.empty(6, dtype=torch.int32, device="cuda")
        assert chosen(monkeypatch, x, w, offsets) == [expected]


def test_grouped_mm_is_found_under_either_name(monkeypatch):
    assert module._find_grouped_mm() is F.grouped_mm
    monkeypatch.delattr(F, "grouped_mm")
    assert module._find_grouped_mm() is torch._grouped_mm
    monkeypatch.delattr(torch, "_grouped_mm")
    assert module._find_grouped_mm() is None


# ---- error messages ----------------------------------------------------------------------------

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "x has three dimensions": (dict(x=torch.zeros(2, 3, K)), "want x [M, K] and weight [E, N, K]"),
    "no experts": (dict(weight=torch.zeros(0, N, K)), "got x (13, 24) and weight (0, 40, 24)"),
    "features": (dict(x=torch.zeros(13, 32)), "x has 32 features but weight 24; want x (13, 32)"),
    "offsets shape": (dict(offsets=torch.zeros(5, dtype=torch.int32)), "int32 of shape (6,), one end row per expert"),
    "offsets dtype": (dict(offsets=torch.tensor([0, 5, 5, 12, 13, 13])), "got torch.int64 of shape (6,)"),
    "trainable weight": (dict(weight=torch.zeros(6, N, K, requires_grad=True)), "weight.requires_grad_(False)"),
    "a alone": (dict(b=None), "a was given without b; pass both, or neither"),
    "b alone": (dict(a=None), "b was given without a; pass both, or neither"),
    "a shape": (dict(a=torch.zeros(6, 8, 32)), "a is (6, 8, 32), want [E, R, K] = (6, R, 24)"),
    "rank zero": (dict(a=torch.zeros(6, 0, K)), "with R >= 1"),
    "b shape": (dict(b=torch.zeros(6, N, 16)), "b is (6, 40, 16), want [E, N, R] = (6, 40, 8)"),
    "dtype": (dict(a=torch.zeros(6, 8, K).half()), "a is torch.float16 but x is torch.float32; cast a before the call"),
    "device": (dict(offsets=torch.zeros(6, dtype=torch.int32, device="meta")), "offsets is on meta but x is on cpu"),
    "back end": (dict(backend="triton"), "backend is 'triton', want one of reference, loop, grouped_mm"),
}


@pytest.mark.parametrize("changed, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named_with_their_values(changed, message):
    x, weight, offsets, a, b, _ = make()
    call = {**dict(x=x, weight=weight, offsets=offsets, a=a, b=b, backend=None), **changed}
    with pytest.raises(ValueError, match=re.escape(message)):
        grouped_lora(*(call[name] for name in ("x", "weight", "offsets", "a", "b")), backend=call["backend"])


@pytest.mark.parametrize(
    "ends", [[0, 5, 5, 12, 13, 14], [0, 5, 5, 12, 12, 12], [0, 5, 4, 12, 13, 13], [-1, 5, 5, 12, 13, 13]]
)
@pytest.mark.parametrize("backend", ["reference", "loop", "grouped_mm"])
def test_offsets_that_do_not_cover_x_are_refused_on_cpu(backend, ends):
    x, w, _, a, b, _ = make()
    message = re.escape(f"offsets must never decrease and end at M=13, the rows of x; got {ends}")
    with pytest.raises(ValueError, match=message):
        grouped_lora(x, w, torch.tensor(ends, dtype=torch.int32), a, b, backend=backend)


@pytest.mark.parametrize(
    "dtype, k, n, why",
    [
        (torch.float64, 24, 40, "torch.float64 is not one of torch.bfloat16, torch.float16, torch.float32"),
        (torch.bfloat16, 20, 40, "rows of K=20 and N=40 take 40 and 80 bytes, not multiples of 16"),
        (torch.bfloat16, 24, 12, "rows of K=24 and N=12 take 48 and 24 bytes, not multiples of 16"),
    ],
)
def test_an_explicit_back_end_that_cannot_run_says_why(dtype, k, n, why):
    x, w, offsets, a, b, _ = make(dtype=dtype, k=k, n=n)
    message = re.escape(f"backend 'grouped_mm' cannot run: {why}; use 'loop' or 'reference'")
    with pytest.raises(ValueError, match=message):
        grouped_lora(x, w, offsets, a, b, backend="grouped_mm")


def test_other_reasons_why_grouped_mm_cannot_run(monkeypatch):
    x, w, offsets, a, b, _ = make()
    sparse_columns = torch.zeros(6, N, 2 * K)[:, :, ::2]
    with pytest.raises(ValueError, match=re.escape("weight strides (1920, 48, 2) are not those of dense rows")):
        grouped_lora(x, sparse_columns, offsets, a, b, backend="grouped_mm")
    monkeypatch.setattr(module, "_grouped_mm", None)
    with pytest.raises(ValueError, match="has no grouped_mm; use 'loop' or 'reference'"):
        grouped_lora(x, w, offsets, a, b, backend="grouped_mm")


def test_a_wrong_name_in_the_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("MEGALORA_GROUPED_LORA", "fast")
    x, w, offsets, *_ = make()
    message = "the environment variable MEGALORA_GROUPED_LORA is 'fast', want one of reference, loop, grouped_mm"
    with pytest.raises(ValueError, match=message):
        grouped_lora(x, w, offsets)


@pytest.mark.parametrize("backend", ["reference", "loop", "grouped_mm"])
def test_a_may_read_another_input_than_the_base(backend):
    """Dropout: y = W x + B A z. Against the two halves, each row by row, with the other half switched off."""
    x, weight, offsets, a, b, dy = make()
    z = (x.detach() * (torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.5) * 2).requires_grad_()
    y = grouped_lora(x, weight, offsets, a, b, x_lora_MK=z, backend=backend)
    dx, dz, da, db = torch.autograd.grad(y, (x, z, a, b), dy)
    base_y, base_dx, _, _ = row_by_row(COUNTS, x, weight, torch.zeros_like(a), torch.zeros_like(b), dy)
    delta_y, delta_dz, delta_da, delta_db = row_by_row(COUNTS, z, torch.zeros_like(weight), a, b, dy)
    for got, want in ((y, base_y + delta_y), (dx, base_dx), (dz, delta_dz), (da, delta_da), (db, delta_db)):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_another_input_must_have_the_shape_of_x_and_an_adapter():
    x, weight, offsets, a, b, _ = make()
    with pytest.raises(ValueError, match=re.escape("x_lora is (12, 24); it needs a, b and x's shape (13, 24)")):
        grouped_lora(x, weight, offsets, a, b, x_lora_MK=x[1:])
    with pytest.raises(ValueError, match="it needs a, b"):
        grouped_lora(x, weight, offsets, x_lora_MK=x)
