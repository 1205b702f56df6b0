"""Shuffle: a random order that is the same on every machine and under every version."""

import numpy as np


def permutation(num_samples: int, seed: int, *stream: int) -> np.ndarray:
    """[num_samples] int64: a random order; each seed and stream of numbers has its own."""
    if seed < 0:
        raise ValueError(f"data.seed must not be negative, got {seed}")
    # By sorting raw bits, because numpy freezes its bit generators across versions, but not
    # ``Generator.permutation``.
    return np.argsort(np.random.PCG64([seed, *stream]).random_raw(num_samples), kind="stable")
