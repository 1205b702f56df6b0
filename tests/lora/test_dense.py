"""Add a low-rank delta in place: values and gradients are right, no second full-width tensor is
made, and autograd refuses it where it would be unsafe."""

import pytest
import torch
from megalora_kernels import add_low_rank

# Sequence, microbatch, output features and rank, all different: a transposed dimension shows.
S = 5
B = 3
OUT = 11
R = 2


def tensors() -> tuple[torch.Tensor, ...]:
    """base [S, B, OUT], h = A x [S, B, R], b [OUT, R] and dy, the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    # In float64 assert_close tolerates 1e-7: another order of summation passes, nothing else does.
    for shape in [(S, B, OUT), (S, B, R), (OUT, R), (S, B, OUT)]:
        drawn.append(torch.randn(*shape, generator=generator, dtype=torch.float64))
    return tuple(drawn)


def leaves_of(*values: torch.Tensor) -> list[torch.Tensor]:
    """Copies that autograd gives gradients to."""
    return [value.clone().requires_grad_() for value in values]


def test_values_and_gradients():
    base, h, b, dy = tensors()
    leaves = leaves_of(base, h, b)
    expected = leaves[0] + leaves[1] @ leaves[2].T
    wanted = torch.autograd.grad(expected, leaves, dy)
    copies = leaves_of(base, h, b)
    # A leaf cannot be written over; the product with 1 stands for the base's own linear.
    out = add_low_rank(copies[0] * 1, copies[1], copies[2])
    torch.testing.assert_close(out, expected)
    for got, want in zip(torch.autograd.grad(out, copies, dy), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_the_result_lies_where_the_base_output_lay():
    """A second tensor [S, B, OUT] per linear would be the largest activation of a LoRA layer."""
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
