"""Bytes of live tensors, against numbers that are counted by hand."""

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalora.bench.live import LiveTensors

X = 4 * 30
"""Bytes of a float32 [5, 6]."""


def test_what_is_freed_no_longer_counts() -> None:
    with LiveTensors() as live:
        a = torch.ones(5, 6)
        assert live.now_bytes == live.peak_bytes == X
        # The sum is gone when the product is there, but not before.
        b = (a + 1) * 2
        assert (live.now_bytes, live.peak_bytes) == (2 * X, 3 * X)
        del a
        assert (live.now_bytes, live.peak_bytes) == (X, 3 * X)
        live.reset_peak()
        assert live.peak_bytes == X
        del b
    assert (live.now_bytes, live.peak_bytes, live.unknown_bytes) == (0, X, 0)


def test_a_storage_counts_once_and_as_long_as_a_view_of_it_lives() -> None:
    with LiveTensors() as live:
        a = torch.zeros(5, 6)
        # Six numbers of a, whose storage they keep alive whole.
        row = a.view(6, 5).t()[2]
        assert live.now_bytes == live.peak_bytes == X
        del a
        assert live.now_bytes == X
        del row
    assert live.now_bytes == 0


def test_values_from_python() -> None:
    with LiveTensors() as live:
        # torch.tensor makes its result without an operation that a dispatch mode sees.
        a = torch.tensor([[1.0] * 6] * 5)
        assert (live.now_bytes, live.unknown_bytes) == (X, 0)
        del a
    assert live.now_bytes == 0


def test_in_place_makes_nothing_and_resizing_changes_what_is_there() -> None:
    with LiveTensors() as live:
        a = torch.ones(5, 6)
        b = torch.empty(0)
        a.mul_(3).add_(1)
        assert live.now_bytes == live.peak_bytes == X
        # This grows b from nothing to the size of a.
        torch.add(a, 1, out=b)
        assert live.now_bytes == live.peak_bytes == 2 * X
        # Ten times a, and b.
        a.resize_(50, 6)
        assert live.now_bytes == live.peak_bytes == 11 * X
        # Now both are on b's storage, and a has let go of its own.
        a.set_(b)  # type: ignore[reportCallIssue]
        assert live.now_bytes == X


def test_what_was_there_before() -> None:
    told = torch.ones(5, 6)
    untold = torch.ones(10, 6)
    # A view of a tensor that is told already adds nothing.
    with LiveTensors([told, told[1:]]) as live:
        assert live.now_bytes == live.peak_bytes == X
        y = told + untold[:5]
        # Only now is ``untold`` an argument of anything, and the view is on its storage.
        z = untold.view(-1)
        assert (live.now_bytes, live.unknown_bytes) == (2 * X, 2 * X)
        del told, y
        assert live.now_bytes == 0
        del untold
        assert live.unknown_bytes == 2 * X
        del z
        assert live.unknown_bytes == 0


def test_backward_and_what_it_was_kept_for() -> None:
    """exp keeps its result; in backward one gradient is there with the next, and the kept result
    goes with its node."""
    weight = torch.ones(5, 6, requires_grad=True)
    with LiveTensors([weight]) as live:
        loss = (weight * 2).exp().sum()
        # The weight, exp's result, a scalar; the product is gone: its backward needs the factor 2.
        assert live.now_bytes == X + X + 4
        live.reset_peak()
        loss.backward()
        assert weight.grad is not None
        del loss
        assert live.now_bytes == 2 * X
        # The weight, exp's result, and the gradient times that. The gradient of the sum is a scalar
        # of 4 bytes, expanded without a copy, and so is the loss.
        assert live.peak_bytes == 3 * X + 8


class Doubled(torch.autograd.Function):
    """Makes temporaries of known size in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        _ = torch.zeros(1000)
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        _ = torch.zeros(2000)
        return gradients[0] * 2


def test_inside_custom_functions() -> None:
    x = torch.ones(5, 6, requires_grad=True)
    with LiveTensors([x]) as live:
        # x, y, and 1,000 floats of 4 bytes.
        y = Doubled.apply(x)
        assert live.peak_bytes == 2 * X + 4000
        live.reset_peak()
        y.backward(torch.ones_like(x))  # type: ignore[reportAttributeAccessIssue]
        # x, y, the ones, the gradient; 2,000 floats.
        assert live.peak_bytes == 4 * X + 8000


def test_an_optimizer_and_a_step_of_training() -> None:
    model = nn.Linear(30, 20, bias=False)
    weight = 4 * 600
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    with LiveTensors(model.parameters()) as live:
        F.mse_loss(model(torch.ones(4, 30)), torch.ones(4, 20)).backward()
        # The weight and its gradient.
        assert live.now_bytes == 2 * weight
        live.reset_peak()
        optimizer.step()
        # AdamW's two moments and a step count, made in the first step.
        assert live.now_bytes == 4 * weight + 4
        # For a moment also the square root of the second.
        assert live.peak_bytes >= 5 * weight
        del optimizer
        gc.collect()
        assert live.now_bytes == 2 * weight


def test_counting_keeps_nothing_alive_and_changes_no_number() -> None:
    torch.manual_seed(3)
    x = torch.randn(7, 5, requires_grad=True)
    plain = torch.autograd.grad(x.softmax(1).square().sum(), x)[0]
    with LiveTensors() as live:
        counted = torch.autograd.grad(x.softmax(1).square().sum(), x)[0]
        assert torch.equal(plain, counted)
        # Counted tensors must go as they would uncounted: 50 of them leave nothing.
        for _ in range(50):
            _ = torch.ones(1000) + 1
        del _
        assert live.now_bytes == 4 * 35
    # x, and ``plain``, which ``equal`` was given.
    assert live.unknown_bytes == 2 * 4 * 35


@pytest.mark.parametrize("device", ["meta"])
def test_tensors_without_memory_have_none(device: str) -> None:
    with LiveTensors() as live:
        _ = torch.ones(1000, device=device) + 1
    assert live.peak_bytes == 0
