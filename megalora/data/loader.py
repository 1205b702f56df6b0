"""From tokenised samples to the microbatches of one data-parallel rank.

What a step trains on depends on (seed, step) alone; ranks only divide it. Legend: B samples in a microbatch, S tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from megalora.data.chat import Encoded, encode
from megalora.data.columns import resolve_columns, to_messages
from megalora.data.sources import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Split:
    """The samples of one source that can be trained on, and how many could not."""

    source: str
    max_length: int
    """In tokens; longer samples are left out, never cut."""
    samples: list[Encoded]
    num_too_long: int = 0
    num_no_target: int = 0
    """Samples left out because no token of theirs would be in the loss."""
    longest: int = 0
    """Tokens in the longest sample of the source, left out or not."""

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.input_ids) for sample in self.samples)

    @property
    def num_target_tokens(self) -> int:
        return sum(sample.num_target_tokens for sample in self.samples)

    def summary(self) -> str:
        """One line for the log: what is there and what was left out."""
        line = f"{self.source}: {len(self.samples):,} samples, "
        line += f"{_short(self.num_tokens)} tokens ({_short(self.num_target_tokens)} in the loss)"
        return "; ".join([line, *self.left_out()])

    def left_out(self) -> list[str]:
        reasons = []
        if self.num_too_long:
            limit = f"data.max_length={self.max_length}"
            reasons.append(f"{self.num_too_long:,} longer than {limit} were left out (longest {self.longest:,})")
        if self.num_no_target:
            reasons.append(f"{self.num_no_target:,} without a token in the loss were left out")
        return reasons


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:,}"


def load_split(
    source: str, tokenizer: "PreTrainedTokenizerBase", *, format: str | Mapping[str, str], max_length: int
) -> Split:
    """Read and tokenise a source.

    Args:
        source: see ``read_rows``.
        tokenizer: a fast tokenizer with a chat template.
        format: see ``resolve_columns``; its columns are looked up in the first row.
        max_length: in tokens, of the whole conversation.
    Raises:
        ValueError: a row that cannot be read or tokenised (with its number), or no sample is left.
    """
    rows = read_rows(source)
    try:
        columns = resolve_columns(format, rows[0].keys())
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    encoded: list[Encoded] = []
    for number, row in enumerate(rows, 1):
        try:
            messages, num_context = to_messages(row, columns)
            encoded.append(encode(messages, tokenizer, num_context=num_context))
        except ValueError as error:
            raise ValueError(f"{source}: row {number}: {error}") from error
    fitting = [sample for sample in encoded if len(sample.input_ids) <= max_length]
    samples = [sample for sample in fitting if sample.num_target_tokens]
    split = Split(
        source,
        max_length,
        samples,
        num_too_long=len(encoded) - len(fitting),
        num_no_target=len(fitting) - len(samples),
        longest=max(len(sample.input_ids) for sample in encoded),
    )
    if not samples:
        fix = "Raise data.max_length." if split.num_too_long else "Look at the rows and at the model's chat template."
        reasons = "; ".join(split.left_out())
        raise ValueError(f"{source}: none of the {len(rows):,} samples is left: {reasons}.\n  {fix}")
    return split


def split_off_eval(split: Split, eval: float, seed: int) -> tuple[Split, Split]:
    """Hold out samples for evaluation: (train, eval), each in the order of the source.

    Args:
        split: at least two samples.
        eval: how many samples (int) or which fraction of them (float between 0 and 1; at least one sample).
        seed: of the choice.
    Raises:
        ValueError: nothing would be left on one of the sides.
    """
    num_samples = len(split.samples)
    if isinstance(eval, bool) or (isinstance(eval, float) and not 0 < eval < 1):
        raise ValueError(f"data.eval={eval} is neither a count (integer) nor a fraction between 0 and 1")
    num_eval = max(1, round(eval * num_samples)) if isinstance(eval, float) else int(eval)
    if not 1 <= num_eval < num_samples:
        raise ValueError(
            f"data.eval={eval} would hold out {num_eval} of the {num_samples} samples of {split.source}.\n"
            f"  Choose between 1 and {num_samples - 1}, or name another file."
        )
    # The third word keeps this choice apart from the order of any epoch.
    held_out = set(_permutation(num_samples, seed, 0, 1)[:num_eval].tolist())
    parts = ([], [])
    for index, sample in enumerate(split.samples):
        parts[index in held_out].append(sample)
    name = f"{split.source} (held out)"
    return replace(split, samples=parts[0]), Split(name, split.max_length, parts[1], longest=split.longest)


def _permutation(num_samples: int, seed: int, *stream: int) -> np.ndarray:
    """Sorting raw bits, because numpy freezes its bit generators across versions but not ``Generator.permutation``."""
    if seed < 0:
        raise ValueError(f"data.seed must not be negative, got {seed}")
    return np.argsort(np.random.PCG64([seed, *stream]).random_raw(num_samples), kind="stable")


@lru_cache(maxsize=4)  # a step needs one or two epochs; sorting 1 M samples takes 0.1 s
def order(num_samples: int, epoch: int, seed: int) -> np.ndarray:
    """[num_samples] int64, read-only: the order of the samples in an epoch; the same on every rank and layout."""
    permutation = _permutation(num_samples, seed, epoch)
    permutation.setflags(write=False)
    return permutation


def global_batch_indices(step: int, global_batch_size: int, num_samples: int, seed: int) -> np.ndarray:
    """[global_batch_size] int64: the samples of a step (from 0), out of the endless row of shuffled epochs.

    A batch may straddle epochs; every epoch holds every sample once.
    """
    positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
    epochs = positions // num_samples
    parts = [order(num_samples, int(e), seed)[positions[epochs == e] % num_samples] for e in np.unique(epochs)]
    return np.concatenate(parts)


def check_batch(global_batch_size: int, micro_batch_size: int, dp_size: int) -> None:
    """Raises ValueError unless the global batch divides into microbatches over the data-parallel ranks."""
    for name, size in (("global_batch_size", global_batch_size), ("micro_batch_size", micro_batch_size)):
        if size < 1:
            raise ValueError(f"train.{name} must be at least 1, got {size}")
    product = micro_batch_size * dp_size
    if global_batch_size % product:
        below = global_batch_size // product * product
        sizes = f"{below} or {below + product}" if below else f"{product}"
        raise ValueError(
            f"train.global_batch_size={global_batch_size} is not a multiple of "
            f"train.micro_batch_size * data-parallel size = {micro_batch_size} * {dp_size} = {product}.\n"
            f"  Use train.global_batch_size={sizes}, or change train.micro_batch_size."
        )


def micro_batches(indices: np.ndarray, *, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[np.ndarray]:
    """This rank's share of a global batch, as one [micro_batch_size] array of sample indices per microbatch.

    Position k of the global batch goes to microbatch k // (mbs * dp) of rank (k // mbs) % dp.
    """
    assert 0 <= dp_rank < dp_size, f"dp_rank={dp_rank} outside dp_size={dp_size}"
    check_batch(len(indices), micro_batch_size, dp_size)
    return list(indices.reshape(-1, dp_size, micro_batch_size)[:, dp_rank])


def eval_micro_batches(
    num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int, multiple: int = 1
) -> list[list[int | None]]:
    """This rank's share of an evaluation: every sample once over all ranks, None where there is none left.

    Every rank gets the same number of microbatches, a multiple of ``multiple`` (what an interleaved pipeline needs), so
    that all take part in every collective.
    """
    assert 0 <= dp_rank < dp_size, f"dp_rank={dp_rank} outside dp_size={dp_size}"
    per_round = micro_batch_size * dp_size * multiple
    num_positions = -(-num_samples // per_round) * per_round
    positions = np.arange(num_positions).reshape(-1, dp_size, micro_batch_size)[:, dp_rank]
    return [[k if k < num_samples else None for k in batch] for batch in positions.tolist()]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A microbatch, padded on the right. Causal attention keeps padding away from the real tokens."""

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
    num_predictions = [1 if sample is None else len(sample.input_ids) - 1 for sample in samples]
    length = -(-max(num_predictions) // multiple_of) * multiple_of
    tokens = torch.full((len(samples), length), pad_id, dtype=torch.int64)
    labels = torch.zeros_like(tokens)
    loss_mask = torch.zeros(tokens.shape, dtype=torch.float32)
    for row, (sample, n) in enumerate(zip(samples, num_predictions, strict=True)):
        if sample is not None:
            ids = torch.from_numpy(sample.input_ids)
            tokens[row, :n], labels[row, :n] = ids[:-1], ids[1:]
            loss_mask[row, :n] = torch.from_numpy(sample.loss_mask[1:])
    return Batch(tokens, labels, loss_mask)
