"""The in-place delta: right values and gradients, no second full-width tensor, and refused where it
would be unsafe."""

import pytest
import torch
from megalora_kernels import add_low_rank

S = 5
B = 3
OUT = 11
R = 2


def tensors() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    shapes = [(S, B, OUT), (S, B, R), (OUT, R), (S, B, OUT)]
    return tuple(torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes)


def test_values_and_gradients():
    base, h, b, dy = tensors()
    leaves = [t.clone().requires_grad_() for t in (base, h, b)]
    expected = leaves[0] + leaves[1] @ leaves[2].T
    wanted = torch.autograd.grad(expected, leaves, dy)
    copies = [t.clone().requires_grad_() for t in (base, h, b)]
    out = add_low_rank(copies[0] * 1, copies[1], copies[2])
    torch.testing.assert_close(out, expected)
    for got, want in zip(torch.autograd.grad(out, copies, dy), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_the_result_lies_where_the_base_output_lay():
    base, h, b, _ = tensors()
    whole = base.clone().requires_grad_() * 1
    address = whole.data_ptr()
    assert add_low_rank(whole, h.requires_grad_(), b).data_ptr() == address


def test_a_base_output_that_somebody_keeps_for_backward_is_noticed():
    """sigmoid keeps its output: writing over it would give a wrong gradient in silence."""
    base, h, b, dy = tensors()
    leaf = base.clone().requires_grad_()
    out = add_low_rank(leaf.sigmoid(), h, b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(dy)
