"""Compare the kernels of the loss on a CUDA device with torch in float64 there, at the size of
Qwen3's vocabulary. Needs only torch, triton and pytest:

    PYTHONPATH=kernels:. python -m pytest --noconftest -p no:cacheprovider \\
        tests/gpu/test_loss_on_gpu.py
"""

import pytest
import torch
from megalora_kernels import (
    join_blocks_triton,
    read_logits_triton,
    softmax_gradient_triton,
    takes_logit_kernels,
)

from tests.gpu.kernel_problem import DEVICE
from tests.gpu.marks import NEEDS_CUDA

pytestmark = NEEDS_CUDA
C = 70
V = 151_936
ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


@pytest.fixture(autouse=True)
def no_backend_from_the_environment(monkeypatch):
    monkeypatch.delenv("MEGALORA_BACKEND", raising=False)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 64])
@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_loss_agrees_with_float64(dtype: torch.dtype, ranks: int, weighted: bool) -> None:
    """Rows of logits and the gradient in place, with the vocabulary on so many ranks: 64 have 2,374
    entries each, one ragged block that does not begin on 16 bytes."""
    g = torch.Generator(DEVICE).manual_seed(0)
    logits = (torch.randn(C, V, generator=g, device=DEVICE) * 2 - 20).to(dtype)
    targets = torch.randint(V, (C,), generator=g, device=DEVICE)
    # Every third token is sure.
    logits[torch.arange(0, C, 3, device=DEVICE), targets[::3]] = 5.0
    assert takes_logit_kernels(logits)
    exact = logits.double()
    width = V // ranks
    parts = []
    for rank in range(ranks):
        own = logits[:, rank * width : (rank + 1) * width]
        parts.append(read_logits_triton(own, targets, rank * width, True))
    rows = join_blocks_triton(torch.cat(parts), V).double()
    lse = exact.logsumexp(1)
    # Sums of 151,936 float32 exponentials in blocks of 8,192, and logits of 20 in size.
    torch.testing.assert_close(
        rows[0], exact.gather(1, targets[:, None])[:, 0] - lse, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(rows[1], lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows[2], exact.mean(1), rtol=1e-5, atol=1e-4)
    onehot = torch.nn.functional.one_hot(targets, V).double()
    p = exact.softmax(1)
    how = [rows[3].float(), rows[4].float()]
    want = p - onehot
    if weighted:
        weights, at_target, add = torch.randn(3, C, generator=g, device=DEVICE)
        how = [rows[1].float(), weights, at_target, add]
        want = weights[:, None] * p + at_target[:, None] * onehot + add[:, None]
    for rank in range(ranks):
        own = logits[:, rank * width : (rank + 1) * width]
        softmax_gradient_triton(own, targets, rank * width, *how)
    error = (logits.double() - want).abs()
    # One rounding to the dtype; p in float32 with an exponential that errs by 2e-6 of itself, and
    # the digits that p - 1 has in float32.
    assert (error <= ULP[dtype] * want.abs() + 1e-5 * p + 3e-7).all()
    assert logits.isfinite().all()


def test_rows_of_more_than_int32_elements() -> None:
    """14,136 rows of 151,936 bfloat16 logits: the last lies beyond 2^31. Needs 6 GiB."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    num_rows = 2**31 // V + 2
    logits = torch.zeros(num_rows, V, dtype=torch.bfloat16, device=DEVICE)
    targets = torch.full((num_rows,), 7, device=DEVICE)
    logits[-1, 7] = 10.0
    rows = join_blocks_triton(read_logits_triton(logits, targets, 0, True), V)
    softmax_gradient_triton(logits, targets, 0, rows[3], rows[4])
    e10 = torch.tensor(10.0, dtype=torch.float64).exp().item()
    p = e10 / (e10 + V - 1)
    assert abs(rows[0, -1].exp().item() - p) < 1e-5
    assert abs(logits[-1, 7].item() - (p - 1)) < 2**-8
    assert abs(logits[0, 7].item() + 1) < 2**-8
