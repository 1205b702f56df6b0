"""Lay whole samples out in one flat row of tokens: a microbatch without padding between them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megalora.data.chat import Encoded


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
    """(0, end of document 0, end of document 1, ..., T). Filler at the end of the row is a document
    of its own."""

    @classmethod
    def of_equal(
        cls, tokens_BS: torch.Tensor, labels_BS: torch.Tensor, loss_mask_BS: torch.Tensor
    ) -> "Batch":
        """A row of B documents of S tokens each."""
        num_documents, length = tokens_BS.shape
        ends = tuple(length * number for number in range(num_documents + 1))
        return cls(tokens_BS.flatten(), labels_BS.flatten(), loss_mask_BS.flatten(), ends)


def flat_row(samples: Sequence[Encoded], *, pad_id: int, multiple_of: int = 1) -> Batch:
    """Shift samples and put them one after another: n tokens give n - 1 predictions.

    Args:
        samples: in the order of the row; without any the row is filler.
        pad_id: the input token of filler.
        multiple_of: T is rounded up to it with filler outside of the loss.
    """
    ends = [0]
    for sample in samples:
        ends.append(ends[-1] + len(sample.input_ids) - 1)
    # At least one token, or a row without samples would have none.
    length = -(-max(1, ends[-1]) // multiple_of) * multiple_of
    tokens = torch.full((length,), pad_id, dtype=torch.int64)
    labels = torch.zeros(length, dtype=torch.int64)
    loss_mask = torch.zeros(length, dtype=torch.float32)
    for sample, start, end in zip(samples, ends, ends[1:], strict=False):
        ids = torch.from_numpy(sample.input_ids)
        # The label of a token is the one behind it, and the mask is that of the label.
        tokens[start:end] = ids[:-1]
        labels[start:end] = ids[1:]
        loss_mask[start:end] = torch.from_numpy(sample.loss_mask[1:])
    if length > ends[-1]:
        ends.append(length)
    return Batch(tokens, labels, loss_mask, tuple(ends))
