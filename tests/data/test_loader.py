"""Check that what a step trains on depends on seed and step, never on how ranks divide it."""

import itertools

import numpy as np
import pytest
import torch

from megalora.data.loader import (
    check_batch,
    collate,
    eval_micro_batches,
    global_batch_indices,
    micro_batches,
    order,
)
from tests.data.samples import sample


def test_order_is_a_fixed_permutation_per_epoch_and_seed():
    # A resumed run must see this order again, with a later numpy, too. Written down, so that a
    # change of the generator is seen.
    assert order(6, epoch=0, seed=0).tolist() == [3, 2, 1, 0, 4, 5]
    orders = set()
    for epoch, seed in itertools.product(range(3), range(3)):
        numbers = order(100, epoch, seed).tolist()
        assert sorted(numbers) == list(range(100))
        orders.add(tuple(numbers))
    assert len(orders) == 9, "every epoch and every seed has an order of its own"
    with pytest.raises(ValueError, match=r"data.seed must not be negative, got -1"):
        order(6, epoch=0, seed=-1)


# Of 10 samples: 4, 7 and 25 straddle epochs, 25 holds two and a half, 10 is an epoch.
@pytest.mark.parametrize("batch", [4, 7, 10, 25])
def test_global_batches_are_the_epochs_one_after_the_other(batch):
    num_samples = 10
    steps = 12
    # One epoch more than the steps use up in full.
    num_epochs = batch * steps // num_samples + 1
    stream = np.concatenate([order(num_samples, epoch, 3) for epoch in range(num_epochs)])
    for step in range(steps):
        expected = stream[step * batch : (step + 1) * batch].tolist()
        assert global_batch_indices(step, batch, num_samples, seed=3).tolist() == expected


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 3])
def test_ranks_divide_the_same_global_batch(dp, micro):
    # 24 rows are a multiple of every micro * dp here; with 17 samples they straddle epochs.
    indices = global_batch_indices(2, 24, 17, seed=5)
    shares = []
    for rank in range(dp):
        shares.append(micro_batches(indices, micro_batch_size=micro, dp_rank=rank, dp_size=dp))
    # The rule, position by position: k counts rows of a microbatch first, then ranks, then
    # microbatches of a rank.
    for k, index in enumerate(indices):
        assert shares[(k // micro) % dp][k // (micro * dp)][k % micro] == index
    divided = []
    for share in shares:
        assert len(share) == 24 // (micro * dp)
        divided.extend(np.concatenate(share))
    assert sorted(divided) == sorted(indices)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (10, 4, 2),
            (
                r"global_batch_size=10 is not a multiple of .*= 4 \* 2 = 8.\n  Use"
                r" train.global_batch_size=8 or 16, or"
            ),
        ),
        (
            (2, 1, 4),
            (
                r"global_batch_size=2 is not a multiple of .*= 1 \* 4 = 4.\n  Use"
                r" train.global_batch_size=4, or change"
            ),
        ),
        ((0, 1, 1), "train.global_batch_size must be at least 1, got 0"),
        ((4, 0, 1), "train.micro_batch_size must be at least 1, got 0"),
    ],
)
def test_check_batch(sizes, message):
    check_batch(16, 4, 2)
    with pytest.raises(ValueError, match=message):
        check_batch(*sizes)


def test_collate_shifts_and_pads():
    samples = [sample([5, 6, 7, 8], [False, False, True, True]), None, sample([9, 3], [True, True])]
    # 4 tokens give 3 predictions, rounded up to 4 columns. The mask of the last sample begins with
    # its second token: nothing predicts the first. None is a row of padding.
    batch = collate(samples, pad_id=2, multiple_of=4)
    assert batch.tokens.tolist() == [[5, 6, 7, 2], [2, 2, 2, 2], [9, 2, 2, 2]]
    assert batch.labels.tolist() == [[6, 7, 8, 0], [0, 0, 0, 0], [3, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.float32
    assert collate(samples, pad_id=2).tokens.tolist() == [[5, 6, 7], [2, 2, 2], [9, 2, 2]]
    # Megatron needs at least one column, of fillers alone as well.
    assert collate([None], pad_id=2).tokens.tolist() == [[2]]
    assert collate([None, None], pad_id=2, multiple_of=2).loss_mask.tolist() == [[0, 0], [0, 0]]


# A prime number of samples, which fits nowhere; rounds of three microbatches, as an interleaved
# pipeline needs them; one that fits exactly with dp=1, 2 and 4; fewer samples than ranks.
@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize(
    ("num_samples", "micro", "multiple"), [(13, 2, 1), (13, 2, 3), (16, 4, 1), (1, 1, 2)]
)
def test_evaluation_sees_every_sample_once_in_lockstep(num_samples, micro, multiple, dp):
    shares = []
    for rank in range(dp):
        shares.append(eval_micro_batches(num_samples, micro, rank, dp, multiple))
    # All ranks take part in as many collectives, so all have as many batches.
    (num_batches,) = {len(share) for share in shares}
    assert num_batches % multiple == 0
    seen = []
    for batch in itertools.chain.from_iterable(shares):
        assert len(batch) == micro
        for number in batch:
            # None fills up what is left of the last batches.
            if number is not None:
                seen.append(number)
    assert sorted(seen) == list(range(num_samples))
    # Without its last round (``multiple`` microbatches on every rank) a sample would be missing:
    # there is no round of filler alone.
    assert (num_batches - multiple) * micro * dp < num_samples
