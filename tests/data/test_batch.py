"""Check the row of tokens that samples make."""

import numpy as np
import torch

from megalora.data.batch import FILLER, Batch, filler_of, flat_row
from tests.data.samples import sample

IDS = np.array([2, 8, 4])


def test_a_row_holds_shifted_samples_end_to_end() -> None:
    samples = [sample([5, 6, 7, 8], [False, False, True, True]), sample([9, 3], [True, True])]
    # 4 tokens give 3 predictions, 2 give one; the row of 4 is rounded up to 6. The mask of the last
    # sample begins with its second token: nothing predicts the first.
    row = flat_row(samples, filler=IDS, multiple_of=6)
    assert row.tokens.tolist() == [5, 6, 7, 9, 2, 8]
    assert row.labels.tolist() == [6, 7, 8, 3, 0, 0]
    assert row.loss_mask.tolist() == [0, 1, 1, 1, 0, 0]
    # Filler is a document of its own, so that no sample's tokens see it or are seen by it.
    assert row.ends == (0, 3, 4, 6)
    assert row.tokens.dtype == row.labels.dtype == torch.int64
    assert row.loss_mask.dtype == torch.float32
    whole = flat_row(samples, filler=IDS)
    assert whole.tokens.tolist() == [5, 6, 7, 9]
    assert whole.ends == (0, 3, 4)


def test_a_row_without_samples_is_filler() -> None:
    # Megatron needs at least one token.
    assert flat_row([], filler=IDS).ends == (0, 1)
    row = flat_row([], filler=IDS, multiple_of=4)
    # Repeated from the first.
    assert row.tokens.tolist() == [2, 8, 4, 2]
    assert row.loss_mask.tolist() == [0, 0, 0, 0]
    assert row.ends == (0, 4)


def test_filler_is_in_short_documents_of_many_tokens() -> None:
    ids = np.arange(10, 10 + FILLER)
    samples = [sample([5, 6, 7, 8], [True] * 4)]
    for samples_of_row, first in ((samples, 3), ([], 0)):
        row = flat_row(samples_of_row, filler=ids, multiple_of=2 * FILLER + 50)
        starts = list(range(first, 2 * FILLER + 50, FILLER))
        assert list(row.ends[:-1]) == ([0] if first else []) + starts
        assert row.ends[-1] == len(row.tokens) == 2 * FILLER + 50
        assert row.tokens[first:].tolist() == np.resize(ids, len(row.tokens) - first).tolist()
        # Nothing of it is in the loss.
        assert row.loss_mask[first:].sum() == row.labels[first:].sum() == 0


def test_filler_is_text_of_the_first_samples() -> None:
    samples = [sample(list(range(i, i + 100)), [True] * 100) for i in (0, 1000, 2000, 3000)]
    expected = [*range(100), *range(1000, 1100), *range(2000, 2056)]
    assert FILLER == 256
    assert filler_of(samples).tolist() == expected
    # Samples with fewer tokens than a document of filler are all that there is.
    assert filler_of(samples[1:2]).tolist() == list(range(1000, 1100))


def test_documents_of_one_length() -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    row = Batch.of_equal(tokens, tokens + 1, torch.ones(2, 3))
    assert row.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert row.labels.tolist() == [2, 3, 4, 5, 6, 7]
    assert row.ends == (0, 3, 6)
