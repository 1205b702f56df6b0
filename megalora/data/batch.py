"""Lay whole samples out in one flat row of tokens: a microbatch without padding between them."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megalora.data.chat import Encoded
from megalora.data.top_logits import TopLogits

FILLER = 256
"""Tokens of a document of filler. Attention in it costs 3 % of what linears do (``EVEN_TOKENS`` in
``pack.py``); one document of 32,768 would cost almost four times as much as they. Shorter ones
would save little and make more calls where attention is one for each document."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A row of T tokens. Documents follow each other, and none sees another: ``ends`` says where
    each one stops."""

    tokens: torch.Tensor
    """[T] int64, the model's input."""
    labels: torch.Tensor
    """[T] int64: the token after each input token; 0 in filler."""
    loss_mask: torch.Tensor
    """[T] float32: 1 where the label is in the loss."""
    ends: tuple[int, ...]
    """(0, end of document 0, end of document 1, ..., T). Filler at the end of the row is in
    documents of its own, of ``FILLER`` tokens at most."""
    filler: int = 0
    """Number of tokens of filler."""
    values: tuple[float, ...] = ()
    """What each sequence is compared with: the label of an answer or of a text, a value, the margin
    of its pair, an advantage; none where nothing is."""
    taught: TopLogits | None = None
    """What a teacher gives for the target tokens, in their order in the row; None where no file
    says."""
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Name -> [N] float32, a number for each of the target tokens, likewise."""
    routes: np.ndarray | None = None
    """[T, L, K] int16: experts that each MoE layer has to choose for each token, -1 where it
    chooses by itself; None where it always does."""

    @property
    def num_sequences(self) -> int:
        """Documents that are not filler."""
        return bisect_right(self.ends, len(self.tokens) - self.filler) - 1

    @property
    def targets(self) -> list[int]:
        """Number of target tokens of each sequence."""
        # Target tokens before each place: the difference over a document is its own.
        before = np.concatenate([[0], np.cumsum(self.loss_mask.numpy() > 0)])
        return np.diff(before[list(self.ends[: self.num_sequences + 1])]).tolist()

    @property
    def sequence_numbers(self) -> torch.Tensor:
        """[T] int64: the sequence of each token; in filler, the number of the document."""
        lengths = np.diff(self.ends)
        return torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))

    @classmethod
    def of_equal(
        cls, tokens_BS: torch.Tensor, labels_BS: torch.Tensor, loss_mask_BS: torch.Tensor
    ) -> "Batch":
        """A row of B documents of S tokens each."""
        num_documents, length = tokens_BS.shape
        ends = tuple(length * number for number in range(num_documents + 1))
        return cls(tokens_BS.flatten(), labels_BS.flatten(), loss_mask_BS.flatten(), ends)


def filler_of(samples: Sequence[Encoded]) -> np.ndarray:
    """Input tokens of filler, [1 to FILLER] int64: those of the first samples.

    Every one of them is in the model's vocabulary, and text spreads over the experts of a layer as
    the rows do: one token repeated would send the whole filler to the same few.
    """
    ids = np.zeros(0, np.int64)
    for sample in samples:
        ids = np.append(ids, sample.input_ids)
        if len(ids) >= FILLER:
            break
    return ids[:FILLER]


def flat_row(
    samples: Sequence[Encoded],
    *,
    filler: np.ndarray,
    multiple_of: int = 1,
    columns: Sequence[str] = (),
    route_shape: tuple[int, int] | None = None,
) -> Batch:
    """Shift sequences and put them one after another: n tokens give n - 1 predictions. The two of
    a pair stand side by side, the chosen one first.

    Args:
        samples: in the order of the row; without any the row is filler.
        filler: input tokens of filler, repeated as often as needed.
        multiple_of: T is rounded up to it with filler outside of the loss.
        columns: names of the numbers that each sample has for its tokens.
        route_shape: (L, K) where samples say which experts their tokens go to.
    """
    sequences: list[tuple[np.ndarray, np.ndarray]] = []
    values: list[float] = []
    by_column: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    for sample in samples:
        sequences += sample.sequences
        for name, parts in by_column.items():
            # As labels: a token's numbers are asked for where it is predicted.
            parts.append(sample.floats[name][1:][sample.loss_mask[1:]])
        values += [sample.value] * len(sample.sequences)
    ends = [0]
    for ids, _ in sequences:
        ends.append(ends[-1] + len(ids) - 1)
    # At least one token, or a row without samples would have none.
    length = -(-max(1, ends[-1]) // multiple_of) * multiple_of
    tokens = torch.empty(length, dtype=torch.int64)
    labels = torch.zeros(length, dtype=torch.int64)
    loss_mask = torch.zeros(length, dtype=torch.float32)
    for (ids, mask), start, end in zip(sequences, ends, ends[1:], strict=False):
        # The label of a token is the one behind it, and the mask is that of the label.
        tokens[start:end] = torch.from_numpy(ids[:-1])
        labels[start:end] = torch.from_numpy(ids[1:])
        loss_mask[start:end] = torch.from_numpy(mask[1:])
    num_filler = length - ends[-1]
    tokens[ends[-1] :] = torch.from_numpy(np.resize(filler, num_filler))
    routes = _routes(samples, ends, length, route_shape)
    while ends[-1] < length:
        ends.append(min(ends[-1] + FILLER, length))
    return Batch(
        tokens, labels, loss_mask, tuple(ends), num_filler, tuple(values),
        columns=_joined(by_column), routes=routes,
    )  # fmt: skip


def _joined(by_column: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    """Each column's parts one behind the other."""
    joined: dict[str, np.ndarray] = {}
    for name, parts in by_column.items():
        # An empty one first: a row of filler has no sample.
        joined[name] = np.concatenate([np.zeros(0, np.float32), *parts])
    return joined


def _routes(
    samples: Sequence[Encoded], ends: Sequence[int], length: int, shape: tuple[int, int] | None
) -> np.ndarray | None:
    """[length, L, K] int16: the experts of each token; -1 in filler, and where nobody knows."""
    if shape is None:
        return None
    routes = np.full((length, *shape), -1, np.int16)
    # A sample with routes is one sequence.
    for sample, start, end in zip(samples, ends, ends[1:], strict=False):
        if sample.routes is not None:
            routes[start:end] = sample.routes
    return routes
