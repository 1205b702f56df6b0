"""Arrange tokenised samples as the microbatches of one data-parallel rank.

What a step trains on depends on (seed, step) alone; ranks only divide it. Legend: B samples in a
microbatch, S tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from megalora.data.chat import Encoded
from megalora.data.splits import permutation


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


def check_batch(global_batch_size: int, micro_batch_size: int, dp_size: int) -> None:
    """Raise ``ValueError`` unless the global batch divides into microbatches over the data-parallel
    ranks."""
    sizes = {"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"train.{name} must be at least 1, got {size}")
    product = micro_batch_size * dp_size
    if global_batch_size % product:
        # The nearest multiples; the one below may be 0, which is no batch.
        below = global_batch_size // product * product
        fix = f"{below} or {below + product}" if below else f"{product}"
        raise ValueError(
            f"train.global_batch_size={global_batch_size} is not a multiple of"
            f" train.micro_batch_size * data-parallel size = {micro_batch_size} * {dp_size} ="
            f" {product}.\n  Use train.global_batch_size={fix}, or change train.micro_batch_size."
        )


def micro_batches(
    indices: np.ndarray, *, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[np.ndarray]:
    """This rank's share of a global batch, as one [micro_batch_size] array of sample indices per
    microbatch.

    Position k of the global batch goes to microbatch k // (mbs * dp) of rank (k // mbs) % dp.
    """
    assert 0 <= dp_rank < dp_size, f"dp_rank={dp_rank} outside dp_size={dp_size}"
    check_batch(len(indices), micro_batch_size, dp_size)
    # [microbatches, dp_size, micro_batch_size], of which this rank takes its column.
    return list(indices.reshape(-1, dp_size, micro_batch_size)[:, dp_rank])


def eval_micro_batches(
    num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int, multiple: int = 1
) -> list[list[int | None]]:
    """This rank's share of an evaluation: every sample once over all ranks, then None.

    Every rank gets the same number of microbatches, a multiple of ``multiple`` (what an interleaved
    pipeline needs), so that all take part in every collective.
    """
    assert 0 <= dp_rank < dp_size, f"dp_rank={dp_rank} outside dp_size={dp_size}"
    # Samples are divided as in training, after their number is rounded up to whole rounds.
    per_round = micro_batch_size * dp_size * multiple
    num_positions = -(-num_samples // per_round) * per_round
    positions = np.arange(num_positions).reshape(-1, dp_size, micro_batch_size)[:, dp_rank]
    batches: list[list[int | None]] = []
    for batch in positions.tolist():
        batches.append([k if k < num_samples else None for k in batch])
    return batches


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A microbatch, padded on the right. Causal attention keeps padding away from the real
    tokens."""

    tokens: torch.Tensor
    """[B, S] int64, the model's input."""
    labels: torch.Tensor
    """[B, S] int64: the token after each input token; 0 in the padding."""
    loss_mask: torch.Tensor
    """[B, S] float32: 1 where the label is in the loss."""


def collate(samples: Sequence[Encoded | None], *, pad_id: int, multiple_of: int = 1) -> Batch:
    """Shift and pad samples: n tokens give n - 1 predictions.

    Args:
        samples: B of them; None is a filler, a row of padding.
        pad_id: the input token of the padding.
        multiple_of: S is rounded up to it (tensor-parallel size under sequence parallelism).
    """
    # At least one column, or a batch of fillers alone would have none.
    longest = 1
    for sample in samples:
        if sample is not None:
            longest = max(longest, len(sample.input_ids) - 1)
    length = -(-longest // multiple_of) * multiple_of
    tokens = torch.full((len(samples), length), pad_id, dtype=torch.int64)
    labels = torch.zeros_like(tokens)
    loss_mask = torch.zeros(tokens.shape, dtype=torch.float32)
    for row, sample in enumerate(samples):
        if sample is None:
            continue
        ids = torch.from_numpy(sample.input_ids)
        n = len(ids) - 1
        # The label of a token is the one behind it, and the mask is that of the label.
        tokens[row, :n] = ids[:-1]
        labels[row, :n] = ids[1:]
        loss_mask[row, :n] = torch.from_numpy(sample.loss_mask[1:])
    return Batch(tokens, labels, loss_mask)
