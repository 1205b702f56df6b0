"""Say which samples a step trains on: a function of the seed and the step alone.

How many ranks there are, and which samples share a row, only divides them (``pack.py``).
"""

from functools import lru_cache

import numpy as np

from megalora.data.permutation import permutation


# A step needs one or two epochs; sorting 1 M samples takes 0.1 s.
@lru_cache(maxsize=4)
def order(num_samples: int, epoch: int, seed: int) -> np.ndarray:
    """[num_samples] int64, read-only: the order of the samples in an epoch; the same on every rank
    and layout."""
    shuffled = permutation(num_samples, seed, epoch)
    # All callers get this very array from the cache.
    shuffled.setflags(write=False)
    return shuffled


def global_batch_indices(
    step: int, global_batch_size: int, num_samples: int, seed: int
) -> np.ndarray:
    """[global_batch_size] int64: the samples of a step (from 0), out of the endless row of shuffled
    epochs.

    A batch may straddle epochs; every epoch holds every sample once.
    """
    # Places in the endless row; epoch e has those from e * num_samples on.
    positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
    epochs = positions // num_samples
    parts = []
    for epoch in np.unique(epochs):
        in_epoch = positions[epochs == epoch] % num_samples
        parts.append(order(num_samples, int(epoch), seed)[in_epoch])
    return np.concatenate(parts)
