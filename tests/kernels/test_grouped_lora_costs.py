"""Check what grouped_lora allocates, keeps for backward and reads on the host."""

from typing import Any

import pytest
import torch
from megalora_kernels import AugmentedWeight, grouped_lora

from tests.kernels.linear import COUNTS, K, assert_within_rounding, call, make, run
from tests.kernels.measure import Recorder, kept_bytes, no_reads_on_the_host

# One expert has all rows, so a temporary per expert counts too; K and N are wider than one piece of
# 256 columns.
WIDE: dict[str, Any] = dict(counts=[0, 40, 0], rank=4, k=280, n=328)
IN_ORDER = ("loop", "grouped_mm", "triton")
"""Back ends that copy no operand; ``joined`` copies x beside S."""


@pytest.mark.parametrize("backend", IN_ORDER)
def test_no_full_width_temporary(backend):
    """Output-wide tensors: y in forward, dx in backward, and nothing else that large."""
    x, w, offsets, a, b, dy = make(**WIDE)
    with Recorder(x, w, a, b) as forward:
        y = grouped_lora(x, w, offsets, a, b, backend=backend)
    assert forward.at_least(40 * 280) == [40 * 328 * 4]
    with Recorder(x, w, a, b, dy) as backward:
        torch.autograd.grad(y, (x, a, b), dy)
    assert backward.at_least(40 * 280) == [40 * 280 * 4]


def test_joined_makes_one_copy_of_its_operand_and_no_more():
    x, w, offsets, a, b, dy = make(**WIDE)
    joined = AugmentedWeight(w, 4)
    with Recorder() as forward:
        y = grouped_lora(x, joined, offsets, a, b, backend="grouped_mm")
    assert sorted(forward.at_least(40 * 280)) == [40 * (280 + 16) * 4, 40 * 328 * 4]  # [x | s], y
    with Recorder() as backward:
        torch.autograd.grad(y, (x, a, b), dy)
    # dx, [dy | ds]
    assert sorted(backward.at_least(40 * 280)) == [40 * 280 * 4, 40 * (328 + 16) * 4]


def test_the_recorder_sees_the_temporaries_of_the_reference():
    """Otherwise the tests above prove nothing."""
    x, w, offsets, a, b, _ = make(**WIDE)
    with Recorder() as forward:
        grouped_lora(x, w, offsets, a, b, backend="reference")
    assert len(forward.at_least(40 * 328)) > 1


@pytest.mark.parametrize("backend", IN_ORDER)
def test_no_buffer_the_size_of_the_weight_and_no_weight_gradient(backend):
    x, w, offsets, a, b, dy = make(**WIDE)
    with Recorder(x, w, a, b, dy) as recorder:
        grouped_lora(x, w, offsets, a, b, backend=backend).backward(dy)
    assert w.grad is None and recorder.at_least(w.numel()) == []


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_backward_leaves_the_weight_alone_when_x_is_frozen(backend):
    x, w, offsets, a, b, dy = make()
    for x_wants_grad in (False, True):
        y = grouped_lora(x.detach().requires_grad_(x_wants_grad), w, offsets, a, b, backend=backend)
        with Recorder() as recorder:
            y.backward(dy)
        # dx = dy W is all that needs the weight.
        assert (w.untyped_storage().data_ptr() in recorder.read) == x_wants_grad


# Elements: x of 13 rows for dA, S of rank 8 for dB; dx needs the weights alone.
@pytest.mark.parametrize(
    "wanted, kept",
    [("xab", 13 * K + 13 * 8), ("x", 0), ("a", 13 * K), ("b", 13 * 8)],
    ids=["xab", "x", "a", "b"],
)
@pytest.mark.parametrize("arm", ["loop", "grouped_mm", "joined", "triton"])
def test_backward_keeps_x_and_the_rank_wide_s_and_no_more(arm, wanted, kept):
    x, w, offsets, a, b, _ = make()
    x = x.detach().requires_grad_("x" in wanted)
    a = a.detach().requires_grad_("a" in wanted)
    b = b.detach().requires_grad_("b" in wanted)
    assert kept_bytes(lambda: call(arm, x, w, offsets, a, b), (w, a, b, offsets)) == kept * 4


def test_dropped_x_is_kept_in_place_of_x():
    x, w, offsets, a, b, _ = make()
    z = (2 * x).detach()
    given = (w, a, b, offsets, z)
    kept = kept_bytes(lambda: call("loop", x, w, offsets, a, b, x_lora_MK=z), given)
    # z counts as given, so S is all there is: 13 rows of rank 8 in float32, and no x.
    assert kept == 13 * 8 * 4


@pytest.mark.parametrize("arm", ["grouped_mm", "joined", "triton"])
def test_nothing_is_read_on_the_host(arm, grouped_mm_between_triton, small_tiles):
    x, w, offsets, a, b, dy = make(rank=3)
    # Outside: making room copies the weight once, when a model is built.
    joined = AugmentedWeight(w, 3)
    with no_reads_on_the_host():
        actual = run(arm, x, joined.weight, offsets, a, b, dy)
    assert_within_rounding(actual, COUNTS, x, w, a, b, dy)


@pytest.mark.parametrize("backend", ["loop", "reference"])
def test_the_others_do_read_it(backend):
    """Otherwise the test above proves nothing."""
    x, w, offsets, a, b, _ = make()
    with no_reads_on_the_host(), pytest.raises(AssertionError, match="read on the host"):
        grouped_lora(x, w, offsets, a, b, backend=backend)
