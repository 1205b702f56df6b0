"""Check the row of tokens that samples make."""

import torch

from megalora.data.batch import Batch, flat_row
from tests.data.samples import sample


def test_a_row_holds_shifted_samples_end_to_end() -> None:
    samples = [sample([5, 6, 7, 8], [False, False, True, True]), sample([9, 3], [True, True])]
    # 4 tokens give 3 predictions, 2 give one; the row of 4 is rounded up to 6. The mask of the last
    # sample begins with its second token: nothing predicts the first.
    row = flat_row(samples, pad_id=2, multiple_of=6)
    assert row.tokens.tolist() == [5, 6, 7, 9, 2, 2]
    assert row.labels.tolist() == [6, 7, 8, 3, 0, 0]
    assert row.loss_mask.tolist() == [0, 1, 1, 1, 0, 0]
    # Filler is a document of its own, so that no sample's tokens see it or are seen by it.
    assert row.ends == (0, 3, 4, 6)
    assert row.tokens.dtype == row.labels.dtype == torch.int64
    assert row.loss_mask.dtype == torch.float32
    whole = flat_row(samples, pad_id=2)
    assert whole.tokens.tolist() == [5, 6, 7, 9]
    assert whole.ends == (0, 3, 4)


def test_a_row_without_samples_is_filler() -> None:
    # Megatron needs at least one token.
    assert flat_row([], pad_id=2).ends == (0, 1)
    row = flat_row([], pad_id=2, multiple_of=4)
    assert row.tokens.tolist() == [2, 2, 2, 2]
    assert row.loss_mask.tolist() == [0, 0, 0, 0]
    assert row.ends == (0, 4)


def test_documents_of_one_length() -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    row = Batch.of_equal(tokens, tokens + 1, torch.ones(2, 3))
    assert row.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert row.labels.tolist() == [2, 3, 4, 5, 6, 7]
    assert row.ends == (0, 3, 6)
