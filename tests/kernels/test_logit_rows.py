"""Check what a loss reads from logits, and the gradient written over them, against torch in
float64."""

import importlib
from functools import partial

import pytest
import torch
from megalora_kernels import join_blocks_triton, read_logits_triton, softmax_gradient_triton

from tests.kernels import interpreter
from tests.kernels.oracle import ULP

module = importlib.import_module("megalora_kernels.logit_rows")

pytestmark = pytest.mark.usefixtures("uninitialised_is_nan")
C = 37  # two programs join their blocks, the second with 5 rows
V = 300
HALF = torch.bfloat16
CASES = [
    # (dtype, ranks that divide the vocabulary)
    pytest.param(HALF, 3, id="bfloat16-3"),
    pytest.param(torch.float32, 1, id="float32-1"),
    pytest.param(HALF, 1, id="bfloat16-1", marks=pytest.mark.slow),
    pytest.param(torch.float32, 3, id="float32-3", marks=pytest.mark.slow),
    pytest.param(torch.float16, 3, id="float16-3", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of a whole row, and one or two of a rank's part, the last ragged."""
    monkeypatch.setattr(module, "BLOCK", 128)


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits far from zero, of which some rows are sure of the target, and targets in every
    block."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(C, V, generator=g) * 3 - 40 + 10 * torch.arange(C)[:, None] % 70
    targets = torch.randint(V, (C,), generator=g)
    # First and last entry of a row and of a block.
    targets[:4] = torch.tensor([0, 127, 128, V - 1])
    logits[::3] += 25 * torch.nn.functional.one_hot(targets[::3], V)
    return logits.to(dtype), targets


def read(logits: torch.Tensor, targets: torch.Tensor, ranks: int) -> torch.Tensor:
    """Rows ``[5, C]`` with the vocabulary divided over so many ranks."""
    width = V // ranks
    parts = []
    for rank in range(ranks):
        own = logits[:, rank * width : (rank + 1) * width]
        parts.append(read_logits_triton(own, targets, rank * width, True))
    return join_blocks_triton(torch.cat(parts), V)


@pytest.mark.parametrize(("dtype", "ranks"), CASES)
def test_rows_are_those_of_float64(dtype: torch.dtype, ranks: int) -> None:
    """Ranks' parts of a row do not lie side by side in memory, as columns of a wider matrix."""
    logits, targets = operands(dtype)
    found = read(logits, targets, ranks).double()
    exact = logits.double()
    logprob = exact.log_softmax(1).gather(1, targets[:, None])[:, 0]
    largest = exact.amax(1)
    # Sums of 300 exponentials in float32, and results at the size of the logits, up to 90.
    close = partial(torch.testing.assert_close, rtol=2e-6, atol=2e-6)
    close(found[0], logprob)
    close(found[1], exact.logsumexp(1))
    torch.testing.assert_close(found[2], exact.mean(1), rtol=2e-6, atol=2e-5)
    assert torch.equal(found[3], largest)
    close(found[4], 1 / (exact - largest[:, None]).exp().sum(1))


@pytest.mark.parametrize("block", [128, 8192])
def test_rows_are_those_of_the_reference(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of the size that a GPU has, too: one for the whole row."""
    monkeypatch.setattr(module, "BLOCK", block)
    logits, targets = operands(HALF)
    for with_mean in (False, True):
        parts = module.read_logits_ref(logits, targets, 0, with_mean)
        want = module.join_blocks_ref(parts, V)
        got = join_blocks_triton(read_logits_triton(logits, targets, 0, with_mean), V)
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-5)
        # Nobody adds up what nobody wants.
        assert bool(got[2].any()) == with_mean


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "ranks"), CASES)
def test_gradient_in_place_is_rounded_once(dtype: torch.dtype, ranks: int, weighted: bool) -> None:
    """p - onehot, and with weights w p + g onehot + a, each element within a rounding of
    float64."""
    logits, targets = operands(dtype)
    exact = logits.double()
    rows = read(logits, targets, ranks)
    onehot = torch.nn.functional.one_hot(targets, V).double()
    g = torch.Generator().manual_seed(1)
    weights, at_target, add = torch.randn(3, C, generator=g)
    p = exact.softmax(1)
    if weighted:
        want = weights.double()[:, None] * p + at_target.double()[:, None] * onehot
        want += add.double()[:, None]
        how = (rows[1], weights, at_target, add)
    else:
        want = p - onehot
        how = (rows[3], rows[4])
    width = V // ranks
    for rank in range(ranks):
        softmax_gradient_triton(
            logits[:, rank * width : (rank + 1) * width], targets, rank * width, *how
        )
    # lse is off by half a unit of float32 at the size of the logits, 90; p - onehot in float32
    # keeps the digits of 1.
    error = (logits.double() - want).abs()
    assert (error <= ULP[dtype] * want.abs() + 1e-5 * weighted * p + 3e-7).all()
    reference = module.softmax_gradient_ref(operands(dtype)[0], targets, 0, *how)
    assert (reference - logits).abs().max() <= 2 * ULP[dtype] * want.abs().max() + 1e-5


def test_a_sure_token_keeps_its_gradient() -> None:
    """p is 1 - 1e-4: rounded to bfloat16 it would be 1, and p - onehot 0."""
    logits = torch.full((1, V), -30.0, dtype=torch.bfloat16)
    logits[0, 7] = -30 + 15
    targets = torch.tensor([7])
    want = logits.double().softmax(1)[0, 7] - 1
    rows = read(logits, targets, 1)
    softmax_gradient_triton(logits, targets, 0, rows[3], rows[4])
    # Rounded to bfloat16 by 2^-9, and 1 - p in float32 has four digits of it.
    assert abs(logits[0, 7].double() / want - 1) < 2**-6
    assert logits[0, 7] < -1e-5


def test_blocks_of_minus_infinity_and_what_is_no_number() -> None:
    """A block that is masked adds nothing; NaN anywhere in a row reaches its results alone."""
    logits, targets = operands(torch.float32)
    targets[:2] = 200
    logits[0, :128] = -torch.inf
    logits[1, 70] = torch.nan
    found = read(logits, targets, 1)
    want = logits.double().log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found[0].double(), want, rtol=2e-6, atol=2e-6, equal_nan=True)
    assert found[0, 1].isnan() and found[0, 2:].isfinite().all()


def test_no_row() -> None:
    logits, targets = operands(torch.float32)
    parts = read_logits_triton(logits[:0], targets[:0], 0, True)
    assert join_blocks_triton(parts, V).shape == (5, 0)
    softmax_gradient_triton(logits[:0], targets[:0], 0, parts[0, 0], parts[0, 1])


def test_one_gradient_for_all_rows() -> None:
    """What ``sum().backward()`` hands over has one element in memory for all rows."""
    logits, targets = operands(torch.float32)
    rows = read(logits, targets, 1)
    ones = torch.ones(1).expand(C)
    want = module.softmax_gradient_ref(logits, targets, 0, rows[1], -torch.ones(C), ones)
    softmax_gradient_triton(logits, targets, 0, rows[1], -torch.ones(C), ones)
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-6)


def test_no_other_order_changes_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> list[torch.Tensor]:
        logits, targets = operands(torch.float16)
        rows = read(logits, targets, 1)
        softmax_gradient_triton(logits, targets, 0, rows[3], rows[4])
        return [rows, logits]

    first = call()
    interpreter.reverse_programs(monkeypatch)
    for a, b in zip(first, call(), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
