"""Check that what a step trains on depends on seed and step alone."""

import itertools

import numpy as np
import pytest

from megalora.data.order import global_batch_indices, order


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
